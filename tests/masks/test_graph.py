"""Reach of masks, against a search for paths."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path

from attnlab import masks
from attnlab._src.bench.expression import read_mask
from attnlab._src.masks import graph
from attnlab._src.masks.graph import (
    LONGEST,
    adjacency,
    distances,
    reach,
    reach_through,
    spectral_gap,
)

LENGTH = 48
MASKS = {
    "window": masks.sliding_window(2, 2),
    "causal window": masks.sliding_window(3, 0),
    "anchors": masks.sliding_window(1, 1) | masks.anchor([5, 17]),
    "random": masks.random_blocks(0, 1, 4, 12),
    "apart": masks.chunked(16),
    "nothing": ~masks.full(),
    "full": masks.full(),
}


@pytest.mark.parametrize("name", MASKS)
def test_distances(name, monkeypatch):
    edges = np.asarray(MASKS[name].to_dense(LENGTH)).reshape(LENGTH, LENGTH)
    expected = shortest_path(csr_array(edges), unweighted=True)
    expected = np.where(np.isinf(expected), -1, expected)
    for sparse in (0, 1):
        monkeypatch.setattr(graph, "_SPARSE", sparse)
        found = distances(adjacency(MASKS[name], LENGTH))
        np.testing.assert_array_equal(found, expected)


def test_reach_of_a_causal_window():
    found = reach(masks.sliding_window(3, 0), 10)
    # The farthest position, nine back, is three steps of three away.
    assert found.layers == 3
    assert found.unreachable == 0.5
    counts = np.array([9 + 8 + 7, 6 + 5 + 4, 3 + 2 + 1])
    np.testing.assert_allclose(found.shares, np.cumsum(counts) / 45)
    assert found.mean_path == pytest.approx((counts * [1, 2, 3]).sum() / 45)


def test_heads_count_together_and_the_first_example_counts():
    heads = masks.per_head([masks.sliding_window(1, 0), masks.sliding_window(0, 1)])
    expected = np.asarray(masks.sliding_window(1, 1).to_dense(6))
    np.testing.assert_array_equal(adjacency(heads, 6), expected)
    lengths = masks.lengths(np.array([3, 6]))
    assert adjacency(lengths, 6).sum() == np.eye(6).sum() + 3 * 6 - 3


def test_spectral_gap():
    # A walk on the complete graph with loops is mixed after one step.
    assert spectral_gap(np.ones((6, 6), bool)) == pytest.approx(1)
    assert spectral_gap(np.eye(6, dtype=bool)) == 0
    # A ring with loops: eigenvalues (1 + 2 cos(2 pi k / n)) / 3.
    ring = np.eye(12, dtype=bool)
    ring |= np.roll(ring, 1, 1)
    assert spectral_gap(ring) == pytest.approx(1 - (1 + 2 * np.cos(np.pi / 6)) / 3)


def test_reach_through_different_layers():
    layers = [masks.sliding_window(1, 0), masks.sliding_window(0, 2)]
    seen = reach_through(layers, 8)
    t, s = np.indices((8, 8))
    np.testing.assert_array_equal(seen, (s - t >= -1) & (s - t <= 2))
    first, second = (np.asarray(m.to_dense(8)) for m in MASKS_OF_TWO)
    np.testing.assert_array_equal(reach_through(MASKS_OF_TWO, 8), second @ first)


#: Masks that do not commute: the order of the layers matters.
MASKS_OF_TWO = [
    masks.anchor([2], see_all=False) | masks.sliding_window(0, 0),
    masks.sliding_window(2, 0),
]


@pytest.mark.parametrize("length", [1, LONGEST + 1])
def test_lengths_that_are_refused(length):
    with pytest.raises(ValueError, match=r"length: expected 2 to 4,096, got"):
        reach(masks.full(), length)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full()", masks.full()),
        ("~causal()", ~masks.causal()),
        (
            "causal() & (sliding_window(left=2, right=None) | anchor([1, 3]))",
            masks.causal() & (masks.sliding_window(2, None) | masks.anchor([1, 3])),
        ),
        ("random_blocks(7, 2, 4, 4)", masks.random_blocks(7, 2, 4, 4)),
    ],
)
def test_expressions(text, expected):
    found = read_mask(text).to_dense(16)
    np.testing.assert_array_equal(found, expected.to_dense(16))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window(3)", "expected a call of anchor, .*got 'window"),
        ("masks.causal()", "expected a call of anchor"),
        ("causal() + full()", "expected a call of anchor"),
        ("causal", "expected a call of anchor"),
        ("anchor(open('x'))", "expected a number, a list or None"),
        ("sliding_window(-1, 0)", "left: expected at least 0"),
        ("sliding_window()", "missing 2 required"),
        ("causal(", "is no expression"),
        ("sliding_window(**{'left': 1})", "expected plain arguments, without"),
        ("anchor(1000000000000)", "expected less than"),
        ("random_blocks(1, 2, 4, 100000000000000000000)", "num_blocks"),
        ("", "is no expression"),
    ],
)
def test_expressions_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_mask(text)


@pytest.mark.parametrize(
    "mask",
    [
        masks.sliding_window(9, 9),
        masks.causal() & (masks.sliding_window(20, 0) | masks.prefix(3)),
        masks.longformer(window=5, anchors=2),
        masks.random_blocks(0, 2, 16, 32),
        masks.per_head([masks.causal(), masks.sliding_window(16, 0)]),
        masks.predicate(lambda t, s: (t - s) % 3 == 0),
    ],
    ids=repr,
)
def test_blocks_bound_the_number_of_layers(mask):
    """Up to 256 positions it is exact; beyond, blocks can only need fewer layers."""
    real = distances(adjacency(mask, 100)).max()
    assert graph.layers_at_least(mask, 100) == (real, True)
    least, known = graph.layers_at_least(mask, 300)
    assert not known
    assert 1 <= least <= distances(adjacency(mask, 300)).max()


def test_blocks_of_a_window_need_as_many_layers_as_its_positions():
    window = masks.sliding_window(8, 0)
    assert graph.layers_at_least(window, 512) == (64, False)
    assert distances(adjacency(window, 512)).max() == 64
