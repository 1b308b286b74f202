"""A mask of your own, with bounds of its visible blocks.

``visible`` says which pairs may attend, from their positions. ``bounds`` says it for
whole blocks, so that kernels skip hidden blocks; without ``bounds`` the results are the
same, but every block is computed. A rule without ``bounds`` needs no class: use
``masks.predicate``.
"""

import numpy as np

from attnlab import extend, masks


@extend.pytree
class FromGroup(extend.Mask):
    """Each query sees the keys from the start of its group of ``size`` positions on.

    Attributes:
        size: positions in a group; static, so another size recompiles.
    """

    size: int = extend.static()

    def visible(self, tile, operands):
        """Boolean ``[q, k]`` from ``[q, 1]`` and ``[1, k]`` positions."""
        return tile.key_positions >= tile.query_positions // self.size * self.size

    def bounds(self, rows, cols, operands):
        """Blocks of ``cols`` with some visible pair, and those with no hidden one.

        ``rows`` are blocks of queries or, for the gradients of keys and values, of
        keys. ``rows_lo`` and ``rows_hi`` are the least and the greatest position in
        each.
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
