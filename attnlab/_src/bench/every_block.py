"""A mask for estimates of blocks that need one."""

import numpy as np

from attnlab._src.masks.base import Mask
from attnlab._src.masks.geometry import Blocks as Sides
from attnlab._src.masks.rule import Bounds
from attnlab._src.types import Array, PyTree, Tile, pytree


@pytree
class EveryBlock(Mask):
    """Another mask, which is evaluated in every block, as if all were partial."""

    part: Mask

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        return self.part.operands(query_length, key_length)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        return self.part.visible(tile, operands)

    def bounds(self, rows: Sides, cols: Sides, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        where = np.ones((1, 1, rows.count), bool)
        return cols.every(where), cols.every(~where)
