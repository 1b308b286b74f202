"""The mask protocol, and the mask that shows everything."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.geometry import Blocks
from attnlab._src.types import Array, Intervals, Plan, PyTree, Tile, pytree

Bounds = tuple[Intervals, Intervals]


def visible_pairs(mask: "Mask", tile: Tile, operands: PyTree) -> Array:
    """What the mask shows, less the slots that hold nothing: boolean ``[q, k]``."""
    occupied = (tile.query_positions >= 0) & (tile.key_positions >= 0)
    return seen_by(mask, tile, operands) & occupied


def seen_by(mask: "Mask", tile: Tile, operands: PyTree) -> Array:
    """What the mask shows, if it is a mask that its author got right.

    Raises:
        TypeError: if it yields no booleans, or fails.
        ValueError: if they are not those of the tile.
    """
    pairs = jnp.broadcast_shapes(tile.query_positions.shape, tile.key_positions.shape)
    where = f"for a tile of {pairs[0]} queries and {pairs[1]} keys"
    try:
        seen = mask.visible(tile, operands)
        got = jnp.result_type(seen)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        if _asks_others(mask):
            raise  # whoever fails was told by name
        kind = ValueError if isinstance(error, ValueError) else TypeError
        said = str(error).partition("\n")[0].rstrip(".")
        raise kind(
            f"mask: {mask!r} fails {where}: {said}; it must work on traced arrays of "
            "any size (by jnp.where, '&', '|' and '~', not by 'if', 'and', 'or' and "
            "'not'), and read arrays only through its operands"
        ) from error
    if got != jnp.bool_:
        raise TypeError(
            f"mask: {mask!r} yields {got}, expected booleans (True = attend)"
        )
    if jnp.ndim(seen) == 0:
        return jnp.broadcast_to(seen, (1, 1))
    shape = jnp.shape(seen)
    if len(shape) != 2 or any(
        n not in (1, m) for n, m in zip(shape, pairs, strict=True)
    ):
        raise ValueError(
            f"mask: {mask!r} yields shape {shape} {where}; expected {pairs}, or 1 on "
            "an axis"
        )
    return seen


def _asks_others(mask: "Mask") -> bool:
    """Whether it is made of other masks."""

    def is_part(x: Any) -> bool:
        return isinstance(x, Mask) and x is not mask

    return any(map(is_part, jax.tree.leaves(mask, is_leaf=is_part)))


class Mask:
    """Who may attend to whom; True means attend.

    A mask is lazy: it holds structure and data, never a ``[T, S]`` array unless that is
    what you gave it. Combine masks with ``&``, ``|`` and ``~``.

    To write one, subclass, decorate with ``attnlab.extend.pytree``, and define
    ``visible``; and ``bounds``, so that blocks that hide all cost nothing. For a rule
    without its own block arithmetic, :func:`attnlab.masks.predicate` is enough.
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
        raise NotImplementedError("a mask needs a 'visible' of its own")

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """(possibly live, surely full) blocks of ``cols`` for each block of ``rows``.

        Args:
            rows: the blocks of one side.
            cols: the blocks of the other.
            operands: arrays ``[B, N, T, S, *payload]``, axes full or 1.

        Returns:
            Two ``Intervals``: the first holds at least every block with a visible
            pair, the second at most the blocks whose pairs are all visible. Of a mask
            that says no more: every block, and none.
        """
        where = np.ones((1, 1, rows.count), bool)
        return cols.every(where), cols.every(~where)

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
        from attnlab._src.masks.planning import plan_mask

        return plan_mask(self, query_length, key_length, block_size)

    def to_dense(self, query_length: int, key_length: int | None = None) -> Array:
        """Boolean ``[T, S]``, or ``[B or 1, N or 1, T, S]`` where data say so."""
        from attnlab._src.masks.planning import dense_mask

        return dense_mask(self, query_length, key_length)

    def density(self, query_length: int, key_length: int | None = None) -> float:
        """The fraction of query-key pairs that are visible, exactly."""
        from attnlab._src.masks.liveness import mask_density

        return mask_density(self, query_length, key_length)

    #: NumPy leaves ``array & mask`` to the mask.
    __array_ufunc__ = None

    def __and__(self, other: Any) -> "Mask":
        from attnlab._src.masks.algebra import And

        return And((self, _part(other)))

    def __or__(self, other: Any) -> "Mask":
        from attnlab._src.masks.algebra import Or

        return Or((self, _part(other)))

    __rand__ = __and__
    __ror__ = __or__

    def __invert__(self) -> "Mask":
        from attnlab._src.masks.algebra import Not

        return Not(self)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a mask has no truth value: combine masks with '&', '|' and '~', "
            "not with 'and', 'or' and 'not'; test for None with 'mask is None'"
        )


#: What a class that changes ``visible``, and says no more, has of these.
_UNKNOWN: dict[str, Any] = {
    name: getattr(Mask, name)
    for name in ("bounds", "may_be_alive", "sees_itself", "alive_sees_itself", "grain")
}


def as_mask(mask: Any) -> Mask:
    """None -> everything; a boolean array -> that array; a mask -> itself."""
    from attnlab._src.masks.data import dense

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
    hint = f"; call it: {mask.__name__}(...)" if hasattr(mask, "__name__") else ""
    raise TypeError(
        f"mask: expected an attnlab mask, a boolean array or None, "
        f"got {type(mask).__name__}{hint}"
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


def full() -> Mask:
    """Every query may attend to every key."""
    return Full()
