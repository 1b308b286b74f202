"""Lowering of the TPU kernels, bounds of their logits, tables of block sizes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, explain, scores
from attnlab._src.bench.targets import lowered
from attnlab._src.implementations.pallas_tpu import blocks
from attnlab._src.modifiers.bias import SoftCap
from attnlab._src.types import pytree
from tests.implementations import interpreted

SCORES = {
    "scaled_dot": scores.scaled_dot(),
    "additive": scores.additive.init(jax.random.key(0), 64, hidden_size=8),
    "mlp": scores.mlp.init(jax.random.key(0), 64, hidden_sizes=(8, 16)),
}
X = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)


@pytest.mark.parametrize("name", SCORES)
def test_x64_mode(name):
    """TPU kernels have no int64, the dtype of loop counters in x64 mode."""

    def attend(q, score):
        return attention(q, q, q, score=score, implementation="pallas_tpu")

    def gradients(q, score):
        return jax.grad(lambda *a: attend(*a).sum(), (0, 1))(q, score)

    with jax.enable_x64(True):
        chosen = explain(X, X, X, score=SCORES[name], platform="tpu")
        assert chosen.implementation == "pallas_tpu"
        for fn in (attend, gradients):
            lowered(fn, (X, SCORES[name]), "tpu:v5e")


@pytree
class Louder(SoftCap):
    """A subclass whose logits exceed the cap."""

    def apply(self, logits, tile, *operands):
        return 100 * super().apply(logits, tile, *operands)


def test_a_cap_of_the_users_own_bounds_nothing(monkeypatch):
    interpreted.register(monkeypatch)
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(1, 40, 2, 8)).astype(np.float32) for _ in range(3))
    both = [
        attention(q, k, v, modifiers=[Louder(jnp.float32(2))], implementation=name)
        for name in (interpreted.NAME, "reference")
    ]
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "of_kind",
    [
        [512, 512, 512],
        {"sixty": {"forward": [[512, 512, 512, 0, 1, 1]]}},
        {"64": {"forwards": [[512, 512, 512, 0, 1, 1]]}},
        {"64": {"forward": [512, 512, 512]}},  # as earlier versions wrote it
        {"64": {"forward": []}},
        {"64": {"forward": [[512, 512, 512]]}},
        {"64": {"forward": [[512, 512, 384, 0, 1, 1]]}},
        {"64": {"forward": [[100, 512, 512, 0, 1, 1]]}},
        {"64": {"forward": [[512, 512, 512.0, 0, 1, 1]]}},
        {"64": {"forward": [[100, 100, 60, 0, 1, 1]]}},
        {"64": {"forward": [[0, 0, 0, 0, 1, 1]]}},
        {"64": {"forward": [[512, 512, 0, 0, 1, 1]]}},
        {"64": {"forward": [[-128, 512, 128, 0, 1, 1]]}},
        {"64": {"forward": [[512, True, 512, 0, 1, 1]]}},
        {"64": {"forward": [["512", "512", "512", 0, 1, 1]]}},
        {"64": {"forward": "512"}},
        {"-64": {}},
        {"64": [512, 512, 512]},
        {"64": {"forward": [[512, 512, 512, 0, 1, -1]]}},
        {"64": {"forward": [[512, 512, 512, 0, 1, float("inf")]]}},
        {"64": {"forward": [[512, 512, 512, 0, True, 1]]}},
    ],
)
def test_a_bad_table_is_named(of_kind, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"v5e": of_kind}))
    with pytest.raises(ValueError, match=r"table\.json is no table of blocks"):
        blocks.read(path)


def test_a_good_table_is_read(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(
        '{"new": {"256": {"forward": [[128, 768, 384, 0, 1.5, 2]]}, "64": {}}}'
    )
    found = blocks.Entry(blocks.Blocks(128, 768, 384), 0, 1.5, 2)
    assert blocks.read(path) == {"new": {256: {"forward": (found,)}, 64: {}}}
