"""The kernel that chooses an indexer's keys, held to the definition in XLA."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import masks, select
from attnlab._src.implementations.native import load
from attnlab._src.implementations.native.choosing import Choice
from attnlab._src.masks.base import as_mask
from attnlab._src.masks.planning import normalise_tree
from attnlab._src.ops.selection.best_keys import best_keys, by_xla
from attnlab._src.pytrees import skeleton

pytestmark = pytest.mark.skipif(load.why_not() is not None, reason="no library")

B, T, S, J, H, COUNT = 2, 37, 300, 3, 5, 40


def drawn(dtype: Any = jnp.float32, *, whole=False, seed=0) -> tuple[jax.Array, ...]:
    """Queries, keys and weights; ``whole``: small integers, so that many are equal."""
    rng = np.random.default_rng(seed)
    draw = functools.partial(rng.integers, -1, 2) if whole else rng.standard_normal
    shapes = (B, T, J, H), (B, S, H), (B, T, J)
    return tuple(jnp.asarray(draw(size=x), dtype) for x in shapes)


def choice(arrays, mask=None, rows=None, places=None):
    mask = as_mask(mask)
    operands = normalise_tree(mask.operands(T, S), (B,), "mask")
    rows = S - T + np.arange(T)[None] if rows is None else rows
    places = np.arange(S)[None] if places is None else places
    rows, places = (jnp.asarray(x, jnp.int32) for x in (rows, places))
    query, key, weights = arrays
    return Choice(query, key, weights, rows, places, skeleton(mask), operands)


RUN = jax.jit(functools.partial(best_keys, count=COUNT, most=2**24))
DEFINITION = jax.jit(functools.partial(by_xla, count=COUNT, most=2**24))


def expect_equal(given):
    assert "attnlab_choose" in RUN.lower(given).as_text()
    for isa in load.load().isas:
        with load.instructions(isa):
            np.testing.assert_array_equal(RUN(given), DEFINITION(given), isa)


RNG = np.random.default_rng(0)
MASKS = {
    "all": None,
    "causal": masks.causal(),
    "documents": masks.causal()
    & masks.documents(np.arange(T) // 20, np.arange(S) // 150),
    "few": masks.sliding_window(9, 0) | masks.prefix(3),
    "dense": RNG.random((B, 1, T, S)) < 0.2,
    "none": masks.causal() & ~masks.causal(),
}


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_definition(name):
    expect_equal(choice(drawn(), MASKS[name]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types(dtype):
    expect_equal(choice(drawn(dtype), masks.causal()))


def test_the_first_of_equal_keys_is_taken():
    expect_equal(choice(drawn(whole=True), masks.causal()))


def test_later_keys_score_better_or_worse():
    """The list of a query is cut most often, or only once."""
    _, _, weights = drawn()
    query = jnp.ones((B, T, J, H))
    key = jnp.linspace(0, 1, S)[None, :, None] * jnp.array([1.0, -1.0])[:, None, None]
    expect_equal(choice((query, jnp.broadcast_to(key, (B, S, H)), abs(weights))))


def test_numbers_that_are_not_finite():
    query, key, weights = drawn()
    key = key.at[0, ::7, 3].set(jnp.nan).at[0, 5].set(jnp.inf).at[1, 6].set(-jnp.inf)
    weights = weights.at[0, 3].set(jnp.nan)
    given = choice((query, key, weights), masks.causal())
    expect_equal(given)
    found = RUN(given)
    assert (found[0, 3] == -1).all()
    assert not jnp.isin(found[0], jnp.arange(0, S, 7)).any()


def test_empty_slots():
    rows, places = np.arange(T)[None] + S - T, np.arange(S)[None]
    rows, places = np.where(rows % 9, rows, -1), np.where(places % 3, places, -1)
    given = choice(drawn(), masks.causal(), rows, places)
    expect_equal(given)
    assert (RUN(given)[:, rows[0] < 0] == -1).all()


@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, None, 0), (0, None, 1)])
def test_mapped_axes(mapped):
    several = [
        x if axis is None else jnp.stack([x, -x, 2 * x], axis)
        for x, axis in zip(drawn(), mapped, strict=True)
    ]
    call = functools.partial(select.top_keys, count=9, mask=masks.causal())
    found = jax.jit(jax.vmap(call, mapped))(*several)
    for i in range(3):
        one = (
            x if axis is None else jnp.take(x, i, axis)
            for x, axis in zip(several, mapped, strict=True)
        )
        np.testing.assert_array_equal(found[i], call(*one))


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        (jnp.float32, masks.per_head([masks.causal(), masks.full()])),
        (jnp.float32, RNG.random((B, 2, T, S)) < 0.2),
        (jnp.float32, masks.predicate(lambda q, k: (q + k) % 3 > 0)),
    ],
)
def test_what_it_does_not_know_is_left_to_xla(dtype, mask):
    given = choice(drawn(dtype), mask)
    assert "attnlab_choose" not in RUN.lower(given).as_text()
    np.testing.assert_array_equal(RUN(given), DEFINITION(given))


def test_no_gradient_flows_through_it():
    def total(query, key, weights):
        chosen = select.top_keys(query, key, weights, COUNT)
        return chosen.astype(jnp.float32).sum()

    assert not any(jnp.any(x) for x in jax.grad(total, (0, 1, 2))(*drawn()))


def test_several_devices():
    """A device's share is given to the kernel; what XLA divides is not."""
    mesh = jax.make_mesh((2,), ("batch",), (jax.sharding.AxisType.Auto,))
    by_batch = jax.P("batch")
    call = functools.partial(select.top_keys, count=9, mask=masks.causal())
    apart = jax.shard_map(call, mesh=mesh, in_specs=by_batch, out_specs=by_batch)
    placed = jax.device_put(drawn(), jax.NamedSharding(mesh, by_batch))
    wanted = call(*drawn())
    for run, by_kernel in ((jax.jit(apart), True), (jax.jit(call), False)):
        text = run.lower(*placed).as_text()
        assert ("attnlab_choose" in text) == by_kernel
        np.testing.assert_array_equal(run(*placed), wanted)


def test_other_platforms():
    call = jax.jit(functools.partial(select.top_keys, count=9, mask=masks.causal()))
    lowered = call.trace(*drawn()).lower(lowering_platforms=("tpu",))
    assert "attnlab_choose" not in lowered.as_text()
    exported = jax.export.export(call)(*drawn())
    np.testing.assert_array_equal(exported.call(*drawn()), call(*drawn()))
