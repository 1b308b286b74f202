"""A mask as a graph: how many layers carry a word from anywhere to anywhere?"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from attnlab._src.masks.base import Mask

#: A layer is a product of [T, T] matrices: beyond it they take long.
LONGEST = 4096
#: Density below which rows of bits are joined along edges instead.
_SPARSE = 1 / 16


class Reach(NamedTuple):
    """How far a word travels, layer by layer.

    A position keeps its own word: layers have residuals. What can never be connected
    (a later word to an earlier one, under a causal mask) is in ``unreachable`` alone.

    Attributes:
        shares: after 1, 2, ... layers, which share of the pairs of distinct positions
            that any number of layers connects is connected; the last one is 1.
        mean_path: layers that connect such a pair, on average; NaN where there is none.
        unreachable: share of all pairs of distinct positions that no number of layers
            connects.
        gap: the spectral gap ``1 - lambda_2`` of a random walk on the graph with edges
            in both directions: 0 where it falls apart, near 1 for a good expander.
    """

    shares: tuple[float, ...]
    mean_path: float
    unreachable: float
    gap: float

    @property
    def layers(self) -> int:
        """To full reach."""
        return len(self.shares)


def visible_share(mask: Mask, length: int) -> np.ndarray:
    """``[T, T]``: how many heads of the first example see a pair, as a share."""
    dense = np.asarray(mask.to_dense(length), np.float32)
    return dense if dense.ndim == 2 else dense[0].mean(0)


def adjacency(mask: Mask, length: int) -> np.ndarray:
    """``[T, T]`` boolean: which position sees which, itself always.

    Args:
        mask: heads count together; of several examples, the first one's.
        length: T.

    Raises:
        ValueError: if the length is less than 2 or beyond ``LONGEST``.
    """
    if not 2 <= length <= LONGEST:
        raise ValueError(f"length: expected 2 to {LONGEST:,}, got {length:,}")
    return (visible_share(mask, length) > 0) | np.eye(length, dtype=bool)


def distances(edges: np.ndarray) -> np.ndarray:
    """``[T, T]`` int32: layers until a position knows another; 0 itself, -1 never.

    Args:
        edges: of :func:`adjacency`.
    """
    found = np.where(edges, 1, -1).astype(np.int32)
    np.fill_diagonal(found, 0)
    join = _join_bits(edges) if edges.mean() < _SPARSE else _join_counts(edges)
    known, layer = edges, 1
    while True:
        layer += 1
        following = join(known)
        new = following & ~known
        if not new.any():
            return found
        found[new], known = layer, following


def _join_counts(edges: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    # Counts of at most T paths are exact in float32.
    step = edges.astype(np.float32)
    return lambda known: step @ known.astype(np.float32) > 0


def _join_bits(edges: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    first, seen = np.nonzero(edges)
    # Each position sees itself, so that no row is empty.
    starts = np.searchsorted(first, np.arange(len(edges)))

    def join(known: np.ndarray) -> np.ndarray:
        bits = np.packbits(known, axis=1)
        joined = np.bitwise_or.reduceat(bits[seen], starts, axis=0)
        return np.unpackbits(joined, axis=1, count=len(edges)).astype(bool)

    return join


def reach(mask: Mask, length: int) -> Reach:
    """How information spreads through layers that share one mask.

    Args:
        mask: see :func:`adjacency`.
        length: T; the work of a layer is O(T^3), or O(T) an edge where few are.

    Raises:
        ValueError: see :func:`adjacency`.

    Example:
        >>> from attnlab import masks
        >>> window = reach(masks.sliding_window(1, 1), 9)
        >>> window.layers, window.unreachable
        (8, 0.0)
        >>> reach(masks.sliding_window(1, 1) | masks.anchor(1), 9).layers
        2

    References:
        Zaheer et al., "Big Bird", 2020, section 2 (average path length; the spectral
        gap as the speed at which information spreads).
    """
    edges = adjacency(mask, length)
    return summary(edges, distances(edges))


def summary(edges: np.ndarray, found: np.ndarray) -> Reach:
    """The numbers of what :func:`adjacency` and :func:`distances` found."""
    apart = ~np.eye(len(found), dtype=bool)
    counts = np.bincount(found[apart & (found > 0)])[1:]
    connected = int(counts.sum())
    shares = np.cumsum(counts) / max(connected, 1)
    layers = np.arange(1, len(counts) + 1)
    return Reach(
        tuple(shares.tolist()),
        float((counts * layers).sum() / connected) if connected else float("nan"),
        float((found < 0).sum() / apart.sum()),
        spectral_gap(edges),
    )


def spectral_gap(edges: np.ndarray) -> float:
    """``1 - lambda_2`` of the random walk over edges in both directions."""
    both = (edges | edges.T).astype(np.float64)
    root = 1 / np.sqrt(both.sum(1))
    values = np.linalg.eigvalsh(root[:, None] * both * root)
    return float(max(1 - values[-2], 0.0))


def reach_through(layers: Sequence[Mask], length: int) -> np.ndarray:
    """``[T, T]`` boolean: what each output may know of each input, layer on layer.

    Args:
        layers: their masks, the lowest first.
        length: T.

    Example:
        >>> from attnlab import masks
        >>> window = masks.sliding_window(1, 0)
        >>> print(reach_through([window, window], 4).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [1 1 1 0]
         [0 1 1 1]]
    """
    known = np.eye(length, dtype=bool)
    for mask in layers:
        step = adjacency(mask, length).astype(np.float32)
        known = step @ known.astype(np.float32) > 0
    return known
