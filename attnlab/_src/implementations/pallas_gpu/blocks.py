"""Block sizes of the kernels."""

from typing import NamedTuple

#: Rows of a tile of logits that a warpgroup computes.
ROWS = 64
#: Numbers of 16 bits in 128 bytes, the widest swizzle. Head sizes are padded to it.
LANES = 64


class Blocks(NamedTuple):
    """Sizes of a pass.

    Attributes:
        warpgroups: how many compute; each has 64 rows of a tile of logits.
        columns: columns of a tile of logits.
        slots: blocks of the other side that are copied ahead.
    """

    warpgroups: int
    columns: int
    slots: int

    @property
    def rows(self) -> int:
        """Rows of all warpgroups together."""
        return self.warpgroups * ROWS

    @property
    def lanes(self) -> int:
        """Numbers in a row of swizzled shared memory.

        A product takes whole rows of its left operand, which may be a tile of logits.
        """
        return min(LANES, self.columns)


#: By pass and head size (the greater of those of keys and of values): the largest
#: blocks whose registers are not spilled on compute capability 9.0.
BLOCKS = {
    ("forward", 64): Blocks(2, 128, 2),
    ("forward", 128): Blocks(2, 128, 2),
    ("query", 64): Blocks(2, 64, 2),
    ("query", 128): Blocks(2, 64, 2),
    ("key", 64): Blocks(2, 64, 2),
    ("key", 128): Blocks(2, 32, 2),
}
