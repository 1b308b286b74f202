"""Masks that are pure structure: static, hashable, planned in NumPy."""

import numpy as np

from attnlab._src.masks.base import Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import FAR, namespace, plus
from attnlab._src.masks.rule import Bounds
from attnlab._src.types import Array, ArrayLike, Intervals, PyTree, Tile, pytree, static


def size_argument(name: str, value: object, least: int, else_: str = "") -> int:
    """An int that is at least ``least``, or an error that names the argument.

    Args:
        name: of the argument.
        value: what was given.
        least: the least value that is allowed.
        else_: what the error says after a value that is too large.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"{name}: expected an int (window and block sizes are static structure), "
            f"got {type(value).__name__}"
        )
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value >= FAR:
        raise ValueError(f"{name}: expected less than {FAR}, got {value}{else_}")
    return int(value)


def nothing(like: ArrayLike) -> Intervals:
    """No interval in any row of ``like [..., rows, m]``."""
    empty = namespace(like).zeros(like.shape[:-1] + (0,), np.int32)
    return Intervals(empty, empty)


@pytree
class Window(Mask):
    """Key position s is visible from query position t iff -left <= s - t <= right."""

    left: int | None = static()
    right: int | None = static()
    step: int = static(default=1)

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return True

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        # The limits are [q, 1] and [1, k]: a tile costs one or two comparisons. A sum
        # of a position and a size may overflow int32; these differences do not.
        t, s = tile.query_positions, tile.key_positions
        result = s >= (0 if self.left is None else t - self.left)
        if self.right is not None:
            result = result & (s - self.right <= t)
        if self.step > 1:
            result = result & ((s - t) % self.step == 0)
        return result

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        left, right = self.left, self.right
        if rows.side == "key":
            left, right = right, left
        lo, hi = rows.rows_lo, rows.rows_hi
        zero = lo * 0

        def span(first: ArrayLike, last: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
            start = zero - FAR if left is None else first - left
            stop = zero + FAR if right is None else plus(last, right + 1)
            return start, stop

        possible = cols.touched(*span(lo, hi))
        if self.step > 1:
            return possible, nothing(lo)
        return possible, cols.covered(*span(hi, lo))

    def __repr__(self) -> str:
        if self.step > 1:
            return f"dilated_window({self.left}, {self.right}, {self.step})"
        if (self.left, self.right) == (None, 0):
            return "causal()"
        return f"sliding_window({self.left}, {self.right})"


@pytree
class Anchor(Mask):
    """Positions that all queries see (side "key"), or that see all keys ("query").

    ``runs`` are half-open intervals of positions, ascending and disjoint.
    """

    runs: tuple[tuple[int, int], ...] = static()
    side: str = static()

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        own = tile.query_positions if self.side == "query" else tile.key_positions
        member = own < -1
        for lo, hi in self.runs:
            member = member | ((own >= lo) & (own < hi))
        return member

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        runs = np.asarray(self.runs, np.int32).reshape(1, 1, 1, -1, 2)
        lo, hi = runs[..., 0], runs[..., 1]
        if rows.side == self.side:
            touches = ((rows.rows_lo < hi) & (rows.rows_hi >= lo)).any(-1)
            inside = (rows.rows_lo >= lo) & (rows.rows_hi < hi) & (rows.rows_hi >= 0)
            return cols.every(touches), cols.every_complete(inside.any(-1))
        shape = (1, 1, rows.count, len(self.runs))
        lo, hi = np.broadcast_to(lo, shape), np.broadcast_to(hi, shape)
        return cols.touched(lo, hi), cols.covered(lo, hi)

    def __repr__(self) -> str:
        whom = "seen" if self.side == "key" else "seeing"
        spans = ", ".join(f"{a}" if b == a + 1 else f"{a}:{b}" for a, b in self.runs)
        return f"anchor([{spans}], {whom})"


@pytree
class Chunked(Mask):
    """A position sees its own chunk of ``size`` positions."""

    size: int = static()

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return True

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        t, s = tile.query_positions, tile.key_positions
        return t // self.size == s // self.size

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        xp = namespace(rows.lo, rows.hi)
        first = rows.rows_lo // self.size
        last = rows.rows_hi // self.size
        lo, hi = first * self.size, plus(last * self.size, self.size)
        same = xp.where(first == last, hi, lo)
        return cols.touched(lo, hi), cols.covered(lo, same)

    def __repr__(self) -> str:
        return f"chunked({self.size})"


def causal() -> Mask:
    """A query sees its own position and those before it.

    Aligned by position, top-left: with ``T != S`` query 0 sees key 0 only. For a cache,
    give ``query_offset``.

    Example:
        >>> print(causal().to_dense(3, 4).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [1 1 1 0]]
    """
    return Window(None, 0)


def sliding_window(left: int | None, right: int | None) -> Mask:
    """Key position s is visible from query position t iff -left <= s - t <= right.

    Args:
        left: how many positions before its own a query sees; None: all.
        right: how many positions after its own a query sees; None: all.

    Raises:
        ValueError: if a size is negative.

    Example:
        >>> print(sliding_window(1, 0).to_dense(4).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 1 1 0]
         [0 0 1 1]]

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1.
    """
    none = "; for no limit use None"
    left = None if left is None else size_argument("left", left, 0, none)
    right = None if right is None else size_argument("right", right, 0, none)
    return Window(left, right)


def dilated_window(left: int, right: int, step: int) -> Mask:
    """A sliding window that sees every ``step``-th position, its own among them.

    Args:
        left: how many positions before its own the window covers.
        right: how many positions after its own the window covers.
        step: distance between visible positions, at least 1.

    Example:
        >>> print(dilated_window(2, 2, 2).to_dense(4).astype(int))
        [[1 0 1 0]
         [0 1 0 1]
         [1 0 1 0]
         [0 1 0 1]]

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1.
    """
    left, right = size_argument("left", left, 0), size_argument("right", right, 0)
    return Window(left, right, size_argument("step", step, 1))


def prefix(size: int) -> Mask:
    """The first ``size`` keys are visible to every query.

    Example:
        >>> print((causal() | prefix(2)).to_dense(3).astype(int))
        [[1 1 0]
         [1 1 0]
         [1 1 1]]

    References:
        Raffel et al., "T5", 2020, section 3.2.1 (prefix LM).
    """
    return Anchor(((0, size_argument("size", size, 0)),), "key")


def chunked(size: int) -> Mask:
    """A position sees its own chunk of ``size`` positions, and no other position.

    Example:
        >>> print(chunked(2).to_dense(4).astype(int))
        [[1 1 0 0]
         [1 1 0 0]
         [0 0 1 1]
         [0 0 1 1]]
    """
    return Chunked(size_argument("size", size, 1))
