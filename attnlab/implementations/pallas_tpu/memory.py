"""Vector memory that a kernel needs, before the compiler says so."""

import jax

from attnlab.implementations.pallas_tpu.blocks import Blocks
from attnlab.types import AttentionInputs

#: The gradients of a segment of queries get this part of the memory: one by this.
SEGMENT = 8
#: Tiles of float32 that are alive at once, in each pass; measured with the compiler.
_TILES = {"forward": 3, "backward": 5}


def segment_of(inputs: AttentionInputs, blocks: Blocks, limit: int) -> int:
    """Blocks of queries in a segment of the backward pass.

    Args:
        inputs: the canonical record.
        blocks: sizes.
        limit: bytes that a kernel may take.
    """
    s = inputs.sizes
    one = s.N // s.K * _block(s.P, blocks.q, 4)
    return min(max(limit // SEGMENT // one, 1), -(-s.T // blocks.q))


def _block(rows: int, lanes: int, size: int) -> int:
    """Bytes of an array as it lies in memory, in tiles of 8 x 128 words."""
    return -(-rows // 8) * 8 * -(-lanes // 128) * 128 * size


def bytes_needed(inputs: AttentionInputs, blocks: Blocks, of: str, limit: int) -> int:
    """An estimate from above.

    Args:
        inputs: the canonical record.
        blocks: sizes.
        of: "forward" or "backward".
        limit: bytes that a kernel may take.
    """
    s = inputs.sizes
    item = inputs.query.dtype.itemsize

    # What comes and goes is there twice: one is computed with, one is on its way.
    sides = _block(s.P, blocks.q, item) + _block(blocks.k, s.P, item)
    sides += _block(s.D, blocks.k, item)
    results = _block(s.D, blocks.q, 4) + _block(1, blocks.q, 4)
    tiles = _TILES[of] * _block(blocks.chunk, blocks.q, 4)
    for x in jax.tree.leaves((inputs.modifier_operands, inputs.mask_operands)):
        if min(x.shape[2:4]) > 1:
            sides += _block(blocks.q, blocks.k, x.dtype.itemsize)
            tiles += _block(blocks.chunk, blocks.q, 4)
    if of == "forward":
        return 2 * (sides + results) + _block(s.D, blocks.q, 4) + tiles
    sides += _block(s.P, blocks.q, item) + _block(s.P, blocks.k, item)
    results = _block(blocks.k, s.P, 4) + _block(blocks.k, s.D, 4)
    segment = s.N // s.K * segment_of(inputs, blocks, limit)
    segment *= _block(s.P, blocks.q, 4)
    learned = sum(
        _block(blocks.q, blocks.k, 4)
        for x in jax.tree.leaves(inputs.modifier_operands)
        if min(x.shape[2:4]) > 1
    )
    return 2 * (sides + results + segment + learned) + tiles
