"""The class ``Mask``, its combinations, and masks for ``None`` and for arrays."""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import (
    complement,
    intersection,
    namespace,
    numbers,
    runs,
    union,
)
from attnlab._src.masks.liveness import mask_density
from attnlab._src.masks.planning import dense_mask, plan_mask
from attnlab._src.masks.rule import Bounds, Rule, checked_visible
from attnlab._src.picture import POSITIONS, picture_of
from attnlab._src.types import (
    Array,
    ArrayLike,
    Intervals,
    Operand,
    Plan,
    PyTree,
    Tile,
    pytree,
)


class Mask(Rule):
    """Which query may attend to which key; True means attend.

    A mask is lazy: it holds structure and data, and no ``[T, S]`` array unless that is
    what you gave it. Combine masks with ``&``, ``|`` and ``~``.

    To write one, subclass, decorate with ``attnlab.extend.pytree``, and define
    ``visible``; define ``bounds``, too, so that hidden blocks cost nothing. For a rule
    without ``bounds``, :func:`attnlab.masks.predicate` is enough.
    """

    def plan(
        self,
        query_length: int,
        key_length: int | None = None,
        *,
        block_size: int | tuple[int, int] = 128,
    ) -> Plan:
        """The live blocks, in both orientations.

        Args:
            query_length: T, the number of queries.
            key_length: S; T if not given.
            block_size: slots in a block, or (of queries, of keys).

        Returns:
            NumPy arrays, unless arrays of the mask are traced.
        """
        return plan_mask(self, query_length, key_length, block_size)

    def to_dense(self, query_length: int, key_length: int | None = None) -> Array:
        """Boolean ``[T, S]``; of data or per-head masks ``[B or 1, N or 1, T, S]``."""
        return dense_mask(self, query_length, key_length)

    def density(self, query_length: int, key_length: int | None = None) -> float:
        """The fraction of query-key pairs that are visible, exactly."""
        return mask_density(self, query_length, key_length)

    def _repr_html_(self) -> str | None:
        """A picture for notebooks; None (they show the text) if it cannot be drawn."""
        try:
            seen = np.asarray(self.to_dense(POSITIONS))
            first = seen[(0,) * (seen.ndim - 2)]
        except (TypeError, ValueError, IndexError, NotImplementedError):
            return None  # made for another length, of no example, or traced
        more = " (head 0 of example 0)" if seen.size > first.size else ""
        queries, keys = first.shape
        sizes = f"{queries} queries (down), {keys} keys"
        return picture_of(
            f"{self!r}{more}: {sizes}; attnlab.show draws any length", first
        )

    #: Makes NumPy leave ``array & mask`` to the mask.
    __array_ufunc__ = None

    def __and__(self, other: object) -> "Mask":
        return And((self, _part(other)))

    def __or__(self, other: object) -> "Mask":
        return Or((self, _part(other)))

    __rand__ = __and__
    __ror__ = __or__

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a mask has no truth value: combine masks with '&', '|' and '~', "
            "not with 'and', 'or' and 'not'; test for None with 'mask is None'"
        )


def common_block_multiples(masks: Sequence[Mask]) -> tuple[int, int] | None:
    """The greatest common divisors of the masks' block sizes; None: none has any."""
    known = [m.block_multiples for m in masks if m.block_multiples is not None]
    if not known:
        return None
    query, key = (math.gcd(*sizes) for sizes in zip(*known, strict=True))
    return query, key


