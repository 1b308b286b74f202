"""Lists of keys, or of blocks of keys, that are chosen for the queries of a call."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.base import Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import namespace
from attnlab._src.masks.layouts import BlockLayout
from attnlab._src.masks.lists import bounds_of_lists, listed_in, searchable
from attnlab._src.masks.planning import index_blocks
from attnlab._src.masks.rule import Bounds
from attnlab._src.masks.structural import size_argument
from attnlab._src.types import (
    Array,
    ArrayLike,
    Intervals,
    Operand,
    PyTree,
    Tile,
    pytree,
    static,
)


@pytree
class Selected(Mask):
    """Each query sees the blocks of keys that are listed for it.

    ``indices [..., ceil(T / query_block), R]`` lists key blocks for blocks of the
    queries of a call; -1 = none. There are two operands, each with a list for each
    query: as they are given, and as they can be searched.
    """

    indices: ArrayLike
    query_block: int = static()
    key_block: int = static()
    #: Whether query heads that share a key head surely have equal lists.
    grouped: bool = static(default=False)

    @property
    def block_multiples(self) -> tuple[int, int]:
        """See :class:`Mask`."""
        return self.query_block, self.key_block

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        rows, size = self.indices.shape[-2], self.query_block
        if rows != -(-query_length // size):
            raise ValueError(
                f"mask: {self!r}: lists for {rows} blocks of {size} queries do not fit "
                f"T={query_length}; it needs {-(-query_length // size)}"
            )
        lists = self.indices[None] if self.indices.ndim == 2 else self.indices
        # What is not read is not computed: some kernels take lists in any order.
        kinds = lists, searchable(lists)
        if size > 1:
            kinds = [namespace(x).repeat(x, size, axis=-2) for x in kinds]
        return tuple(Operand(x[..., :query_length, None, :], 1) for x in kinds)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        _, lists = operands
        return listed_in(lists[:, 0], tile.key_positions // self.key_block)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        query = rows if rows.side == "query" else cols
        lists = operands[0][:, :, :, 0]
        xp, length = namespace(lists), query.length
        if short := query.count * query.size - length:
            lists = xp.pad(lists, [(0, 0), (0, 0), (0, short), (0, 0)], mode="edge")
        lead, each = lists.shape[:2], lists.shape[3]
        # Some queries stand for those that follow them, if their lists are equal. They
        # may differ: a shard, or some rows of a mask, begins anywhere.
        alike = math.gcd(self.query_block, query.size)
        several = lists.reshape(*lead, query.count, -1, alike, each)
        # Not by comparing each with the first: where XLA knows that they are equal, it
        # would compute ``all`` of that many booleans while it compiles.
        same = (several.max(4) == several.min(4)).all((3, 4))
        # The lists are those of slots, whatever the positions of the queries.
        slots = index_blocks("query", length, query.size)
        possible, certain = bounds_of_lists(
            [several[..., 0, :].reshape(*lead, query.count, -1)],
            (query.size, self.key_block),
            slots if rows is query else rows,
            slots if cols is query else cols,
            exact=alike == query.size,
        )
        if alike == 1:
            return possible, certain
        unknown = ~(same if rows is query else same.all(-1, keepdims=True))[..., None]
        lo = xp.where(unknown, 0, possible.lo)
        hi = xp.where(unknown, cols.count, possible.hi)
        stop = xp.where(unknown, certain.lo, certain.hi)
        return Intervals(lo, hi), Intervals(certain.lo, stop)

    def __repr__(self) -> str:
        sizes = ""
        if self.block_multiples != (1, 1):
            sizes = f", query_block={self.query_block}, key_block={self.key_block}"
        return f"selected({arguments.describe(self.indices)}{sizes})"


def selected(indices: ArrayLike, *, query_block: int = 1, key_block: int = 1) -> Mask:
    """Each query sees the keys that were selected for it.

    The lists are for the queries of one call, first to last, whatever their positions;
    keys are listed by position. Indices are data: others of the same shape do not
    recompile, and the model may compute them within ``jit``, as :mod:`attnlab.select`
    does. No gradient flows through a selection.

    Args:
        indices: integers ``[rows, R]``, ``[heads, rows, R]`` or ``[*batch, heads, rows,
            R]``, with a row for each query block, T / query_block rounded up: the R key
            blocks that its queries see; -1 = none. A block may be listed twice, in any
            order; one beyond the keys is an error where its number is known, and is not
            there within ``jit``. ``heads`` is 1, N, or K: then the query heads that
            share a key head share its lists.
        query_block: queries that share a list.
        key_block: keys in a block; 1: single keys are listed.

    Raises:
        TypeError: if indices are no integers.
        ValueError: if there are too few axes, or a size is not positive.

    Example:
        >>> mask = selected(np.array([[0, 2], [1, -1]]))
        >>> print(mask.to_dense(2, 3).astype(int)[0, 0])
        [[1 0 1]
         [0 1 0]]
        >>> mask = selected(np.array([[1], [0]]), query_block=1, key_block=2)
        >>> print(mask.to_dense(2, 4).astype(int)[0, 0])
        [[0 0 1 1]
         [1 1 0 0]]

    References:
        Yuan et al., "Native Sparse Attention", 2025, section 3.3.2, equation 12; Lu et
        al., "MoBA", 2025, section 2.2, equation 2.
    """
    indices = arguments.integers("indices", indices)
    if indices.ndim < 2:
        raise ValueError(f"indices: expected [..., rows, R], got shape {indices.shape}")
    query_size, key_size = (
        size_argument(name, size, 1)
        for name, size in (("query_block", query_block), ("key_block", key_block))
    )
    if indices.shape[-1] == 0:
        # Nothing is listed: one entry of -1 means the same.
        padding = [(0, 0)] * (indices.ndim - 1) + [(0, 1)]
        indices = namespace(indices).pad(indices, padding, constant_values=-1)
    return Selected(indices, query_size, key_size)


def fitted(
    mask: Mask,
    heads: int,
    key_heads: Sequence[int],
    lengths: tuple[Any, Any] | None,
) -> Mask:
    """The mask, in which lists for each key head are those of its query heads.

    Args:
        mask: any mask.
        heads: N, of all devices.
        key_heads: what K may be: that of this device, and that of all.
        lengths: T and S, if positions are slot numbers; else None.

    Raises:
        ValueError: if there are lists for another number of heads; or if lists whose
            numbers are known here hold blocks that are not there.
    """

    def is_layout(part: Any) -> bool:
        return isinstance(part, (BlockLayout, Selected))

    def spread(part: Any) -> Any:
        if not is_layout(part):
            return part
        if lengths is not None:
            _check_numbers(part, *lengths)
        lists = part.rows if isinstance(part, BlockLayout) else part.indices
        given = lists.shape[-3] if lists.ndim > 2 else 1
        if given in (1, heads):
            return part
        if given not in key_heads or heads % given:
            raise ValueError(
                f"mask: {part!r} lists blocks for {given} heads; expected 1, "
                f"{heads} (query heads) or {key_heads[-1]} (key heads)"
            )

        def repeat(lists: ArrayLike) -> ArrayLike:
            # No repeat, which JAX refuses where heads are divided by explicit axes.
            *lead, rows, count = lists.shape
            shape = (*lead, heads // given, rows, count)
            wide = namespace(lists).broadcast_to(lists[..., None, :, :], shape)
            return wide.reshape(*lead[:-1], heads, rows, count)

        part = jax.tree.map(repeat, part)
        if isinstance(part, Selected):
            part = dataclasses.replace(part, grouped=True)
        return part

    return jax.tree.map(spread, mask, is_leaf=is_layout)


def _check_numbers(
    part: BlockLayout | Selected, query_length: Any, key_length: Any
) -> None:
    """Raises a ValueError if lists that are known here hold blocks that are not there.

    Layouts that are longer than the queries are left out: they may be for all lengths.
    """
    lists = part.rows if isinstance(part, BlockLayout) else part.indices
    drawn = isinstance(part, BlockLayout) and part.name == "random_blocks"
    unknown = isinstance(lists, (jax.core.Tracer, jax.ShapeDtypeStruct))
    known = isinstance(query_length, int) and isinstance(key_length, int)
    if drawn or unknown or not known:
        return
    if lists.shape[-2] > -(-query_length // part.query_block):
        return
    numbers, count = np.asarray(lists), -(-key_length // part.key_block)
    least, most = numbers.min(initial=0), numbers.max(initial=-1)
    if least < -1 or most >= count:
        raise ValueError(
            f"mask: {part!r}: indices: expected numbers of {count} blocks of "
            f"{part.key_block} keys (S={key_length}), or -1 for none, got "
            f"{least if least < -1 else most}"
        )
