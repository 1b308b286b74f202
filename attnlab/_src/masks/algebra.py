"""Masks of masks: what ``&``, ``|`` and ``~`` make."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import ClassVar

from attnlab._src.masks.base import Bounds, Mask, seen_by
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import complement, intersection, namespace, union
from attnlab._src.types import Array, Intervals, PyTree, Tile, pytree


def common_grain(masks: Sequence[Mask]) -> int | None:
    """What blocks must divide to divide the grain of each mask that has one."""
    grains = [m.grain for m in masks if m.grain is not None]
    return math.gcd(*grains) if grains else None


@pytree
class _Combination(Mask):
    parts: tuple[Mask, ...]
    symbol: ClassVar[str] = ""

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return tuple(m.operands(query_length, key_length) for m in self.parts)

    @property
    def grain(self) -> int | None:
        """See :class:`Mask`."""
        return common_grain(self.parts)

    def _seen(self, tile: Tile, operands: PyTree) -> list[Array]:
        pairs = zip(self.parts, operands, strict=True)
        return [seen_by(mask, tile, own) for mask, own in pairs]

    def _bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> list[Bounds]:
        return [
            m.bounds(rows, cols, o) for m, o in zip(self.parts, operands, strict=True)
        ]

    def _alive(self, side: str, operands: PyTree) -> list[Array | None]:
        return [
            m.may_be_alive(side, o) for m, o in zip(self.parts, operands, strict=True)
        ]

    def __repr__(self) -> str:
        return "(" + f" {self.symbol} ".join(repr(m) for m in self.parts) + ")"


@pytree
class And(_Combination):
    """Visible where every part says so."""

    symbol: ClassVar[str] = "&"

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return all(m.sees_itself for m in self.parts)

    @property
    def alive_sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return all(m.alive_sees_itself for m in self.parts)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return functools.reduce(operator.and_, self._seen(tile, operands))

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        (possible, certain), *rest = self._bounds(rows, cols, operands)
        for more_possible, more_certain in rest:
            possible = intersection(possible, more_possible, cols.count)
            certain = intersection(certain, more_certain, cols.count)
        return possible, certain

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """See :class:`Mask`."""
        known = [a for a in self._alive(side, operands) if a is not None]
        if not known:
            return None
        result = known[0]
        for more in known[1:]:
            result = result & more
        return result


@pytree
class Or(_Combination):
    """Visible where some part says so."""

    symbol: ClassVar[str] = "|"

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return any(m.sees_itself for m in self.parts)

    @property
    def alive_sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return self.sees_itself or all(m.alive_sees_itself for m in self.parts)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return functools.reduce(operator.or_, self._seen(tile, operands))

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        (possible, certain), *rest = self._bounds(rows, cols, operands)
        for more_possible, more_certain in rest:
            possible = union(possible, more_possible)
            certain = union(certain, more_certain)
        return possible, certain

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """See :class:`Mask`."""
        parts = self._alive(side, operands)
        result = parts[0]
        for more in parts[1:]:
            result = None if result is None or more is None else result | more
        return result


@pytree
class Not(Mask):
    """Visible where the other mask hides."""

    part: Mask

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return self.part.operands(query_length, key_length)

    @property
    def grain(self) -> int | None:
        """See :class:`Mask`."""
        return self.part.grain

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return ~seen_by(self.part, tile, operands)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        possible, certain = self.part.bounds(rows, cols, operands)
        full = complement(possible, cols.count)
        xp = namespace(*full)
        # A complement reaches into an incomplete last block: that is never full.
        full = Intervals(full.lo, xp.minimum(full.hi, cols.length // cols.size))
        return complement(certain, cols.count), full

    def __repr__(self) -> str:
        return f"~{self.part!r}"
