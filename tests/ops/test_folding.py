"""Keys and values that ``vmap`` does not map are not copied (law 12)."""

import functools
import itertools
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, attention_with_stats, masks, modifiers, scores
from attnlab._src.masks.base import Mask
from attnlab._src.ops.primitive import attention_p
from attnlab._src.types import Modifier, pytree
from tests.grid import NATIVE, few
from tests.implementations import interpreted

M, B, T, S, N, K, H, D = 3, 2, 9, 13, 4, 2, 8, 6
FAST = ("tiled", NATIVE)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, wanted):
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytree
class SomeHeads(Mask):
    """A user's mask that depends on the head."""

    def visible(self, tile, operands):
        return (tile.query_positions + tile.key_positions) % (tile.head + 1) == 0


@pytree
class HeadScale(Modifier):
    """A user's modifier that depends on the head."""

    def apply(self, logits, tile, *operands):
        return logits / (1 + tile.head).astype(logits.dtype)


IDS = np.sort(np.random.default_rng(0).integers(-1, 3, (B, S)), -1)
QUERY_IDS = np.sort(np.random.default_rng(1).integers(-1, 3, (M, B, T)), -1)
PER_HEAD = [masks.causal(), masks.full(), masks.lengths(key=[4, 9]), masks.prefix(3)]
DENSE = np.random.default_rng(2).random((M, N, T, S)) < 0.6
RNG = jax.random.key(3)


#: By name: (mapped data, shared data, options from both, whether it folds into heads).
CASES = {
    "plain": (None, None, lambda m, s: {}, True),
    "causal": (None, None, lambda m, s: dict(mask=masks.causal()), True),
    "lengths": (
        None,
        np.array([4, 11]),
        lambda m, s: dict(mask=masks.lengths(key=s)),
        True,
    ),
    "mapped lengths": (
        np.array([0, 4, 11]),
        None,
        lambda m, s: dict(mask=masks.lengths(key=m) & masks.causal()),
        True,
    ),
    "mapped documents": (
        QUERY_IDS,
        IDS,
        lambda m, s: dict(mask=masks.documents(m, s)),
        True,
    ),
    "dense": (None, DENSE[0], lambda m, s: dict(mask=s), True),
    "mapped dense": (DENSE, None, lambda m, s: dict(mask=m), True),
    "anchors": (
        np.array([[1, 2], [3, -1], [0, 12]]),
        None,
        lambda m, s: dict(mask=masks.anchor(m) | masks.sliding_window(1, 1)),
        True,
    ),
    "blocks": (
        None,
        np.array([[[0, -1], [1, 0], [2, 3], [0, 1]]] * N)
        % (np.arange(N) + 1)[:, None, None],
        lambda m, s: dict(mask=masks.blocks(s, 4)),
        True,
    ),
    "per head": (None, None, lambda m, s: dict(mask=masks.per_head(PER_HEAD)), True),
    "in per head": (
        np.array([4, 0, 11]),
        None,
        lambda m, s: dict(
            mask=masks.per_head([*PER_HEAD[:3], masks.lengths(key=m)]) & masks.full()
        ),
        False,
    ),
    "head of a mask": (None, None, lambda m, s: dict(mask=SomeHeads()), False),
    "alibi": (
        None,
        None,
        lambda m, s: dict(modifiers=[modifiers.alibi(N), modifiers.soft_cap(3.0)]),
        True,
    ),
    "bias": (
        None,
        random(N, 1, S),
        lambda m, s: dict(modifiers=[modifiers.bias(s)]),
        True,
    ),
    "bias of pairs": (
        None,
        random(T, S),
        lambda m, s: dict(modifiers=[modifiers.bias(s)]),
        True,
    ),
    "mapped bias": (
        random(M, N, T, S),
        None,
        lambda m, s: dict(modifiers=[modifiers.bias(m)]),
        True,
    ),
    "head of a modifier": (
        None,
        None,
        lambda m, s: dict(modifiers=[HeadScale()]),
        False,
    ),
    "additive": (
        None,
        scores.additive.init(
            jax.random.key(0), H, num_heads=N, num_key_heads=K, hidden_size=4
        ),
        lambda m, s: dict(score=s),
        True,
    ),
    "scale": (
        None,
        1 + random(N) ** 2,
        lambda m, s: dict(score=scores.scaled_dot(s)),
        True,
    ),
    "sinks": (None, random(N), lambda m, s: dict(sinks=s), True),
    "dropout": (
        None,
        RNG,
        lambda m, s: dict(dropout_rate=0.4, dropout_rng=s),
        True,
    ),
    "mapped dropout": (
        jax.random.split(RNG, M),
        None,
        lambda m, s: dict(dropout_rate=0.4, dropout_rng=m),
        True,
    ),
    "offset": (
        None,
        np.array([3, 0]),
        lambda m, s: dict(query_offset=s, mask=masks.causal()),
        True,
    ),
    "mapped offset": (
        np.array([3, 0, 5]),
        None,
        lambda m, s: dict(query_offset=m, mask=masks.causal()),
        False,
    ),
    "positions": (
        None,
        np.where(np.arange(S) == 5, -1, np.arange(S)[::-1]),
        lambda m, s: dict(key_positions=s, mask=masks.sliding_window(4, 2)),
        True,
    ),
    "mapped positions": (
        np.stack([np.arange(S), np.arange(S)[::-1], np.full(S, -1)]),
        None,
        lambda m, s: dict(key_positions=m, mask=masks.causal()),
        False,
    ),
}


