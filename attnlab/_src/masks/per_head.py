"""A mask that differs by head."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.exact import exactly
from attnlab._src.masks.base import Mask, as_mask, common_block_multiples
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import FAR, namespace
from attnlab._src.masks.rule import Bounds, checked_visible
from attnlab._src.types import Array, Intervals, Operand, PyTree, Tile, pytree, static


def _is_operand(x: object) -> bool:
    return isinstance(x, Operand)


def _varies_by_head(operand: Operand) -> bool:
    shape = operand.array.shape[: operand.array.ndim - operand.payload]
    return len(shape) > 2 and shape[-3] > 1


@pytree
class PerHead(Mask):
    """A mask of its own for each query head."""

    parts: tuple[Mask, ...]
    #: For each head its index in ``parts``; empty: head n has part n.
    which: tuple[int, ...] = static(default=())

    @property
    def order(self) -> tuple[int, ...]:
        """For each head the index of its mask in ``parts``."""
        return self.which or tuple(range(len(self.parts)))

    @property
    def head_count(self) -> int:
        """See :class:`Mask`."""
        return len(self.order)

    def check_heads(self, heads: int) -> None:
        """See :class:`Mask`."""
        if len(self.parts) != heads:
            raise ValueError(
                f"mask: per_head got {len(self.parts)} masks for {heads} query heads"
            )

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        each = tuple(m.operands(query_length, key_length) for m in self.parts)
        for part, operands in zip(self.parts, each, strict=True):
            if any(
                map(_varies_by_head, jax.tree.leaves(operands, is_leaf=_is_operand))
            ):
                raise ValueError(
                    f"masks: per_head: {part!r} varies by head itself; give each head "
                    "its own part of it"
                )
        return each

    @property
    def block_multiples(self) -> tuple[int, int] | None:
        """See :class:`Mask`."""
        return common_block_multiples(self.parts)

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return all(m.sees_itself for m in self.parts)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        shape = jnp.broadcast_shapes(
            tile.query_positions.shape, tile.key_positions.shape
        )
        branches = [
            lambda ops, m=m, i=i: jnp.broadcast_to(
                checked_visible(m, tile, ops[i]), shape
            )
            for i, m in enumerate(self.parts)
        ]
        part = (
            jnp.asarray(self.which, jnp.int32)[tile.head] if self.which else tile.head
        )
        return lax.switch(part, branches, operands)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        each = [
            m.bounds(rows, cols, o) for m, o in zip(self.parts, operands, strict=True)
        ]
        possible, certain = (
            _stack([side[part] for part in self.order])
            for side in ([p for p, _ in each], [c for _, c in each])
        )
        return possible, certain

    def __repr__(self) -> str:
        return f"per_head({', '.join(repr(m) for m in self.parts)})"


@pytree
class OwnHeads(Mask):
    """Of a mask for all heads the part of one device, inside ``jax.shard_map``.

    Attributes:
        whole: for the heads of all devices.
        first: the number of this device's first head, an int32 scalar.
        count: how many heads it has.
    """

    whole: PerHead
    first: Any
    count: int = static()

    @property
    def head_count(self) -> int:
        """See :class:`Mask`."""
        return self.count

    def check_heads(self, heads: int) -> None:
        """Does nothing: it is made for the heads that there are."""

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        first = jnp.asarray(self.first, jnp.int32).reshape(1, 1, 1)
        return self.whole.operands(query_length, key_length), Operand(first)

    @property
    def block_multiples(self) -> tuple[int, int] | None:
        """See :class:`Mask`."""
        return self.whole.block_multiples

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return self.whole.sees_itself

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        inner, first = operands
        head = tile.head + first[0, 0]
        heads: dict[object, list[int]] = {}
        for number, part in enumerate(self.whole.order):
            leaves, structure = jax.tree.flatten((self.whole.parts[part], inner[part]))
            heads.setdefault(part if leaves else structure, []).append(number)
        # Not by lax.switch: under vmap over heads it fails inside ``shard_map``.
        seen = []
        for numbers in heads.values():
            part = self.whole.order[numbers[0]]
            mine = (head == jnp.asarray(numbers, jnp.int32)).any()
            seen.append(
                checked_visible(self.whole.parts[part], tile, inner[part]) & mine
            )
        return functools.reduce(jnp.logical_or, seen)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        inner, first = operands

        def own(intervals: Intervals) -> Intervals:
            cut = lambda x: lax.dynamic_slice_in_dim(
                jnp.asarray(x), jnp.ravel(first)[0], self.count, 1
            )
            return Intervals(*map(cut, intervals))

        possible, certain = self.whole.bounds(rows, cols, inner)
        return own(possible), own(certain)

    def __repr__(self) -> str:
        return f"{self.count} heads of {self.whole!r}"


def of_own_heads(mask: Mask, whole: int, first: Any, count: int) -> Mask:
    """The mask, in which ``per_head`` for all heads is that of one device's heads.

    Args:
        mask: any mask.
        whole: how many heads all devices have.
        first: the number of this device's first head.
        count: how many heads it has.
    """

    def is_whole(part: Any) -> bool:
        return exactly(part, PerHead) and part.head_count == whole

    own = lambda part: OwnHeads(part, first, count) if is_whole(part) else part
    return jax.tree.map(own, mask, is_leaf=is_whole)


def _stack(heads: list[Intervals]) -> Intervals:
    """Intervals ``[Bp, 1, rows, m]`` of each head -> ``[Bp, N, rows, max m]``."""
    xp = namespace(*(x for h in heads for x in h))
    most = max(h.lo.shape[-1] for h in heads)
    lead = jnp.broadcast_shapes(*(h.lo.shape[:-1] for h in heads))
    sides = []
    for arrays in zip(*heads, strict=True):
        padded = [
            xp.pad(
                xp.broadcast_to(a, lead + a.shape[-1:]),
                [(0, 0)] * 3 + [(0, most - a.shape[-1])],
                constant_values=FAR,
            )
            for a in arrays
        ]
        sides.append(xp.concatenate(padded, axis=1))
    return Intervals(*sides)


def per_head(masks: Sequence[Mask]) -> Mask:
    """A mask of its own for each query head.

    Args:
        masks: N masks, one for each head; none of them may vary by head itself.

    Raises:
        TypeError: if ``masks`` is no list or tuple.
        ValueError: if there are none, or one is ``per_head`` itself.
    """
    if not isinstance(masks, (list, tuple)):
        raise TypeError(
            f"masks: expected a list, one mask for each query head, got {masks!r}; "
            "a single mask holds for all heads: give it without per_head"
        )
    if not masks:
        raise ValueError("masks: expected one mask for each query head, got none")
    parts = tuple(as_mask(m) for m in masks)
    within = jax.tree.leaves(parts, is_leaf=lambda m: isinstance(m, PerHead))
    if any(isinstance(m, PerHead) for m in within):
        raise ValueError("masks: a mask within per_head cannot be per_head itself")
    return PerHead(parts)
