"""The adapter to ``jax.nn``: the same meaning, and cuDNN where JAX offers it."""

import types
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks, modifiers, scores
from tests.conftest import forget
from tests.grid import few

B, T, N, H = 2, 12, 2, 8
MASKS = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(3, 0),
    "window of both sides": masks.sliding_window(3, 2),
    "strided": masks.dilated_window(4, 0, 2),
    "documents": masks.causal() & masks.documents(np.arange(T) // 5),
}


def arrays(dtype="float32", keys=T):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, keys, 1, H), (B, keys, 1, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_empty_slots_are_hidden_without_a_mask():
    slots = np.where(np.arange(T) % 3 == 1, -1, np.arange(T)).astype(np.int32)
    options = dict(query_positions=np.arange(T, dtype=np.int32), key_positions=slots)
    found, wanted = (
        attention(*arrays(), **options, implementation=name)
        for name in ("jax_nn", "reference")
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", few(MASKS, "causal", "window"))
@pytest.mark.usefixtures("loose")  # jax.nn promotes
def test_16_bits(name):
    given = arrays("bfloat16")
    wide = [x.astype("float32") for x in given]

    def both(given, implementation):
        def run(*given):
            return attention(*given, mask=MASKS[name], implementation=implementation)

        output, pull = jax.vjp(run, *given)
        return output, *pull(jnp.ones_like(output))

    # Weights, their gradients, those of the logits, and the results are rounded.
    for one, other in zip(both(given, "jax_nn"), both(wide, "reference"), strict=True):
        assert one.dtype == jnp.bfloat16
        allowed = 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(other).max()
        assert np.abs(one.astype("float32") - other).max() <= allowed


def test_16_bits_are_refused_where_promotion_is_an_error():
    with pytest.raises(NotImplementedError, match="promotes 16-bit types"):
        attention(*arrays("bfloat16"), implementation="jax_nn")


def test_a_scale_of_each_head_is_refused_in_16_bits():
    with pytest.raises(NotImplementedError, match="scaled by head"):
        attention(
            *arrays("bfloat16"),
            score=scores.scaled_dot(jnp.ones(N, "bfloat16")),
            implementation="jax_nn",
        )


def test_symbolic_lengths_without_a_mask():
    shape = jax.export.symbolic_shape("2, t - 1, 2, 8")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    run = jax.jit(lambda x: attention(x, x, x, implementation="jax_nn"))
    call = jax.export.export(run)(x).call
    x = arrays()[0]
    wanted = attention(x, x, x, implementation="reference")
    np.testing.assert_allclose(call(x), wanted, atol=1e-5)


class Asked(Exception):
    """What ``jax.nn`` was asked for."""


CUDNN: dict[str, Any] = {
    "bfloat16": (dict(mask=masks.causal()), "bfloat16", "9.0", "cudnn"),
    "no mask": ({}, "float16", "8.0", "cudnn"),
    "float32": (dict(mask=masks.causal()), "float32", "9.0", None),
    "old": (dict(mask=masks.causal()), "bfloat16", "7.5", None),
    "no GPU": (dict(mask=masks.causal()), "bfloat16", None, None),
    "the default device is a CPU": ({}, "bfloat16", "9.0", None),
    # Without is_causal, a window of jax.nn's cuDNN path would see the future.
    "window": (dict(mask=masks.sliding_window(3, 0)), "bfloat16", "9.0", "default"),
    "bias": (
        dict(modifiers=[modifiers.bias(jnp.zeros((T, T)))]),
        "bfloat16",
        "9.0",
        "default",
    ),
}


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_where_jax_offers_it(name, monkeypatch):
    options, dtype, generation, wanted = CUDNN[name]
    kind = "NVIDIA H100 80GB HBM3" if generation else "cpu"
    device = types.SimpleNamespace(device_kind=kind, compute_capability=generation)

    def attend(*args, implementation="default", **kwargs):
        raise Asked(implementation, kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    default = jax.devices()[0] if "default" in name else None
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    forget()
    with jax.default_device(default), pytest.raises(Asked) as asked:
        attention(*arrays(dtype), **options, implementation="jax_nn")
    way, given = asked.value.args
    assert way == wanted
    assert "local_window_size" not in given
    dense = "mask" in given
    assert dense == (wanted == "default")
    assert dense or given["is_causal"] == ("mask" in options)
    forget()
