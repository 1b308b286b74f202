"""``Blocks``: one side of the logits, cut into blocks of slots with positions."""

import dataclasses
from typing import Any

import numpy as np

from attnlab._src.masks.intervals import FAR, first_run, hull, namespace, numbers
from attnlab._src.types import Intervals


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How one side of the logits is cut into blocks, and which positions they hold.

    Attributes:
        side: "query" or "key".
        size: slots in a block; the last block may hold fewer.
        length: slots.
        lo: ``[B or 1, count]``, the least position in each block: -1 if an offset makes
            the position of some slot negative (it is empty then), FAR if positions are
            given and all slots are empty.
        hi: ``[B or 1, count]``, the greatest position in each block (-1 if none).
        offset: ``[B or 1]`` position of slot 0 where position = offset + slot; None
            where the positions are given one by one.
        occupied: ``[B or 1, count]``, whether no slot of a block is empty, where
            positions are given.
    """

    side: str
    size: int
    length: int
    lo: Any
    hi: Any
    offset: Any
    occupied: Any = None

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.size)

    @property
    def axis(self) -> int:
        """The axis of an operand that runs along this side."""
        return 2 if self.side == "query" else 3

    @property
    def starts_at_zero(self) -> bool:
        """Whether positions surely are slot numbers."""
        return isinstance(self.offset, np.ndarray) and not self.offset.any()

    @property
    def rows_lo(self) -> Any:
        """``lo`` as ``[B or 1, 1, count, 1]``, for blocks that are rows."""
        return self.lo[:, None, :, None]

    @property
    def rows_hi(self) -> Any:
        """``hi`` as ``[B or 1, 1, count, 1]``, for blocks that are rows."""
        return self.hi[:, None, :, None]

    def _slot(self, position: Any) -> Any:
        """The slot of a position ``[..., m]``, from 0 to ``count * size``."""
        offset = self.offset[:, None, None, None]
        xp, slots = namespace(position, offset), self.count * self.size
        end = xp.minimum(offset, FAR - slots) + slots
        return xp.clip(position, offset, end) - offset

    def touched(self, lo: Any, hi: Any) -> Intervals:
        """Blocks that hold some position of ``[lo, hi)``; hi = FAR: from lo on."""
        endless = hi >= FAR
        if self.offset is None:
            starts = self.lo[:, None, None, None, :] < hi[..., None]
            lo = namespace(lo).maximum(lo, 0)
            stops = self.hi[:, None, None, None, :] >= lo[..., None]
            found = hull((starts | endless[..., None]) & stops)
            return Intervals(found.lo[..., 0], found.hi[..., 0])
        xp = namespace(lo, hi, self.offset)
        first = self._slot(lo) // self.size
        last = xp.where(endless, self.count, -(-self._slot(hi) // self.size))
        return Intervals(first, xp.where((hi > lo) | endless, last, first))

    def covered(self, lo: Any, hi: Any) -> Intervals:
        """Complete blocks that hold positions of ``[lo, hi)`` only."""
        if self.offset is None:
            inside = self.lo[:, None, None, None, :] >= lo[..., None]
            inside = inside & (self.hi[:, None, None, None, :] < hi[..., None])
            complete = numbers(self.count, 5) < self.length // self.size
            found = first_run(inside & complete)
            return Intervals(found.lo[..., 0], found.hi[..., 0])
        xp = namespace(lo, hi, self.lo, self.offset)
        first = -(-self._slot(lo) // self.size)
        last = xp.minimum(self._slot(hi) // self.size, self.length // self.size)
        return Intervals(first, xp.maximum(first, last))

    def every(self, where: Any) -> Intervals:
        """All blocks in the rows where ``where [..., rows]`` holds, none elsewhere."""
        xp = namespace(where)
        lo = xp.zeros(where.shape + (1,), np.int32)
        return Intervals(lo, xp.where(where[..., None], self.count, 0).astype(np.int32))

    def every_complete(self, where: Any) -> Intervals:
        """As ``every``, without an incomplete last block."""
        lo, hi = self.every(where)
        xp = namespace(hi)
        return Intervals(lo, xp.minimum(hi, self.length // self.size))

    def reduce(self, array: Any, axis: int, how: str, fill: Any) -> Any:
        """Reduces each block's slots ("min", "max", "any", "all") along an axis."""
        xp = namespace(array)
        pad = [(0, 0)] * array.ndim
        pad[axis] = (0, self.count * self.size - self.length)
        array = xp.pad(array, pad, constant_values=fill)
        shape = array.shape[:axis] + (self.count, self.size) + array.shape[axis + 1 :]
        return getattr(array.reshape(shape), how)(axis + 1)
