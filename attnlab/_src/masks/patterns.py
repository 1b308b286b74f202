"""Anchors, and sparse patterns named after their papers."""

from collections.abc import Sequence

import jax
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks import layouts
from attnlab._src.masks.base import Full, Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import namespace, plus
from attnlab._src.masks.rule import Bounds
from attnlab._src.masks.structural import Anchor, nothing, size_argument, sliding_window
from attnlab._src.types import Array, ArrayLike, Operand, PyTree, Tile, pytree, static


@pytree
class AnchorIndices(Mask):
    """``Anchor`` with positions that are data: ``[*batch, A]``, negative = none."""

    indices: ArrayLike
    side: str = static()

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return Operand(self.indices[..., None, None, None, :], payload=1)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        own = tile.query_positions if self.side == "query" else tile.key_positions
        return (own[..., None] == operands).any(-1)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        xp = namespace(operands)
        index = operands[:, :, :, 0, :]
        if rows.side == self.side:
            inside = (rows.rows_lo <= index) & (index <= rows.rows_hi) & (index >= 0)
            only = (rows.rows_lo == rows.rows_hi) & inside
            return cols.every(inside.any(-1)), cols.every_complete(only.any(-1))
        shape = index.shape[:2] + (rows.count, index.shape[-1])
        lo = xp.broadcast_to(index, shape)
        hi = xp.where(lo < 0, lo, plus(lo, 1))
        return cols.touched(lo, hi), nothing(lo)

    def __repr__(self) -> str:
        whom = "seen" if self.side == "key" else "seeing"
        return f"anchor({arguments.describe(self.indices)}, {whom})"


def anchor(
    positions: int | Sequence[int] | ArrayLike,
    *,
    visible_to_all: bool = True,
    see_all: bool = True,
) -> Mask:
    """Anchor (global) positions: every query sees them, and they see every key.

    Args:
        positions: a count n (the first n positions), a sequence of ints (static
            structure), or an index array ``[*batch, A]`` (data; negative = none).
        visible_to_all: whether every query sees the anchors.
        see_all: whether the anchors, as queries, see every key.

    Raises:
        ValueError: if a static position is negative, or neither direction is wanted.

    Example:
        >>> print(anchor([1]).to_dense(3).astype(int))
        [[0 1 0]
         [1 1 1]
         [0 1 0]]
        >>> print(anchor([1], see_all=False).to_dense(3).astype(int))
        [[0 1 0]
         [0 1 0]
         [0 1 0]]

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1 (global attention).
    """
    sides = [s for s, on in (("key", visible_to_all), ("query", see_all)) if on]
    if not sides:
        raise ValueError(
            "anchor: visible_to_all and see_all are both False; set one to True"
        )
    masks: list[Mask]
    if isinstance(positions, (jax.Array, np.ndarray)) and positions.ndim > 0:
        indices = arguments.integers("positions", positions)
        masks = [AnchorIndices(indices, side) for side in sides]
    else:
        runs = _runs(positions)
        masks = [Anchor(runs, side) for side in sides]
    return masks[0] if len(masks) == 1 else masks[0] | masks[1]


def _runs(positions: int | Sequence[int] | ArrayLike) -> tuple[tuple[int, int], ...]:
    if not isinstance(positions, Sequence):
        count = size_argument("positions", positions, 0)
        return ((0, count),) if count else ()
    array = "; give the greatest position in an index array, np.array([...])"
    chosen = sorted({size_argument("positions", p, 0, array) for p in positions})
    result: list[tuple[int, int]] = []
    for p in chosen:
        if result and result[-1][1] == p:
            result[-1] = (result[-1][0], p + 1)
        else:
            result.append((p, p + 1))
    return tuple(result)


def longformer(*, window: int, anchors: int | Sequence[int] | ArrayLike = 0) -> Mask:
    """A symmetric sliding window and anchors.

    Args:
        window: how many positions each side of its own a query sees.
        anchors: as for :func:`anchor`.

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1.
    """
    window = size_argument("window", window, 0)
    mask = sliding_window(window, window)
    none = isinstance(anchors, int) and anchors == 0
    return mask if none else mask | anchor(anchors)


def big_bird(
    *,
    window: int,
    anchors: int | Sequence[int] | ArrayLike,
    random_blocks: int,
    rng: ArrayLike | int,
    block_size: int = 64,
    num_blocks: int = 64,
) -> Mask:
    """Window, anchors and random blocks.

    Args:
        window: how many positions each side of its own a query sees.
        anchors: as for :func:`anchor`.
        random_blocks: how many random key blocks each block of queries sees.
        rng: a JAX PRNG key, or an int.
        block_size: positions in a random block.
        num_blocks: blocks in the longest sequence: its length over ``block_size``,
            rounded up. The defaults make the paper's 4,096 positions. Longer arrays are
            refused; positions beyond it (by an offset, in a cache) see no random block;
            in a shorter sequence some of the blocks drawn lie beyond its end.

    References:
        Zaheer et al., "Big Bird", 2020, section 2.
    """
    random_blocks = size_argument("random_blocks", random_blocks, 1)
    drawn = layouts.random_blocks(rng, random_blocks, block_size, num_blocks)
    return longformer(window=window, anchors=anchors) | drawn


def streaming(*, anchors: int, window: int) -> Mask:
    """The first positions ("attention sinks") and a window of recent ones, causal.

    Args:
        anchors: how many of the first positions stay visible.
        window: how many positions before its own a query sees.

    Example:
        >>> print(streaming(anchors=1, window=1).to_dense(4).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [1 1 1 0]
         [1 0 1 1]]

    References:
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
        section 3.
    """
    recent = sliding_window(size_argument("window", window, 0), 0)
    anchors = size_argument("anchors", anchors, 0)
    first = anchor(anchors, see_all=False) if anchors else ~Full()
    return sliding_window(None, 0) & (recent | first)
