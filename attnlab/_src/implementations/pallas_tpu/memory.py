"""Estimates the vector memory of a kernel before it is compiled."""

from typing import NoReturn

import jax
import jax.numpy as jnp

from attnlab._src.implementations.elementwise import needs_bits
from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.implementations.pallas_tpu.comparison import comparison
from attnlab._src.implementations.visibility import WORD
from attnlab._src.types import Array, AttentionInputs

#: Gradients of a segment of queries get at most 1 / SEGMENT of the memory.
SEGMENT = 8
#: Number of float32 tiles that are live at once in each pass; from the compiler.
_TILES = {"forward": 3, "backward": 5}


def segment_of(inputs: AttentionInputs, blocks: Blocks, limit: int) -> int:
    """Number of blocks of queries in a segment of the backward pass.

    Args:
        inputs: the canonical record.
        blocks: block sizes.
        limit: bytes of vector memory that a kernel may use.
    """
    s = inputs.sizes
    one = s.N // s.K * _block(s.P, blocks.q, 4)
    return min(max(limit // SEGMENT // one, 1), -(-s.T // blocks.q))


def _block(rows: int, lanes: int, size: int) -> int:
    """Bytes of an array in memory, padded to tiles of 8 x 128 words."""
    sublanes = 8 * max(4 // size, 1)
    return -(-rows // sublanes) * sublanes * -(-lanes // 128) * 128 * size


def _bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a float32 array in memory."""
    rows, lanes = shape
    return _block(rows, lanes, 4)


def bytes_needed(inputs: AttentionInputs, blocks: Blocks, of: str, limit: int) -> int:
    """An upper estimate of the bytes of a kernel: declared arrays and live tiles.

    Args:
        inputs: the canonical record.
        blocks: block sizes.
        of: "forward" or "backward".
        limit: bytes of vector memory that a kernel may use.
    """
    s, (q, k, chunk) = inputs.sizes, blocks
    compare = comparison(inputs)
    item = jnp.dtype(compare.dtype).itemsize
    tile = _block(chunk, q, 4)
    kept = sum(_bytes(x.shape) for x in compare.room(blocks, of))
    alive = _TILES[of] * tile
    moved = _block(s.P, q, item) + _block(k, s.P, item)
    moved += max(_block(*x, inputs.value.dtype.itemsize) for x in ((s.D, k), (k, s.D)))
    moved += needs_bits(inputs.mask, inputs.mask_operands) * _block(k // WORD, q, 4)
    given = inputs.modifier_operands, inputs.mask_operands, inputs.dropout_words
    for x in jax.tree.leaves((given, inputs.query_positions, inputs.key_positions)):
        if min(x.shape[2:4]) > 1:
            moved += _block(q, k, x.dtype.itemsize)
            alive += tile
        else:
            moved += _block(1, q, 4) * (x.shape[2] > 1)
            moved += _block(1, k, 4) * (x.shape[3] > 1)
    moved += sum(map(_bytes, _parameters(inputs)))
    if of == "forward":
        results = _block(s.D, q, 4) + _block(1, q, 4)
        kept += _block(s.D, q, 4) + _block(8, q, 4) + _block(1, q, 4)
        return 2 * (moved + results) + kept + alive

    group = s.N // s.K
    rows = segment_of(inputs, blocks, limit) * q
    moved += _block(q, s.D, 4) + 2 * _block(1, q, 4) + _block(s.P, k, item)
    results = _block(k, s.P, 4) + _block(k, s.D, 4) + group * _block(s.P, rows, 4)
    for x in jax.tree.leaves(inputs.modifier_operands):
        along_q, along_k = x.shape[2] > 1, x.shape[3] > 1
        if along_q and along_k:
            results += _block(q, k, 4)
        elif along_k:
            results += group * _block(1, k, 4)
            kept += group * _block(k, 128, 4)
        else:
            results += group * _block(8, rows if along_q else q, 4)
    results += group * sum(map(_bytes, _gradients(inputs, blocks)))
    kept += _block(s.P, q, 4)
    return 2 * (moved + results) + kept + alive


def _parameters(inputs: AttentionInputs) -> list[tuple[int, ...]]:
    """Shapes of the score's parameters of one head."""

    def arrays(inputs: AttentionInputs) -> list[Array]:
        return [reader.array for reader in comparison(inputs).params(_nowhere)]

    return [x.shape[2:] for x in jax.eval_shape(arrays, inputs)]


def _gradients(inputs: AttentionInputs, blocks: Blocks) -> list[tuple[int, ...]]:
    """Shapes of the sums for these parameters' gradients."""

    def arrays(inputs: AttentionInputs) -> list[Array]:
        shapes = comparison(inputs).gradient_shapes(blocks)
        return [jnp.zeros(shape) for shape in shapes]

    return [x.shape for x in jax.eval_shape(arrays, inputs)]


def _nowhere(*_: object) -> NoReturn:
    """A ``place`` that must not be called, as only shapes are needed."""
    raise AssertionError
