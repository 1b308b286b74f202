"""Choosing blocks and keys: against dense choices in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnlab import attention, masks, modifiers, scores, select
from attnlab._src.ops.selection import blocks as of_blocks
from attnlab._src.ops.selection import indexing as of_indexers
from attnlab._src.ops.selection import keys as of_keys


def greatest(values, count):
    """The choice, list by list: of equal values the first; ascending; -1 = none."""
    found = np.full((*values.shape[:-1], count), -1)
    for row in np.ndindex(values.shape[:-1]):
        known = [j for j, x in enumerate(values[row]) if x > -np.inf]
        best = sorted(known, key=lambda j, row=row: (-values[row][j], j))[:count]
        found[row][count - len(best) :] = sorted(best)
    return found


def wanted_blocks(logits, shown, count, sizes, at, heads, by, first, local):
    """The choice, of logits ``[B, N, T, blocks]`` and pairs ``[T, S]``."""
    of_queries, of_keys = sizes
    batch, _, t, blocks = logits.shape
    shown = np.pad(shown, [(0, 0), (0, blocks * of_keys - shown.shape[1])])
    rows = -(-t // of_queries)
    values = np.full((batch, heads, rows, blocks), -np.inf)
    for i in range(rows):
        here = slice(i * of_queries, min((i + 1) * of_queries, t))
        pairs = shown[here].reshape(-1, blocks, of_keys)
        some, whole = pairs.any((0, 2)), pairs.all((0, 2))
        x = logits[:, :, here].astype(np.float64)
        if by == "weights":
            x = np.exp(np.where(whole, x, -np.inf))
            x /= np.maximum(x.sum(-1, keepdims=True), 1e-30)
        x = x.sum(2).reshape(batch, heads, -1, blocks).sum(2)
        x[..., :first] = np.inf
        if local:
            own = (at + np.arange(t))[here] // of_keys
            x[..., max(own.min() - local + 1, 0) : own.max() + 1] = np.inf
        values[:, :, i] = np.where(some, x, -np.inf)
    return greatest(values, count)


@pytest.mark.parametrize("at_once", [2**24, 2])
@pytest.mark.parametrize(
    ("sizes", "mask", "by", "each", "taken", "score"),
    [
        ((1, 4), masks.causal(), "mean", True, (0, 1), None),
        ((4, 4), masks.causal(), "weights", False, (1, 2), None),
        ((5, 2), masks.causal() & masks.sliding_window(9, 0), "mean", False, (0, 0), 0),
        ((1, 3), masks.full(), "weights", True, (2, 0), 0),
    ],
)
def test_blocks_equal_a_dense_choice(
    sizes, mask, by, each, taken, score, at_once, monkeypatch
):
    monkeypatch.setattr(of_blocks, "MOST_LOGITS", at_once)
    rng, (t, at, n, k) = np.random.default_rng(0), (17, 8, 4, 2)
    blocks = -(-(t + at) // sizes[1])
    query = jnp.asarray(rng.normal(size=(2, t, n, 8)), jnp.float32)
    key = jnp.asarray(rng.normal(size=(2, blocks, k, 8)), jnp.float32)
    if score is not None:
        score = scores.additive.init(jax.random.key(score), 8, hidden_size=5)
    options: dict[str, Any] = dict(
        zip(("query_block", "key_block"), sizes, strict=True),
        score=score,
        mask=mask,
        by=by,
        each_head=each,
        first=taken[0],
        local=taken[1],
        key_length=t + at,
        query_offset=at,
    )
    found = select.top_blocks(query, key, 5, **options)
    repeated = jnp.repeat(key, n // k, 2)
    if score is None:
        logits = np.einsum("btnh,bsnh->bnts", query, repeated) / np.sqrt(8)
    else:
        params = jax.tree.map(lambda x: x[0], score.pair_params())
        compare = jax.vmap(score.compare, (None, 1, 1))
        compare = jax.vmap(compare, (None, 0, 0))
        logits = compare(
            params, score.project_query(query), score.project_key(repeated)
        )
    shown = np.asarray(mask.to_dense(t + at))[at:]
    heads = n if each else k
    wanted = wanted_blocks(np.asarray(logits), shown, 5, sizes, at, heads, by, *taken)
    np.testing.assert_array_equal(found, wanted)
    places = np.broadcast_to(at + np.arange(t), (2, t))
    given: dict[str, Any] = {**options, "query_offset": 0, "query_positions": places}
    if sizes[0] == 1:  # lists of single queries do not depend on how they are told
        found = select.top_blocks(query, key, 5, **given)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("at_once", [2**24, 300])
@pytest.mark.parametrize("placed", [False, True])
def test_keys_equal_a_dense_choice(at_once, placed, monkeypatch):
    monkeypatch.setattr(of_keys, "MOST_LOGITS", at_once)
    rng, (t, s, j) = np.random.default_rng(0), (13, 19, 3)
    query, key = rng.normal(size=(2, t, j, 4)), rng.normal(size=(2, s, 4))
    key[:, 5] = key[:, 4]  # equal keys: the first one is taken
    weights = rng.normal(size=(2, t, j))
    query, key, weights = (jnp.asarray(x, jnp.float32) for x in (query, key, weights))
    places = np.broadcast_to(np.arange(s), (2, s))
    if placed:
        places = rng.permuted(np.tile(np.arange(s), (2, 1)), axis=1)
    found = select.top_keys(
        query,
        key,
        weights,
        6,
        mask=masks.causal(),
        query_offset=2,
        key_positions=places if placed else None,
    )
    logits = np.maximum(np.einsum("btjh,bsh->btjs", query, key), 0)
    logits = (logits * weights[..., None]).sum(2)
    shown = places[:, None] <= 2 + np.arange(t)[:, None]
    wanted = greatest(np.where(shown, logits, -np.inf), 6)
    if placed:
        held = np.take_along_axis(places[:, None], np.maximum(wanted, 0), -1)
        wanted = np.sort(np.where(wanted < 0, -1, held), -1)
    np.testing.assert_array_equal(found[:, 0], wanted)


@pytest.mark.parametrize("at_once", [2**24, 300])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_the_loss_of_an_indexer(listed, placed, at_once, monkeypatch):
    """DeepSeek-V3.2-Exp, equations 3 and 4, in NumPy."""
    monkeypatch.setattr(of_indexers, "MOST_LOGITS", at_once)
    rng, (t, s, at, n, k) = np.random.default_rng(0), (7, 12, 4, 4, 2)
    made = [
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((2, t, 3, 5), (2, s, 5), (2, t, 3), (2, t, n, 8), (2, s, k, 8))
    ]
    indexer: Any = tuple(made[:3])
    query, key = made[3:]
    places = np.stack([rng.permutation(s) for _ in range(2)]) if placed else None
    held = np.tile(np.arange(s), (2, 1)) if places is None else places
    where = {"query_offset": at, "key_positions": places}
    mask = masks.causal() & masks.sliding_window(6, 0)
    options = {"sinks": jnp.ones(n), "modifiers": (modifiers.soft_cap(2.0),)}
    chosen = select.top_keys(*indexer, count=4, mask=mask, **where) if listed else None

    def loss(indexer, query, key):
        return select.index_loss(
            indexer, query, key, chosen=chosen, mask=mask, **where, **options
        )

    wanted = np.zeros((2, t))
    small, index, weights, wide, keys = (np.asarray(x, np.float64) for x in made)
    for b, i in np.ndindex(2, t):
        there = (held[b] <= i + at) & (held[b] >= i + at - 6)
        if chosen is not None:
            there &= np.isin(held[b], np.asarray(chosen[b, 0, i]))
        logits = np.einsum("nh,snh->ns", wide[b, i], keys[b].repeat(n // k, 1))
        seen = np.exp(2 * np.tanh(logits / np.sqrt(8) / 2))[:, there]
        share = (seen / (seen.sum(1, keepdims=True) + np.e)).sum(0)
        share /= share.sum()
        scores = (np.maximum(small[b, i] @ index[b].T, 0).T @ weights[b, i])[there]
        share_own = np.exp(scores) / np.exp(scores).sum()
        wanted[b, i] = (share * np.log(share / share_own)).sum()
    found = loss(indexer, query, key)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)

    total = lambda *args: loss(*args).sum()
    own, *others = jax.grad(total, (0, 1, 2))(indexer, query, key)
    assert not any(np.asarray(x).any() for x in others)
    for i, gradient in enumerate(own):
        step = jnp.asarray(rng.normal(size=gradient.shape), jnp.float32)
        moved = [
            total(tuple(x + d * step if i == j else x for j, x in enumerate(indexer)),
                  query, key)
            for d in (1e-3, -1e-3)  # small: a ReLU bends
        ]  # fmt: skip
        slope = (moved[0] - moved[1]) / 2e-3
        np.testing.assert_allclose((gradient * step).sum(), slope, rtol=1e-2, atol=1e-2)


def test_an_indexer_of_queries_that_see_nothing_has_no_loss():
    rng = np.random.default_rng(0)
    indexer: Any = tuple(
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((3, 2, 4), (3, 4), (3, 2))
    )
    x = jnp.asarray(rng.normal(size=(3, 1, 4)), jnp.float32)
    mask = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    chosen = select.top_keys(*indexer, count=2, mask=mask)
    for lists in (None, chosen):
        total = lambda i, lists=lists: select.index_loss(
            i, x, x, chosen=lists, mask=mask
        )
        found, back = jax.vjp(total, indexer)
        (gradient,) = back(jnp.ones(3))
        assert found[1] == 0
        assert found[0] > 0
        assert all(np.isfinite(g).all() for g in gradient)
        assert not gradient[0][1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(chosen=np.zeros((1, 6, 2), int)),
            r"chosen: .* \(1, 1, 6\) .* got",
        ),
        (dict(chosen=np.zeros((1, 1, 6, 0), int)), r"chosen: .* at least 1, got"),
        (dict(indexer=(1, 2)), r"indexer: expected queries, keys and weights, got 2"),
        (
            dict(indexer=[jnp.ones((1, 6, 0, 4)), jnp.ones((1, 6, 4)), jnp.ones(0)]),
            r"query: expected at least one head of the indexer, got shape",
        ),
        (dict(query=jnp.ones((1, 5, 2, 4))), r"indexer: expected queries for \(1, 5\)"),
        (dict(modifiers=3), r"modifiers: expected a sequence, got 3"),
    ],
)
def test_errors_of_the_loss_name_the_argument(options, message):
    x = jnp.ones((1, 6, 2, 4))
    given = dict(indexer=(x, jnp.ones((1, 6, 4)), jnp.ones((1, 6, 2))), query=x, key=x)
    with pytest.raises((TypeError, ValueError), match=message):
        select.index_loss(**(given | options))


def test_the_loss_has_no_forward_mode():
    x, one = jnp.ones((1, 6, 2, 4)), jnp.ones((1, 6, 2))
    loss = lambda w: select.index_loss((x, jnp.ones((1, 6, 4)), w), x, x).sum()
    message = r"forward mode .* of select\.index_loss"
    with pytest.raises(NotImplementedError, match=message):
        jax.jvp(loss, (one,), (one,))


def test_pools_of_lengths_that_explicit_axes_divide():
    mesh = jax.make_mesh((4,), ("length",), axis_types=(AxisType.Explicit,))
    x = jnp.arange(2 * 24 * 3.0).reshape(2, 24, 1, 3)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "length")))
        found = jax.jit(select.pool, static_argnums=1)(placed, 4)
    np.testing.assert_allclose(found, select.pool(x, 4))


def test_equal_blocks_too_few_blocks_and_what_is_no_number():
    query, key = jnp.ones((4, 1, 2)), jnp.ones((4, 1, 2))
    choose = lambda key, **options: np.asarray(
        select.top_blocks(query, key, 2, key_block=1, **options)
    )[0]
    np.testing.assert_array_equal(choose(key, local=0), [[0, 1]] * 4)
    found = choose(key, mask=masks.causal(), local=0)
    np.testing.assert_array_equal(found, [[-1, 0], [0, 1], [0, 1], [0, 1]])
    broken = key.at[0].set(jnp.nan)
    np.testing.assert_array_equal(choose(broken, local=0), [[1, 2]] * 4)
    assert select.top_blocks(query, key, 9, key_block=1).shape == (1, 4, 9)


@pytest.mark.parametrize("how", ["mean", "max", "learned"])
def test_pools(how):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 2, 3)).astype(np.float32)
    weights = rng.normal(size=(4, 2, 3)).astype(np.float32)
    there = rng.random((2, 7)) < 0.7
    there[0, 4:] = False
    given = jnp.asarray(weights) if how == "learned" else how
    found = select.pool(jnp.asarray(x), 4, how=given, where=jnp.asarray(there))
    for b in range(2):
        for i, rows in enumerate((slice(0, 4), slice(4, 7))):
            kept, known = there[b, rows], x[b, rows]
            if how == "learned":
                wanted = (known * kept[:, None, None] * weights[: len(kept)]).sum(0)
            elif not kept.any():
                wanted = np.zeros((2, 3))
            else:
                wanted = getattr(known[kept], how)(0)
            np.testing.assert_allclose(found[b, i], wanted, rtol=1e-5, atol=1e-6)


def test_the_choice_has_no_gradient_and_no_recompilation():
    traces = []

    @jax.jit
    def loss(x):
        traces.append(x)
        key = select.pool(x, 4)
        chosen = select.top_blocks(x, key, 2, key_block=4, mask=masks.causal())
        mask = masks.causal() & masks.selected(chosen, key_block=4)
        return attention(x, x, x, mask=mask).sum()

    rng = np.random.default_rng(0)
    for _ in range(2):
        x = jnp.asarray(rng.normal(size=(1, 16, 2, 8)), jnp.float32)
        assert np.isfinite(jax.grad(loss)(x)).all()
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(count=0), r"count: expected .* got 0"),
        (dict(query_block=4, count=1), r"count: expected at least 2, .* got 1"),
        (dict(key_length=9), r"key_length: expected what makes 4 blocks of 2 .* 9"),
        (dict(by="max"), r"by: expected 'mean' or 'weights', got 'max'"),
        (dict(key=jnp.ones((1, 4, 3, 2))), r"key: expected the batch axes \(1,\)"),
    ],
)
def test_errors_name_the_argument(options, message):
    given = dict(key=jnp.ones((1, 4, 2, 2)), count=2, key_block=2, **{})
    given |= options
    with pytest.raises(ValueError, match=message):
        select.top_blocks(jnp.ones((1, 8, 4, 2)), given.pop("key"), **given)


def test_numbers_are_checked_only_where_they_are_of_slots():
    """A layout may be longer than the queries, and positions than the keys."""
    x, layout = jnp.ones((1, 8, 2, 4)), np.array([[0], [1], [3]])
    attention(x, x, x, mask=masks.blocks(layout, 4))
    places = dict(query_positions=np.arange(8) + 4, key_positions=np.arange(8) + 4)
    attention(x, x, x, mask=masks.blocks(layout[1:], 4), **places)
    with pytest.raises(ValueError, match=r"numbers of 2 blocks of 4 keys .* got 3"):
        attention(x, x, x, mask=masks.blocks(layout[1:], 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.selected(np.zeros((2, 8, 3), int)), r"lists blocks for 2 heads"),
        (lambda: masks.selected(np.zeros((7, 3), int)), r"7 blocks of 1 .*T=8; .* 8"),
        (lambda: masks.selected(np.full((8, 1), 8)), r"8 blocks of 1 keys .* got 8"),
        (lambda: masks.blocks(np.full((2, 1), -2), 4), r"or -1 for none, got -2"),
    ],
)
def test_lists_that_do_not_fit(make, message):
    x = jnp.ones((1, 8, 3, 4))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, mask=make())