def _heads(jaxpr):
    """The number of query heads of each pass in a program."""
    for step in jaxpr.eqns:
        if step.primitive is attention_p:
            yield step.invars[0].aval.shape[2]
        for inner in jax.extend.core.jaxprs_in_params(step.params):
            yield from _heads(inner)


def _run(name, implementation):
    """A function (q, (k, v, shared data), mapped data) -> (a sum, the output)."""
    make = CASES[name][2]

    def run(q, shared, mapped):
        k, v, data = shared
        options = make(mapped, data)
        output, lse, *_ = attention_with_stats(
            q, k, v, implementation=implementation, **options
        )
        lse = jnp.where(jnp.isfinite(lse), lse, 0)
        return (output * random(*output.shape, seed=5)).sum() + (lse**2).sum(), output

    return run


def _data(name):
    mapped, shared, _, folds = CASES[name]
    keys = random(B, S, K, H, seed=1), random(B, S, K, D, seed=2)
    return random(M, B, T, N, H), (*keys, shared), mapped, folds


def _gradients(function):
    """``function`` with gradients of the queries and of all shared floats."""

    def run(q, shared, mapped):
        leaves, structure = jax.tree.flatten(shared)
        floats = [i for i, x in enumerate(leaves) if x.dtype == np.float32]

        def of_floats(q, *values):
            merged = [*leaves]
            for i, x in zip(floats, values, strict=True):
                merged[i] = x
            return function(q, jax.tree.unflatten(structure, merged), mapped)

        each = range(1 + len(floats))
        of = jax.value_and_grad(of_floats, tuple(each), has_aux=True)
        return of(q, *(leaves[i] for i in floats))

    return run


@functools.cache
def _looped(name):
    q, shared, mapped, _ = _data(name)
    each = jax.jit(_gradients(_run(name, "reference")))
    at = lambda i: None if mapped is None else mapped[i]
    found = [each(q[i], shared, at(i)) for i in range(M)]
    (_, values), gradients = jax.tree.map(lambda *x: np.stack(x), *found)
    return values, gradients[0], [x.sum(0) for x in gradients[1:]]


def _check(name, implementation):
    q, shared, mapped, folds = _data(name)
    run = _run(name, implementation)
    axes = (0, None, None if mapped is None else 0)

    def total(*data):
        found, output = jax.vmap(run, axes)(*data)
        return found.sum(), output

    def work(*data):
        each, _ = jax.vmap(jax.grad(run, has_aux=True), axes)(*data)
        return *_gradients(total)(*data), each

    (_, values), (of_q, *summed), each = jax.jit(work)(q, shared, mapped)
    close((values, of_q, summed), _looped(name))
    close(each, of_q)
    program = jax.make_jaxpr(work)(q, shared, mapped)
    assert set(_heads(program.jaxpr)) == {M * N if folds else N}


