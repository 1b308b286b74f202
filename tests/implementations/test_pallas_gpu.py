"""Law 1 for the GPU kernels, in JAX's interpreter of them; no test runs on a GPU.

The interpreter fills memory with NaN, and raises an error where threads race. JAX 0.10
has none for tensor cores: there the kernels are lowered only.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab import explain, masks, modifiers
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.pallas_gpu import PallasGpu, substitute
from attnlab._src.implementations.pallas_gpu.blocks import BLOCKS, Blocks
from attnlab._src.implementations.pallas_gpu.call import Ring
from attnlab._src.implementations.pallas_gpu.logits import Rules
from tests import grid
from tests.implementations.test_pallas_tpu import both_passes, record

gpu: Any = plgpu
interprets = pytest.mark.skipif(
    not hasattr(gpu, "InterpretGPUParams"), reason="this JAX has no such interpreter"
)


class Interpreted(PallasGpu):
    """The GPU kernels, interpreted on any platform."""

    name = "pallas_gpu_interpreted"
    platforms = None
    blocks = Blocks(2, 64, 2)

    @property
    def interpret(self):  # type: ignore[override]
        return gpu.InterpretGPUParams(detect_races=True)


#: Two blocks of rows and three of columns, the last ones incomplete; and less than one.
LENGTHS = {"wide": (70, 150), "tall": (150, 70), "square": (140, 140), "short": (9, 5)}
#: Head sizes that 64 does not divide, and groups of query heads.
HEADS = {
    "each": grid.Heads(2, 2, 24, 40),
    "grouped": grid.Heads(2, 1, 72, 16),
    "one": grid.Heads(1, 1, 64, 128),
}
#: Elementwise modifiers, whose numbers are per head, per query, or per key.
MODIFIERS: dict[str, Any] = {
    "row_scale": lambda s: (grid.RowScale(0.2 * s.normal(s.N, s.T, 1)),),
    "two": lambda s: (
        modifiers.alibi(0.2 * s.rng.random(s.N, "f")),
        modifiers.soft_cap(3.0),
    ),
}
CELLS = [
    "scaled_dot-causal-none-one-float16-index-plain-square",
    "scale_per_head-longformer-two-each-float16-offset_batch-dropout-wide",
    "dot-window-alibi-each-bfloat16-offset-sinks-tall",
    "scaled_dot-none-bias_keys-grouped-float16-index-dropout-wide",
    "bilinear-big_bird-soft_cap-each-float16-explicit-plain-tall",
    "scaled_dot-documents-row_scale-grouped-float16-index-plain-square",
    "dot-lengths-none-one-float16-index-sinks-wide",
    "scaled_dot-dense-alibi-one-float16-offset-plain-square",
    "bilinear-per_head-none-each-bfloat16-index-dropout-wide",
    "scale_per_head-blocks-row_scale-each-float16-index-plain-tall",
    "scaled_dot-predicate-two-one-float16-explicit-plain-square",
    "dot-not-bias_keys-each-float16-offset_batch-sinks-wide",
    "scaled_dot-dilated-none-grouped-bfloat16-explicit-plain-tall",
    "scaled_dot-anchor_data-soft_cap-one-float16-index-dropout-wide",
    "bilinear-prefix-alibi-grouped-float16-offset-plain-square",
    "scaled_dot-chunked-none-each-float16-index-sinks-short",
    "dot-streaming-row_scale-grouped-bfloat16-offset-plain-tall",
]
SHORT = CELLS[0]


@pytest.fixture
def rounding():
    """JAX's default precision, which lets products round 16-bit inputs' weights."""
    with jax.default_matmul_precision(None):
        yield


@pytest.fixture
def sizes(monkeypatch):
    for levels, ours in (
        (grid.LENGTHS, LENGTHS),
        (grid.HEADS, HEADS),
        (grid.MODIFIERS, MODIFIERS),
    ):
        for name, level in ours.items():
            monkeypatch.setitem(levels, name, level)


def problem(cell):
    made = grid.build(grid.Cell(*cell.split("-"), tiles="whole"))
    options = {**made.data, **made.fixed}
    sides = [options.pop(name) for name in ("query", "key", "value")]
    return record(*sides, dropout_rate=made.dropout_rate, **options), made.cotangents


def agree(implementation, inputs, cotangents):
    """Compares with ``tiled``, which computes in float32.

    Weights and gradients of logits are rounded to 16 bits before they are summed, and
    gradients after that: each error is at most a few units of rounding.
    """
    found, wanted = (
        jax.jit(functools.partial(both_passes, which))(inputs, *cotangents)
        for which in (implementation, IMPLEMENTATIONS["tiled"])
    )
    unit = float(jnp.finfo(inputs.query.dtype).eps)

    def near(x, y, tolerance):
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        largest = np.abs(y).max(initial=0, where=np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest + 1e-7)

    near(found[1], wanted[1], 1e-5)  # no rounded number is in log-sum-exp
    near(found[0], wanted[0], unit)
    for n, (x, y) in enumerate(zip(found[2], wanted[2], strict=True)):
        # Numbers of modifiers get sums over many pairs, in which most cancels.
        near(x, y, (3 if n < 3 else 16) * unit)


@interprets
@pytest.mark.parametrize("cell", grid.few(CELLS[::2], SHORT))
def test_cell(cell, sizes, rounding):
    inputs, cotangents = problem(cell)
    made = Interpreted()
    assert made.unsupported(inputs) == ()
    agree(made, inputs, cotangents)


def lowers(inputs, cotangents):
    """Lowers both passes; this needs neither a GPU nor its compiler.

    The interpreter takes more than Mosaic GPU does: lengths, broadcasts, primitives.
    """
    made = PallasGpu()
    assert made.unsupported(inputs) == ()
    program = jax.jit(functools.partial(both_passes, made))
    traced = program.trace(inputs, *cotangents)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == len(KERNELS)
    for name in KERNELS:
        assert name in text


KERNELS = ("attnlab_forward", "attnlab_backward_query", "attnlab_backward_key")


@pytest.mark.parametrize("cell", grid.few(CELLS, CELLS[0]))
def test_every_cell_lowers(cell, sizes, rounding):
    lowers(*problem(cell))


def by_step(t, s):
    return jnp.floor(t / 7) == jnp.floor(s / 7)


def by_root(t, s):
    return jnp.sqrt(jnp.abs(t - s).astype(jnp.float32)) < 4


ODD: dict[str, Any] = {
    "one query": (1, 130, dict(query_offset=129, mask=masks.causal())),
    "one query of modifiers": (
        1,
        72,
        dict(
            query_offset=np.array([71, 3]),
            modifiers=[modifiers.alibi(np.ones(2, "f")), modifiers.soft_cap(3.0)],
        ),
    ),
    "one of each": (
        1,
        1,
        dict(
            query_positions=np.array([3]),
            key_positions=np.array([2]),
            mask=masks.causal(),
        ),
    ),
    "one key": (9, 1, dict(key_positions=np.array([4]))),
    "odd lengths": (131, 67, dict(mask=masks.sliding_window(30, 30))),
    "floor": (70, 70, dict(mask=masks.predicate(by_step))),
    "root": (70, 70, dict(mask=masks.predicate(by_root))),
}


def odd(name):
    t, s, options = ODD[name]
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(2, n, heads, 64)).astype("float16")
        for n, heads in ((t, 2), (s, 1), (s, 1))
    )
    d_output, d_lse = rng.normal(size=(2, t, 2, 64)), rng.normal(size=(2, t, 2))
    cotangents = d_output.astype("float16"), d_lse.astype("float32")
    return record(q, k, v, **options), cotangents


@pytest.mark.parametrize("name", grid.few(ODD, "one query"))
def test_odd_problems_lower(name, rounding):
    lowers(*odd(name))


@interprets
@pytest.mark.slow
@pytest.mark.parametrize("name", ["one query of modifiers", "odd lengths", "root"])
def test_odd_problems(name, rounding):
    agree(Interpreted(), *odd(name))


@interprets
@pytest.mark.slow
def test_the_lowest_finite_number_is_no_infinity(rounding):
    q, k, v = (np.ones((1, 9, 1, 64), np.float16) for _ in range(3))
    lowest = np.full((1, 1, 1, 9), np.finfo(np.float32).min)
    inputs = record(q, k, v, modifiers=[modifiers.bias(lowest)])
    ones = np.ones((1, 9, 1, 64), np.float16), np.ones((1, 9, 1), "f")
    agree(Interpreted(), inputs, ones)


@interprets
@pytest.mark.slow
@pytest.mark.parametrize("blocks", sorted(set(BLOCKS.values())), ids=str)
def test_blocks_of_the_table(blocks, sizes, rounding, monkeypatch):
    monkeypatch.setattr(Interpreted, "blocks", blocks)
    agree(Interpreted(), *problem(SHORT))


@interprets
@pytest.mark.slow
def test_a_race_is_noticed(sizes, rounding, monkeypatch):
    """Blocks are copied into slots that are still read."""
    monkeypatch.setattr(Ring, "_free", lambda *args: None)
    with pytest.raises(Exception, match="[Rr]ace"):
        agree(Interpreted(), *problem(SHORT))


@interprets
@pytest.mark.slow
def test_a_wrong_mask_is_noticed(sizes, rounding, monkeypatch):
    """One more key is visible to each query."""
    tile = Rules._tile

    def shifted(self, *args):
        made = tile(self, *args)
        return made._replace(query_positions=made.query_positions + 1)

    monkeypatch.setattr(Rules, "_tile", shifted)
    with pytest.raises(AssertionError):
        agree(Interpreted(), *problem(SHORT))


@interprets
@pytest.mark.slow
def test_hidden_numbers_that_are_not_finite(rounding):
    q, k, v = (np.ones((1, 70, 1, 64), np.float16) for _ in range(3))
    k[:, 40], v[:, 50] = np.nan, np.inf
    inputs = record(q, k, v, mask=masks.causal())
    output, lse, found = both_passes(
        Interpreted(), inputs, np.ones((1, 70, 1, 64), "f"), np.ones((1, 70, 1), "f")
    )
    assert np.isfinite(output[:, :40]).all()
    assert np.isnan(output[:, 40:]).all()
    assert np.isfinite(lse[:, :40]).all()
    assert np.isfinite(found[0][:, :40]).all()


def shapes(dtype=jnp.bfloat16, size=64, length=256):
    return [jax.ShapeDtypeStruct((1, length, 2, size), dtype)] * 3


REFUSED: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "it computes bfloat16 or float16, all alike, not float32": (
        shapes(jnp.float32),
        {},
    ),
    "it rounds weights to 16 bits, which precision= forbids": (
        shapes(),
        {"precision": "highest"},
    ),
    "heads of size 136 are larger than 128": (shapes(size=136), {}),
    "B is 70,000, and its grid has 65,535": (
        [jax.ShapeDtypeStruct((70_000, 8, 2, 64), jnp.bfloat16)] * 3,
        {},
    ),
    "Bias has a number for each pair": (
        shapes(),
        {"modifiers": [modifiers.bias(jnp.zeros((256, 256)))]},
    ),
    "RelativeTable is no function of one pair at a time, in operations": (
        shapes(),
        {"modifiers": [modifiers.relative_bias(jnp.zeros((2, 8)), max_distance=9)]},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_gives_its_reason(reason, rounding):
    sides, options = REFUSED[reason]
    with pytest.raises(NotImplementedError, match=reason):
        explain(*sides, **options, implementation="pallas_gpu", platform="cuda")
    assert explain(*sides, **options, platform="cuda").implementation == "batched"


def test_it_runs_when_asked_for(rounding):
    answer = explain(*shapes(), platform="gpu")
    assert answer.implementation == "batched"
    assert "pallas_gpu: it has not been timed on a GPU yet" in str(answer)
    asked = explain(*shapes(), platform="cuda", implementation="pallas_gpu")
    assert asked.implementation == "pallas_gpu"
    with pytest.raises(NotImplementedError, match="runs on cuda, not on cpu"):
        explain(*shapes(), platform="cpu", implementation="pallas_gpu")


class Card:
    def __init__(self, kind, capability):
        self.device_kind, self.compute_capability = kind, capability


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_other_cards_are_refused(capability, rounding, monkeypatch):
    card = Card("NVIDIA card", capability)
    monkeypatch.setattr(jax, "devices", lambda *args: [card])
    with pytest.raises(
        NotImplementedError, match=f"needs compute capability 9.0, .* has {capability}"
    ):
        explain(*shapes(), platform="cuda", implementation="pallas_gpu")


@pytest.mark.parametrize("x", [-9.0, -1.0, -1e-3, 0.0, 0.3, 4.0, 50.0])
def test_substitutes(x):
    x = jnp.float32(x)

    def own(x):
        return jnp.tanh(x) + jnp.where(x != 0, x, 1) ** -2

    for fn in (own, jax.grad(own)):
        found = substitute.substituted(fn, x)
        np.testing.assert_allclose(found, fn(x), rtol=1e-5, atol=1e-6)
    steps = jax.make_jaxpr(functools.partial(substitute.substituted, own))(x)
    assert "tanh" not in str(steps)
