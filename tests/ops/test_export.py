"""Exported programs with symbolic sizes (``jax.export``)."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, attention_with_stats, explain, masks, modifiers, scores
from attnlab._src.implementations import IMPLEMENTATIONS
from tests.grid import few, in_turn

N, K, H = 4, 2, 8


def arrays(b, t, s):
    rng = np.random.default_rng(0)
    shapes = (b, t, N, H), (b, s, K, H), (b, s, K, H)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def shapes(symbols, *more):
    """Symbolic shapes of query, key and value, and of ``more`` arrays."""
    scope = jax.export.SymbolicScope()
    symbolic = functools.partial(jax.export.symbolic_shape, scope=scope)
    b, t, s = symbolic(symbols)
    sizes = (b, t, N, H), (b, s, K, H), (b, s, K, H)
    own = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
    return own + [jax.ShapeDtypeStruct(symbolic(size), dtype) for size, dtype in more]


def exported(function, args, **options):
    """What calls the exported program."""
    return jax.export.export(jax.jit(function), **options)(*args).call


RNG = jax.random.key(0)
OPTIONS = {
    "plain": {},
    "causal": dict(mask=masks.causal()),
    "structure": dict(mask=masks.sliding_window(2, 1) & ~masks.prefix(1)),
    "lengths": dict(mask=masks.lengths(key=3)),
    "per_head": dict(mask=masks.per_head([masks.causal(), masks.chunked(2)] * 2)),
    "offset": dict(mask=masks.causal(), query_offset=2),
    "alibi": dict(modifiers=[modifiers.alibi(N), modifiers.soft_cap(3.0)]),
    "additive": dict(
        score=scores.additive.init(RNG, H, num_heads=N, num_key_heads=K, hidden_size=4)
    ),
    "sinks": dict(sinks=jnp.ones(N)),
    "dropout": dict(dropout_rate=0.4, dropout_rng=RNG),
}
SIZES = [(2, 5, 7), (3, 8, 6), (1, 1, 1)]


@pytest.mark.parametrize("name", few(OPTIONS, "dropout"))
def test_symbolic_sizes(name):
    run = functools.partial(attention, implementation="reference", **OPTIONS[name])
    call = exported(run, shapes("b, t, s"))
    for sizes in SIZES:
        data = arrays(*sizes)
        np.testing.assert_allclose(call(*data), run(*data), atol=2e-6)


@pytest.mark.parametrize(
    ("implementation", "symbols"),
    in_turn(["reference", "jax_nn"], ["b, 5, 7", "2, t, 7", "2, 5, s", "b, t, t"]),
)
def test_gradients_of_some_symbolic_sizes(symbols, implementation):
    def loss(q, k, v):
        mask = masks.causal()
        output = attention(q, k, v, mask=mask, implementation=implementation)
        return (output**2).sum()

    gradients = jax.grad(loss, (0, 1, 2))
    call = exported(gradients, shapes(symbols), platforms=("cpu", "tpu"))
    data = arrays(2, 5, 5 if symbols == "b, t, t" else 7)
    for found, wanted in zip(call(*data), gradients(*data), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
def test_arrays_over_pairs():
    def run(q, k, v, mask, bias):
        return attention_with_stats(
            q,
            k,
            v,
            mask=mask,
            modifiers=[modifiers.bias(bias)],
            top_k="all",
            implementation="reference",
        )

    given = shapes("b, t, s", ("b, 1, t, s", np.bool_), (f"{N}, t, s", np.float32))
    call = exported(lambda *x: run(*x)[:3], given)
    rng = np.random.default_rng(1)
    for sizes in SIZES:
        pairs = rng.normal(size=(N, *sizes[1:])).astype(np.float32)
        data = *arrays(*sizes), rng.random((sizes[0], 1, *sizes[1:])) < 0.6, pairs
        for found, wanted in zip(call(*data), run(*data), strict=False):
            np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize("implementation", [None, "tiled"])
def test_a_symbolic_batch_has_a_plan(implementation):
    def run(q, k, v, ids):
        mask = masks.causal() & masks.documents(ids)
        return attention(q, k, v, mask=mask, implementation=implementation)

    call = exported(run, shapes("b, 6, 6", ("b, 6", np.int32)))
    for batch in (1, 3):
        data = *arrays(batch, 6, 6), np.repeat([[0, 0, 1, 1, 1, -1]], batch, 0)
        data = *data[:3], data[3].astype(np.int32)
        np.testing.assert_allclose(call(*data), run(*data), atol=2e-6)


@pytest.mark.parametrize("implementation", ["tiled", "native", "pallas_tpu", "splash"])
def test_whoever_needs_a_plan_says_so(implementation):
    run = functools.partial(attention, implementation=implementation)
    words = (
        rf"implementation='{implementation}' cannot .* and T \(t\) and S \(s\) are "
        "symbolic; implementation='reference' needs no plan"
    )
    with pytest.raises(NotImplementedError, match=words):
        jax.export.export(jax.jit(run))(*shapes("2, t, s"))


def test_the_reference_is_not_chosen_unasked():
    words = r"a plan needs .* T \(t\); give implementation='reference'"
    with pytest.raises(NotImplementedError, match=words):
        jax.export.export(jax.jit(attention))(*shapes("2, t, 3"))
    with pytest.raises(NotImplementedError, match=words):
        explain(*shapes("2, t, 3"))
    told = explain(*shapes("2, t, 3"), implementation="reference")
    assert told.implementation == "reference"
    assert set(told.passed_over) == set(IMPLEMENTATIONS) - {"reference"}
    assert "T (t) is symbolic" in told.passed_over["tiled"][-1]


def test_what_else_needs_lengths_says_so():
    top = functools.partial(attention_with_stats, top_k=2, implementation="reference")
    with pytest.raises(NotImplementedError, match=r"top_k: .* but S is symbolic \(s\)"):
        jax.export.export(jax.jit(top))(*shapes("2, 3, s"))
    mask = masks.random_blocks(RNG, 1, 2, 4)
    run = functools.partial(attention, mask=mask, implementation="reference")
    with pytest.raises(NotImplementedError, match=r"random_blocks.* symbolic ones"):
        jax.export.export(jax.jit(run))(*shapes("2, 3, s"))