#: Cases that fold like another case; they are slow.
ALIKE = (
    "lengths",
    "dense",
    "mapped bias",
    "bias of pairs",
    "scale",
    "mapped dropout",
    "positions",
    "plain",
    "offset",
    "mapped offset",
    "mapped dense",
    "mapped lengths",
    "head of a mask",
    "anchors",
)
#: Folding does not depend on the implementation, so few cases run on both.
KEPT = [
    *itertools.product([name for name in CASES if name not in ALIKE], [NATIVE]),
    *itertools.product(["per head", "additive"], ["tiled"]),
]


@pytest.mark.parametrize(
    ("name", "implementation"), few(itertools.product(CASES, FAST), *KEPT)
)
def test_equals_a_loop(name, implementation):
    """Values and gradients equal those of a loop over examples.

    Gradients of the queries are taken inside and outside of ``vmap``.
    """
    if (name, implementation) == ("head of a modifier", "native"):
        pytest.skip("native knows no modifier of the user's")
    _check(name, implementation)


@pytest.mark.parametrize(
    "name",
    few(["causal", "mapped lengths", "alibi", "dropout"], "causal"),
)
def test_kernels_for_tpu_equal_a_loop(name, monkeypatch):
    interpreted.register(monkeypatch)
    _check(name, interpreted.NAME)


def test_a_fold_changes_nobodys_choice(monkeypatch):
    """Folding must not exceed the heads per key head that TPU kernels support."""
    interpreted.register(monkeypatch)
    module = sys.modules["attnlab._src.implementations.pallas_tpu"]
    monkeypatch.setattr(module, "MOST_MEMBERS", M)
    q, k = random(M, B, T, N, H), random(B, S, K, H, seed=1)

    def run(q, k, name):
        one = functools.partial(attention, implementation=name)
        return jax.vmap(one, (0, None, None))(q, k, k)

    for name, heads in ((interpreted.NAME, N), ("tiled", M * N)):
        program = jax.make_jaxpr(functools.partial(run, name=name))(q, k)
        assert {*_heads(program.jaxpr)} == {heads}


@pytest.mark.parametrize("implementation", few(FAST, NATIVE))
def test_nested(implementation):
    q = random(2, M, B, T, N, H)
    k, v = random(2, B, S, K, H, seed=1), random(2, B, S, K, D, seed=2)
    mask = masks.per_head(PER_HEAD)

    def call(q, k, v, implementation=implementation):
        return attention(q, k, v, mask=mask, implementation=implementation)

    each = jax.jit(functools.partial(call, implementation="reference"))
    shared = jax.vmap(call, (0, None, None))
    for axis, at in ((None, 0), (0, slice(None))):
        keys = k[at], v[at]
        found = jax.jit(jax.vmap(shared, (0, axis, axis)))(q, *keys)
        wanted = [
            [each(x, *(y if axis is None else y[i] for y in keys)) for x in q[i]]
            for i in range(2)
        ]
        close(found, np.stack([np.stack(row) for row in wanted]))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("implementation", [*FAST, "reference"])
def test_nothing_is_held_for_each_example(implementation, gradient):
    count, t, s, heads, size = 16, 4, 2048, 2, 32
    query = jax.ShapeDtypeStruct((count, 1, t, heads, size), np.float32)
    key = jax.ShapeDtypeStruct((1, s, heads, size), np.float32)

    def total(q, k, v):
        def one(q, k, v):
            return attention(q, k, v, implementation=implementation)

        return jax.vmap(one, (0, None, None))(q, k, v).sum()

    run = jax.grad(total, (0, 1, 2)) if gradient else total
    program = jax.jit(run).lower(query, key, key).compile()
    # Copies of keys or of values would take 8.4 MB each.
    assert program.memory_analysis().temp_size_in_bytes < 8e6
