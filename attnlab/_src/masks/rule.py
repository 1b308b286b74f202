"""What planning needs of a mask: visible pairs, bounds of blocks, live slots."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.geometry import Blocks
from attnlab._src.types import Array, Intervals, PyTree, Tile

Bounds = tuple[Intervals, Intervals]


def visible_pairs(mask: "Rule", tile: Tile, operands: PyTree) -> Array:
    """The visible pairs of a tile, without empty slots: boolean ``[q, k]``."""
    occupied = (tile.query_positions >= 0) & (tile.key_positions >= 0)
    return checked_visible(mask, tile, operands) & occupied


def checked_visible(mask: "Rule", tile: Tile, operands: PyTree) -> Array:
    """``mask.visible`` of a tile, checked.

    Raises:
        TypeError: if it yields no booleans, or fails.
        ValueError: if its shape does not fit the tile, or it fails with a ValueError.
    """
    pairs = jnp.broadcast_shapes(tile.query_positions.shape, tile.key_positions.shape)
    where = f"for a tile of {pairs[0]} queries and {pairs[1]} keys"
    try:
        seen = mask.visible(tile, operands)
        got = jnp.result_type(seen)
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        if _parts(mask):
            raise  # the part that fails is named already
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


class Rule:
    """The base of :class:`attnlab.extend.Mask`, which is the class to subclass."""

    def __init_subclass__(cls, **options: Any):
        """Drops what bases say of blocks and slots where ``visible`` is overridden."""
        super().__init_subclass__(**options)
        for name, unknown in _UNKNOWN.items():
            owner = next(c for c in cls.__mro__ if name in c.__dict__)
            theirs = getattr(owner, "visible", None)
            if theirs not in (cls.visible, Rule.visible, None):
                setattr(cls, name, unknown)

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """The arrays that ``visible`` needs, as a pytree of ``Operand``.

        Raises:
            ValueError: if the mask was built for other lengths.
        """
        return ()

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """Boolean ``[q, k]`` (or broadcasting to it) for one tile.

        Empty slots (position -1) need no care: they are hidden whatever this returns.

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
            pair, the second at most the blocks whose pairs are all visible. By default:
            every block, and none.
        """
        where = np.ones((1, 1, rows.count), bool)
        return cols.every(where), cols.every(~where)

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """An operand that is False only in dead slots of a side; None: not known."""
        return None

    @property
    def sees_itself(self) -> bool:
        """Whether each position surely sees the same position, by structure alone."""
        return False

    @property
    def alive_sees_itself(self) -> bool:
        """Whether each slot that ``may_be_alive`` on either side surely sees itself."""
        return self.sees_itself

    @property
    def block_multiples(self) -> tuple[int, int] | None:
        """Queries and keys in a block, for a mask that is made of blocks; else None.

        If the block sizes of a plan divide them, no block needs to be partial.
        """
        return None

    @property
    def head_count(self) -> int:
        """How many heads have masks of their own; 1: all heads share one mask."""
        return max((part.head_count for part in _parts(self)), default=1)

    def check_heads(self, heads: int) -> None:
        """Checks that the mask fits a number of query heads.

        Raises:
            ValueError: if it has masks for another number of heads.
        """
        for part in _parts(self):
            part.check_heads(heads)


def _parts(rule: Rule) -> list[Rule]:
    """The masks that the fields of a mask hold."""

    def is_part(x: Any) -> bool:
        return isinstance(x, Rule) and x is not rule

    return list(filter(is_part, jax.tree.leaves(rule, is_leaf=is_part)))


#: The defaults for a class that overrides ``visible`` and not these.
_UNKNOWN: dict[str, object] = {
    name: getattr(Rule, name)
    for name in (
        "bounds",
        "may_be_alive",
        "sees_itself",
        "alive_sees_itself",
        "block_multiples",
    )
}
