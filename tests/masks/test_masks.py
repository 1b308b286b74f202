"""Each mask against its definition, written as a loop over positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, masks

T, S = 11, 13


def table(rule, t=T, s=S):
    return np.array([[bool(rule(i, j)) for j in range(s)] for i in range(t)])


def dense(mask, t=T, s=S):
    return np.asarray(mask.to_dense(t, s))


STRUCTURAL = {
    "full()": (masks.full(), lambda t, s: True),
    "causal()": (masks.causal(), lambda t, s: s <= t),
    "sliding_window(2, 1)": (
        masks.sliding_window(2, 1),
        lambda t, s: -2 <= s - t <= 1,
    ),
    "sliding_window(None, 3)": (
        masks.sliding_window(None, 3),
        lambda t, s: s - t <= 3,
    ),
    "sliding_window(0, None)": (masks.sliding_window(0, None), lambda t, s: s >= t),
    "dilated_window(4, 5, 3)": (
        masks.dilated_window(4, 5, 3),
        lambda t, s: -4 <= s - t <= 5 and (s - t) % 3 == 0,
    ),
    "chunked(4)": (masks.chunked(4), lambda t, s: t // 4 == s // 4),
    "anchor([0:5], seen)": (masks.prefix(5), lambda t, s: s < 5),
    "(anchor([0:2], seen) | anchor([0:2], seeing))": (
        masks.anchor(2),
        lambda t, s: s < 2 or t < 2,
    ),
    "(anchor([1, 3:5], seen) | anchor([1, 3:5], seeing))": (
        masks.anchor([3, 1, 4, 3]),
        lambda t, s: s in {1, 3, 4} or t in {1, 3, 4},
    ),
    "anchor([3], seen)": (masks.anchor([3], see_all=False), lambda t, s: s == 3),
    "anchor([3], seeing)": (
        masks.anchor([3], visible_to_all=False),
        lambda t, s: t == 3,
    ),
    "~causal()": (~masks.causal(), lambda t, s: s > t),
    "(causal() & chunked(3))": (
        masks.causal() & masks.chunked(3),
        lambda t, s: s <= t and t // 3 == s // 3,
    ),
    "(causal() | ~chunked(3))": (
        masks.causal() | ~masks.chunked(3),
        lambda t, s: s <= t or t // 3 != s // 3,
    ),
    "(sliding_window(2, 2) | (anchor([0], seen) | anchor([0], seeing)))": (
        masks.longformer(window=2, anchors=1),
        lambda t, s: abs(s - t) <= 2 or s == 0 or t == 0,
    ),
    "(causal() & (sliding_window(2, 0) | anchor([0:3], seen)))": (
        masks.streaming(anchors=3, window=2),
        lambda t, s: s <= t and (t - s <= 2 or s < 3),
    ),
}


@pytest.mark.parametrize("text", STRUCTURAL)
def test_structural_masks_and_their_repr(text):
    mask, rule = STRUCTURAL[text]
    np.testing.assert_array_equal(dense(mask), table(rule))
    assert repr(mask) == text
    hash(mask)


def test_presets_without_anchors():
    np.testing.assert_array_equal(
        dense(masks.longformer(window=3)), table(lambda t, s: abs(s - t) <= 3)
    )
    np.testing.assert_array_equal(
        dense(masks.streaming(anchors=0, window=3)), table(lambda t, s: 0 <= t - s <= 3)
    )


def test_big_bird_is_the_union_of_its_parts():
    rng = jax.random.key(1)
    mask = masks.big_bird(
        window=1, anchors=2, random_blocks=2, rng=rng, block_size=3, num_blocks=5
    )
    drawn = dense(masks.random_blocks(rng, 2, 3, 5))[0, 0]
    rest = table(lambda t, s: abs(s - t) <= 1 or min(t, s) < 2)
    np.testing.assert_array_equal(dense(mask)[0, 0], drawn | rest)
    assert (drawn & ~rest).any()


def test_random_blocks_differ_by_rng_and_are_blocks():
    first, second = (
        dense(masks.random_blocks(seed, 2, 4, 4), 16, 16)[0, 0] for seed in (0, 1)
    )
    assert (first != second).any()
    coarse = first[::4, ::4]
    np.testing.assert_array_equal(first, np.kron(coarse, np.ones((4, 4), bool)))
    assert (coarse.sum(0) == 2).all()
    assert (coarse.sum(1) == 2).all()
    again = masks.random_blocks(jax.random.key(0), 2, 4, 4)
    np.testing.assert_array_equal(dense(again, 16, 16)[0, 0], first)


def test_blocks_of_each_head():
    layout = np.array([[[0, 2], [1, -1]], [[-1, -1], [0, 1]]])
    found = dense(masks.blocks(layout, 3), 6, 9)[0]
    for h, t, s in itertools.product(range(2), range(6), range(9)):
        assert found[h, t, s] == (s // 3 in layout[h, t // 3])


@pytest.mark.parametrize("entries", [3, 70])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (4, 1), (3, 5)])
@pytest.mark.parametrize("slots", [False, True])
def test_rectangular_blocks_in_any_order_and_twice(sizes, entries, slots):
    """Short lists are compared, long ones are sorted and searched."""
    of_queries, of_keys = sizes
    t, s = 2 * of_queries + 1, 3 * of_keys
    layout = np.random.default_rng(0).integers(-1, 3, (2, 1, 3, entries))
    make = masks.selected if slots else masks.blocks
    mask = make(layout, query_block=of_queries, key_block=of_keys)
    found, hidden = dense(mask, t, s), dense(~mask, t, s)
    rows = np.arange(t) // of_queries
    for s in range(3 * of_keys):
        wanted = (layout[:, :, rows] == s // of_keys).any(-1)
        np.testing.assert_array_equal(found[..., s], wanted)
        np.testing.assert_array_equal(hidden[..., s], ~wanted)


def test_selected_keys():
    layout = np.array([[3, 0, 3], [-1, 2, -1], [-1, -1, -1]])
    found = dense(masks.selected(layout), 3, 4)[0, 0]
    np.testing.assert_array_equal(found, [[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])


def test_anchor_indices_are_data():
    index = np.array([[2, -1], [7, 4]])
    found = dense(masks.anchor(index))[:, 0]
    for b, t, s in itertools.product(range(2), range(T), range(S)):
        assert found[b, t, s] == (t in index[b] or s in index[b])


def test_documents():
    rng = np.random.default_rng(0)
    query, key = rng.integers(-2, 3, (2, T)), rng.integers(-2, 3, (2, S))
    found = dense(masks.documents(query, key))[:, 0]
    for b, t, s in itertools.product(range(2), range(T), range(S)):
        assert found[b, t, s] == (query[b, t] == key[b, s] >= 0)
    alone = dense(masks.documents(query), T, T)[:, 0]
    np.testing.assert_array_equal(
        alone, (query[:, :, None] == query[:, None, :]) & (query >= 0)[:, :, None]
    )


def test_lengths():
    query, key = np.array([0, 5, T]), np.array([S, 3, 0])
    found = dense(masks.lengths(query=query, key=key))[:, 0]
    only_key = dense(masks.lengths(key=key))[:, 0]
    only_query = dense(masks.lengths(query=query))[:, 0]
    for b, t, s in itertools.product(range(3), range(T), range(S)):
        assert found[b, t, s] == (t < query[b] and s < key[b])
        assert np.broadcast_to(only_key, found.shape)[b, t, s] == (s < key[b])
        assert np.broadcast_to(only_query, found.shape)[b, t, s] == (t < query[b])


def test_dense_and_predicate():
    array = np.random.default_rng(0).random((2, 3, T, S)) < 0.5
    np.testing.assert_array_equal(dense(masks.dense(array)), array)
    reach = np.random.default_rng(0).integers(0, 9, (T, 1))
    mask = masks.predicate(lambda t, s, r: abs(t - s) < r, reach)
    np.testing.assert_array_equal(
        dense(mask)[0, 0], table(lambda t, s: abs(t - s) < reach[t, 0])
    )
    assert repr(masks.dense(array)) == "dense(bool[2,3,11,13])"


def test_per_head():
    mask = masks.per_head([masks.causal(), ~masks.full(), masks.prefix(3)])
    found = dense(mask)[0]
    np.testing.assert_array_equal(found[0], table(lambda t, s: s <= t))
    assert not found[1].any()
    np.testing.assert_array_equal(found[2], table(lambda t, s: s < 3))
    assert repr(mask).startswith("per_head(causal(), ~full(), ")


@pytest.mark.parametrize(
    "shape",
    [
        *[(T, S), (1025, 3)],
        *(pytest.param(x, marks=pytest.mark.slow) for x in [(1, 1), (600, 700)]),
    ],
)
def test_density_is_exact(shape):
    for mask in (
        masks.causal(),
        masks.sliding_window(5, 2) | masks.anchor([0, 2]),
        ~masks.chunked(7),
        masks.full(),
        masks.lengths(key=np.array([1, 3])),
    ):
        shown = jax.jit(lambda mask: mask.to_dense(*shape))(mask)
        wanted = np.asarray(shown).mean(dtype=np.float64)
        assert mask.density(*shape) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_density_of_a_long_window():
    assert masks.sliding_window(8, 8).density(2**15) == pytest.approx(
        (2**15 * 17 - 8 * 9) / 2**30, rel=1e-12
    )
    assert masks.causal().density(0) == 0


def test_truth_values_raise():
    one, two = masks.causal(), masks.full()
    for attempt in (
        lambda: one and two,
        lambda: one or two,
        lambda: not one,
        lambda: bool(one),
    ):
        with pytest.raises(TypeError, match="combine masks with '&', '|' and '~'"):
            attempt()


def test_boolean_arrays_join_the_algebra():
    array = np.random.default_rng(0).random((T, S)) < 0.5
    for mask in (masks.causal() & array, masks.causal() & jnp.asarray(array)):
        found = dense(mask)
        np.testing.assert_array_equal(
            found.reshape(T, S), array & table(lambda t, s: s <= t)
        )
    q, k = (np.ones((1, n, 1, 2), np.float32) for n in (T, S))
    given = attention(q, k, k, mask=array)
    np.testing.assert_array_equal(given, attention(q, k, k, mask=masks.dense(array)))


def test_masks_are_pytrees():
    ids = np.zeros((2, T), np.int32)
    mask = masks.causal() & masks.documents(ids)
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 1
    assert jax.tree.unflatten(structure, leaves).parts[0] == masks.causal()
    assert jax.tree.leaves(masks.streaming(anchors=2, window=3)) == []
