"""Masks as graphs: how many layers until each position depends on each other one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from attnlab._src.masks.base import Mask
from attnlab._src.picture import touched
from attnlab._src.types import Intervals

#: Greatest T; a layer is a product of [T, T] matrices, which takes long beyond it.
LONGEST = 4096
#: Blocks at most that stand for positions where a quick answer is wanted.
_BLOCKS = 256
#: Density below which packed rows of bits are joined along edges instead.
_SPARSE = 1 / 16


class Reach(NamedTuple):
    """How information spreads from position to position, layer by layer.

    A position keeps its own information, as layers have residuals. Pairs of positions
    that are never connected (from a later to an earlier one, under a causal mask) count
    in ``unreachable`` only.

    Attributes:
        shares: for 1, 2, ... layers, the share of connected pairs among all pairs of
            distinct positions that some number of layers connects; the last one is 1.
        mean_path: mean number of layers to connect such a pair; NaN if there is none.
        unreachable: share of pairs that no number of layers connects, among all pairs
            of distinct positions.
        gap: the spectral gap ``1 - lambda_2`` of a random walk on the graph with edges
            in both directions: 0 if it is not connected, near 1 for a good expander.
    """

    shares: tuple[float, ...]
    mean_path: float
    unreachable: float
    gap: float

    @property
    def layers(self) -> int:
        """Number of layers until all pairs that can be connected are."""
        return len(self.shares)


def visible_share(mask: Mask, length: int) -> np.ndarray:
    """``[T, T]``: share of the heads that see each pair, in the first example."""
    dense = np.asarray(mask.to_dense(length), np.float32)
    return dense if dense.ndim == 2 else dense[0].mean(0)


def adjacency(mask: Mask, length: int) -> np.ndarray:
    """``[T, T]`` boolean: which position attends to which, always to itself.

    Args:
        mask: a pair counts if any head sees it; only the first example is used.
        length: T.

    Raises:
        ValueError: if the length is less than 2 or beyond ``LONGEST``.
    """
    if not 2 <= length <= LONGEST:
        raise ValueError(f"length: expected 2 to {LONGEST:,}, got {length:,}")
    return (visible_share(mask, length) > 0) | np.eye(length, dtype=bool)


def distances(edges: np.ndarray) -> np.ndarray:
    """``[T, T]`` int32: layers until a position depends on another; 0 itself, -1 never.

    Args:
        edges: result of :func:`adjacency`.
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
    # Counts of up to T paths are exact in float32.
    step = edges.astype(np.float32)
    return lambda known: step @ known.astype(np.float32) > 0


def _join_bits(edges: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    first, seen = np.nonzero(edges)
    # No row is empty, as each position attends to itself.
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
        length: T; the work of a layer is O(T^3), or O(T) per edge for sparse masks.

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


def layers_at_least(mask: Mask, length: int) -> tuple[int, bool]:
    """Number of layers to full reach, exactly or as a bound, in little time.

    Up to 256 positions it is exact. Beyond, at most 256 blocks stand for them; a block
    sees another one if some pair of theirs may be visible, so that more layers may be
    needed.

    Args:
        mask: see :func:`adjacency`; its arrays are known.
        length: T.

    Returns:
        The number, and whether it is exact.
    """
    if length <= _BLOCKS:
        found = distances(adjacency(mask, length))
        return max(int(found.max()), 0), True
    size = -(-length // _BLOCKS)
    count = -(-length // size)
    plan = mask.plan(length, block_size=size)
    edges = np.eye(count, dtype=bool)
    for part in plan.rows:
        for head in np.ndindex(1, part.lo.shape[1]):
            one = Intervals(*(x[head][None, None] for x in part))
            edges |= touched(one, count, count)
    return max(int(distances(edges).max()), 1), False


def summary(edges: np.ndarray, found: np.ndarray) -> Reach:
    """Statistics of results of :func:`adjacency` and :func:`distances`."""
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
    """``[T, T]`` boolean: which output depends on which input after several layers.

    Args:
        layers: masks of the layers, the lowest first.
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
