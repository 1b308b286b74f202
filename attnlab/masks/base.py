"""The mask protocol and its algebra: ``&``, ``|``, ``~``."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import jax.numpy as jnp
import numpy as np

from attnlab.masks.geometry import Blocks
from attnlab.masks.intervals import complement, intersection, namespace, union
from attnlab.types import Array, Intervals, Plan, PyTree, Tile, pytree

Bounds = tuple[Intervals, Intervals]


def visible_pairs(mask: "Mask", tile: Tile, operands: PyTree) -> Array:
    """What the mask shows, less the slots that hold nothing: boolean ``[q, k]``."""
    occupied = (tile.query_positions >= 0) & (tile.key_positions >= 0)
    return seen_by(mask, tile, operands) & occupied


def seen_by(mask: "Mask", tile: Tile, operands: PyTree) -> Array:
    """What the mask shows, if it is a mask that its author got right.

    Raises:
        TypeError: if it yields no booleans.
        ValueError: if they are not those of the tile.
    """
    seen = mask.visible(tile, operands)
    if jnp.result_type(seen) != jnp.bool_:
        raise TypeError(
            f"mask: {mask!r} yields {jnp.result_type(seen)}, expected booleans "
            "(True = attend)"
        )
    pairs = jnp.broadcast_shapes(tile.query_positions.shape, tile.key_positions.shape)
    try:
        fits = jnp.broadcast_shapes(jnp.shape(seen), pairs) == pairs
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask: {mask!r} yields shape {jnp.shape(seen)} for a tile of "
            f"{pairs[0]} queries and {pairs[1]} keys; expected {pairs}, or 1 on an axis"
        )
    return seen


class Mask:
    """Who may attend to whom; True means attend.

    A mask is lazy: it holds structure and data, never a ``[T, S]`` array unless that is
    what you gave it. Combine masks with ``&``, ``|`` and ``~``.

    To write one, subclass, decorate with ``attnlab.types.pytree``, and define
    ``visible`` and ``bounds``. For a rule without its own block arithmetic,
    :func:`attnlab.masks.predicate` is enough.
    """

    def __init_subclass__(cls, **options: Any):
        """What a base says of its own ``visible`` does not hold for another one."""
        super().__init_subclass__(**options)
        for name, unknown in _UNKNOWN.items():
            owner = next(c for c in cls.__mro__ if name in c.__dict__)
            theirs: Any = getattr(owner, "visible", None)
            if theirs not in (cls.visible, Mask.visible, None):
                setattr(cls, name, unknown)

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """The arrays that ``visible`` needs, as a pytree of ``Operand``.

        Raises:
            ValueError: if the mask was built for other lengths.
        """
        return ()

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """Boolean ``[q, k]`` (or broadcasting to it) for one tile.

        Empty slots (position -1) need no care: they are hidden whatever this says.

        Args:
            tile: the positions, and the head.
            operands: arrays ``[q or 1, k or 1, *payload]`` in the structure that
                ``operands`` returned.
        """
        raise NotImplementedError

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """(possibly live, surely full) blocks of ``cols`` for each block of ``rows``.

        Args:
            rows: the blocks of one side.
            cols: the blocks of the other.
            operands: arrays ``[B, N, T, S, *payload]``, axes full or 1.

        Returns:
            Two ``Intervals``: the first holds at least every block with a visible
            pair, the second at most the blocks whose pairs are all visible.
        """
        raise NotImplementedError

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """A necessary condition for a slot to be visible: an operand, or None."""
        return None

    @property
    def sees_itself(self) -> bool:
        """Whether the structure surely lets each position see the same position."""
        return False

    @property
    def alive_sees_itself(self) -> bool:
        """Whether each slot that ``may_be_alive``, on either side, sees itself."""
        return self.sees_itself

    @property
    def grain(self) -> int | None:
        """Positions in the blocks that the structure speaks of; None: of none.

        Where a plan's blocks divide it, none of them need be partial.
        """
        return None

    def plan(
        self,
        query_length: int,
        key_length: int | None = None,
        *,
        block_size: int | tuple[int, int] = 128,
    ) -> Plan:
        """The live blocks, in both orientations.

        Args:
            query_length: T.
            key_length: S; T if not given.
            block_size: slots in a block, or (of queries, of keys).

        Returns:
            NumPy arrays where the structure alone decides, else JAX arrays.
        """
        from attnlab.masks.planning import plan_mask

        return plan_mask(self, query_length, key_length, block_size)

    def to_dense(self, query_length: int, key_length: int | None = None) -> Array:
        """Boolean ``[T, S]``, or ``[B or 1, N or 1, T, S]`` where data say so."""
        from attnlab.masks.planning import dense_mask

        return dense_mask(self, query_length, key_length)

    def density(self, query_length: int, key_length: int | None = None) -> float:
        """The fraction of query-key pairs that are visible, exactly."""
        from attnlab.masks.liveness import mask_density

        return mask_density(self, query_length, key_length)

    #: NumPy leaves ``array & mask`` to the mask.
    __array_ufunc__ = None

    def __and__(self, other: Any) -> "Mask":
        return And((self, _part(other)))

    def __or__(self, other: Any) -> "Mask":
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


def _anything(
    mask: Mask, rows: Blocks, cols: Blocks, operands: PyTree
) -> tuple[Intervals, Intervals]:
    """The bounds of a mask that says nothing of blocks."""
    where = np.ones((1, 1, rows.count), bool)
    return cols.every(where), cols.every(~where)


#: What a class that changes ``visible``, and says no more, has of these.
_UNKNOWN: dict[str, Any] = {
    "bounds": _anything,
    "may_be_alive": Mask.may_be_alive,
    "sees_itself": Mask.sees_itself,
    "alive_sees_itself": Mask.alive_sees_itself,
    "grain": Mask.grain,
}


def as_mask(mask: Any) -> Mask:
    """None -> everything; a boolean array -> that array; a mask -> itself."""
    from attnlab.masks.data import dense

    if mask is None:
        return Full()
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, (list, tuple)) and any(isinstance(m, Mask) for m in mask):
        raise TypeError(
            f"mask: expected one mask, got a {type(mask).__name__} of them; combine "
            "them with '&' or '|', or one a head with masks.per_head"
        )
    if hasattr(mask, "dtype") or isinstance(mask, (list, tuple)):
        return dense(mask)
    raise TypeError(
        f"mask: expected an attnlab mask, a boolean array or None, "
        f"got {type(mask).__name__}"
    )


def _part(mask: Any) -> Mask:
    if mask is None:
        raise TypeError("a mask cannot be combined with None; for no mask use full()")
    return as_mask(mask)


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
        result = self.parts[0].visible(tile, operands[0])
        for mask, own in zip(self.parts[1:], operands[1:], strict=True):
            result = result & mask.visible(tile, own)
        return result

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
        result = self.parts[0].visible(tile, operands[0])
        for mask, own in zip(self.parts[1:], operands[1:], strict=True):
            result = result | mask.visible(tile, own)
        return result

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
        return ~self.part.visible(tile, operands)

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


def full() -> Mask:
    """Every query may attend to every key."""
    return Full()
