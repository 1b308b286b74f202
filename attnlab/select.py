"""Which blocks of keys, or which keys, each query should see: chosen by scores."""

from attnlab._src.ops.selection.blocks import top_blocks as top_blocks
from attnlab._src.ops.selection.indexing import index_loss as index_loss
from attnlab._src.ops.selection.keys import top_keys as top_keys
from attnlab._src.ops.selection.pool import pool as pool

__all__ = ["index_loss", "pool", "top_blocks", "top_keys"]
