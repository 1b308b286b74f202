"""A mask of your own, which tells the blocks that it hides.

``visible`` says which pairs may attend, from their positions. ``bounds`` says the same
of whole blocks, so that hidden blocks cost nothing; without it the mask is right, and
every block is computed. A rule that needs no ``bounds`` needs no class either:
``masks.predicate``.
"""

import numpy as np

from attnlab import extend, masks


@extend.pytree
class FromGroup(extend.Mask):
    """Each query sees all keys from the first of its group of ``size`` positions on.

    Attributes:
        size: positions in a group; structure, so another size compiles again.
    """

    size: int = extend.static()

    def visible(self, tile, operands):
        """Boolean ``[q, k]`` from ``[q, 1]`` and ``[1, k]`` positions."""
        return tile.key_positions >= tile.query_positions // self.size * self.size

    def bounds(self, rows, cols, operands):
        """Blocks of ``cols`` that may be visible, and those that surely are.

        ``rows`` are blocks of queries, or of keys when the transpose is planned.
        ``rows_lo`` and ``rows_hi`` are the least and the greatest position in each.
        """
        lo, hi = rows.rows_lo, rows.rows_hi
        if rows.side == "query":
            far = np.full_like(lo, 2**31 - 1)  # to the end
            some = cols.touched(lo // self.size * self.size, far)
            every = cols.covered(hi // self.size * self.size, far)
        else:  # a key is seen by the queries of its own group and of earlier ones
            zero = np.zeros_like(lo)
            some = cols.touched(zero, hi // self.size * self.size + self.size)
            every = cols.covered(zero, lo // self.size * self.size + self.size)
        return some, every


def main() -> None:
    mask = FromGroup(size=8)
    print(extend.check(mask))
    print(
        "alone:", mask.density(64), "causal too:", (mask & masks.causal()).density(64)
    )


if __name__ == "__main__":
    main()