@pytree
class _Combination(Mask):
    parts: tuple[Mask, ...]
    symbol: ClassVar[str] = ""

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return tuple(m.operands(query_length, key_length) for m in self.parts)

    @property
    def block_multiples(self) -> tuple[int, int] | None:
        """See :class:`Mask`."""
        return common_block_multiples(self.parts)

    def _seen(self, tile: Tile, operands: PyTree) -> list[Array]:
        pairs = zip(self.parts, operands, strict=True)
        return [checked_visible(mask, tile, own) for mask, own in pairs]

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
    """A pair is visible if every part shows it."""

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
    """A pair is visible if some part shows it."""

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
    """A pair is visible if the other mask hides it."""

    part: Mask

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return self.part.operands(query_length, key_length)

    @property
    def block_multiples(self) -> tuple[int, int] | None:
        """See :class:`Mask`."""
        return self.part.block_multiples

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return ~checked_visible(self.part, tile, operands)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        possible, certain = self.part.bounds(rows, cols, operands)
        full = complement(possible, cols.count)
        xp = namespace(*full)
        # The complement may hold an incomplete last block, which is never full.
        full = Intervals(full.lo, xp.minimum(full.hi, cols.length // cols.size))
        return complement(certain, cols.count), full

    def __repr__(self) -> str:
        return f"~{self.part!r}"


@pytree
class Full(Mask):
    """Every query may attend to every key."""

    @property
    def sees_itself(self) -> bool:
        """See :class:`Mask`."""
        return True

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return jnp.ones((1, 1), bool)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        where = np.ones((1, 1, rows.count), bool)
        return cols.every(where), cols.every_complete(where)

    def __repr__(self) -> str:
        return "full()"


def full() -> Mask:
    """Every query may attend to every key."""
    return Full()


@pytree
class Dense(Mask):
    """A boolean array as a mask."""

    array: ArrayLike

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        for size, length, name in zip(
            self.array.shape[-2:], (query_length, key_length), "TS", strict=True
        ):
            if size not in (1, length):
                raise ValueError(
                    f"mask: a boolean array of shape {tuple(self.array.shape)} does "
                    f"not fit {name}={length}; its last two axes must be [T, S] or 1"
                )
        return Operand(self.array)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return operands

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        some = every = operands
        xp = namespace(operands)
        for blocks in (rows, cols):
            if operands.shape[blocks.axis] == 1 and blocks.length > 1:
                shape = list(some.shape)
                shape[blocks.axis] = blocks.count
                some = xp.broadcast_to(some, shape)
                every = xp.broadcast_to(every, shape)
                if blocks is cols:
                    tail = numbers(blocks.count, 4) < blocks.length // blocks.size
                    every = every & (tail if blocks.axis == 3 else tail.mT)
            else:
                some = blocks.reduce(some, blocks.axis, "any", False)
                every = blocks.reduce(every, blocks.axis, "all", blocks is rows)
        if rows.side == "key":
            some, every = some.swapaxes(2, 3), every.swapaxes(2, 3)
        return runs(some), runs(every)

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """See :class:`Mask`."""
        return operands.any(3 if side == "query" else 2, keepdims=True)

    def __repr__(self) -> str:
        return f"dense({arguments.describe(self.array)})"


def dense(array: Any) -> Mask:
    """A boolean array as a mask; True = attend.

    Args:
        array: boolean, broadcasts to ``[B, N, T, S]``.

    Raises:
        TypeError: if the array is not boolean.
        ValueError: if it has fewer than two axes.
    """
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if array.dtype != np.bool_:
        raise TypeError(
            f"mask: expected booleans (True = attend), got {array.dtype}; for numbers "
            "added to the logits use modifiers=[modifiers.bias(array)]"
        )
    if array.ndim < 2:
        raise ValueError(
            f"mask: expected at least two axes, [T, S], got shape {tuple(array.shape)}"
        )
    return Dense(array)


def as_mask(mask: Any) -> Mask:
    """None -> ``full()``; a boolean array -> ``dense(array)``; a mask -> itself."""
    if mask is None:
        return Full()
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, (list, tuple)) and any(isinstance(m, Mask) for m in mask):
        raise TypeError(
            f"mask: expected one mask, got a {type(mask).__name__} of them; combine "
            "them with '&' or '|', or give each head its own with masks.per_head"
        )
    if hasattr(mask, "dtype") or isinstance(mask, (list, tuple)):
        return dense(mask)
    hint = f"; call it: {mask.__name__}(...)" if hasattr(mask, "__name__") else ""
    raise TypeError(
        f"mask: expected an attnlab mask, a boolean array or None, "
        f"got {type(mask).__name__}{hint}"
    )


def _part(mask: object) -> Mask:
    if mask is None:
        raise TypeError("a mask cannot be combined with None; for no mask use full()")
    return as_mask(mask)
