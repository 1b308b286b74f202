"""Operands as a kernel reads them, and the evaluation of masks in a kernel.

Logits are transposed in the kernels, ``[keys, queries]``: sums for a query are then
along sublanes, and a small head size wastes no lanes. A function that is elementwise
over pairs works on a tile of either orientation. Other masks reach the kernel as bits,
which XLA computes for partial blocks; other modifiers are not supported.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab._src.exact import exactly
from attnlab._src.implementations.pallas_tpu.elementwise import mask_is_elementwise
from attnlab._src.implementations.schedule import Row, Tiles
from attnlab._src.masks.base import And, Mask, Not, Or
from attnlab._src.masks.rule import checked_visible, visible_pairs
from attnlab._src.types import Array, PyTree, Tile

#: Number of keys whose bits share a word.
WORD = 32


class Place(NamedTuple):
    """Indices of a step: example, query head, block of queries, block of keys."""

    example: int | Array
    head: int | Array
    row: int | Array
    col: int | Array


class Reader(NamedTuple):
    """An array for a kernel, and how the kernel reads it.

    Attributes:
        array: the array passed to the kernel.
        spec: its block specification.
        read: ``read(reference, place, first, size)``: returns ``[size, queries]`` for
            keys ``first`` to ``first + size`` of the block, or a scalar.
    """

    array: Array
    spec: pl.BlockSpec
    read: Callable[[Any, Place, int, int], Array]


class Readers:
    """The arrays of a kernel other than queries, keys and values."""

    def __init__(self, tiles: Tiles, place: Callable[..., Place]):
        """Starts without arrays.

        Args:
            tiles: tiles of the inputs, with the kernel's block sizes.
            place: returns the place of a step, from grid indices and words of steps.
        """
        self.tiles, self.place = tiles, place
        self.readers: list[Reader] = []

    def add(self, x: Array, fill: int | None = None) -> int:
        """Adds an operand ``[B or 1, N or 1, T or 1, S or 1]``; returns its number."""
        block_q, block_k = self.tiles.bq, self.tiles.bk
        x = self.tiles.pad(x, fill)
        along_q, along_k = x.shape[2] > 1, x.shape[3] > 1
        is_bool, pairs = x.dtype == jnp.bool_, along_q and along_k
        if is_bool:
            x = x.astype(jnp.int8)
        if not pairs:
            x = _widened(x)

        def typed(x: Array) -> Array:
            return x != 0 if is_bool else x

        if pairs:
            shape = block_q, block_k

            def read(ref: Any, at: Place, first: int, size: int) -> Array:
                return typed(_widened(ref[:, first : first + size]).T)

        elif along_q:
            x, shape = x.swapaxes(2, 3), (1, block_q)

            def read(ref: Any, at: Place, first: int, size: int) -> Array:
                return typed(jnp.broadcast_to(ref[...], (size, block_q)))

        elif along_k:
            shape = 1, block_k

            def read(ref: Any, at: Place, first: int, size: int) -> Array:
                column = ref[:, first : first + size].T
                return typed(jnp.broadcast_to(column, (size, block_q)))

        else:
            heads = x.shape[1]

            def read(ref: Any, at: Place, first: int, size: int) -> Array:
                example, head = _own(x, at)
                return typed(ref[example * heads + head])

            spec = pl.BlockSpec(memory_space=pltpu.SMEM)
            return self._add(Reader(x.reshape(-1), spec, read))

        def index(*index: Any) -> tuple[int | Array, ...]:
            at = self.place(*index)
            if pairs:
                return *_own(x, at), at.row, at.col
            return *_own(x, at), 0, at.row if along_q else at.col

        return self._add(Reader(x, pl.BlockSpec((None, None, *shape), index), read))

    def add_words(self, words: Array) -> int:
        """Adds bits ``[B or 1, N or 1, keys / WORD, queries]``; returns the number."""

        def read(ref: Any, at: Place, first: int, size: int) -> Array:
            rows = ref[first // WORD : (first + size) // WORD, :]
            rows = jnp.repeat(rows, WORD, axis=0)
            bit = lax.broadcasted_iota(jnp.int32, rows.shape, 0) % WORD
            return (lax.shift_right_logical(rows, bit) & 1) != 0

        def index(*index: Any) -> tuple[int | Array, ...]:
            at = self.place(*index)
            return *_own(words, at), at.col, at.row

        shape = self.tiles.bk // WORD, self.tiles.bq
        return self._add(Reader(words, pl.BlockSpec((None, None, *shape), index), read))

    def _add(self, reader: Reader) -> int:
        self.readers.append(reader)
        return len(self.readers) - 1


def _own(x: Array, at: Place) -> tuple[int | Array, int | Array]:
    """Indices of a place into the leading axes of ``[B or 1, N or 1, ...]``."""
    return at.example if x.shape[0] > 1 else 0, at.head if x.shape[1] > 1 else 0


def _widened(x: Array) -> Array:
    """Converts to at least 32 bits, as scalar memory and transposition need."""
    if x.dtype.itemsize >= 4:
        return x
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


#: ``visible(tile, read) -> bool [keys, queries]``; ``read(number)`` reads an operand.
Visible = Callable[[Tile, Callable[[int], Array]], Array]


def visibility(
    mask: Mask, operands: PyTree, readers: Readers, make_bits: Callable[..., Array]
) -> Visible:
    """A function that evaluates the mask in a kernel.

    Args:
        mask: the mask without its arrays.
        operands: its operands.
        readers: the arrays that it reads are added to these.
        make_bits: ``(mask, operands) -> words``, for a part that is not elementwise.
    """
    if exactly(mask, And, Or):
        parts = [
            visibility(m, o, readers, make_bits)
            for m, o in zip(mask.parts, operands, strict=True)
        ]
        join = jnp.logical_and if exactly(mask, And) else jnp.logical_or
        return lambda tile, read: functools.reduce(join, [p(tile, read) for p in parts])
    if exactly(mask, Not):
        part = visibility(mask.part, operands, readers, make_bits)
        return lambda tile, read: ~part(tile, read)
    if not mask_is_elementwise(mask, operands):
        number = readers.add_words(make_bits(mask, operands))
        return lambda tile, read: read(number)
    numbers = jax.tree.map(readers.add, operands)
    return lambda tile, read: checked_visible(mask, tile, jax.tree.map(read, numbers))


def bits(mask: Mask, operands: PyTree, tiles: Tiles) -> Array:
    """A mask as bits, in words of ``WORD`` keys for each query.

    Args:
        mask: the mask without its arrays.
        operands: its operands.
        tiles: tiles of the inputs, with the plan. Its columns, if it has them, say
            which blocks are partial; its rows may differ.

    Returns:
        int32 ``[B or 1, N or 1, keys / WORD, queries]``, zero outside partial blocks.
    """
    inputs, plan = tiles.inputs, tiles.plan
    by_key = plan.cols is not None
    partial = (plan.cols or plan.rows).partial
    lo, hi = (jnp.asarray(x, jnp.int32) for x in partial)
    operands = jax.tree.map(tiles.pad, operands)
    positions = (
        tiles.pad(inputs.query_positions, -1),
        tiles.pad(inputs.key_positions, -1),
    )
    leaves = [*positions, lo, *jax.tree.leaves(operands)]
    batch = max(x.shape[0] for x in leaves)
    heads = max(mask.head_count, *(x.shape[1] for x in leaves))
    shape = batch, heads, tiles.nk * tiles.bk // WORD, tiles.nq * tiles.bq
    words = jnp.zeros(shape, jnp.int32)
    shift = jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]
    lines, bounds = lo.shape[2:]
    if bounds == 0:
        return words

    def interval(number: Array, words: Array) -> Array:
        """Fills the partial blocks of one interval of a row or column of the plan."""
        line = number // bounds
        example, head = line // (heads * lines), line // lines % heads
        line = line % lines
        at = (example if lo.shape[0] > 1 else 0, head if lo.shape[1] > 1 else 0, line)
        first, stop = lo[at][number % bounds], hi[at][number % bounds]

        def block(other: Array, words: Array) -> Array:
            row, col = (other, line) if by_key else (line, other)
            where = Row(example, head, row)
            t, s, own = jax.tree.map(
                lambda x: tiles.cut(x, where, col[None]), (*positions, operands)
            )
            seen = visible_pairs(mask, Tile(t, s, head), own)
            seen = jnp.broadcast_to(seen, (tiles.bq, tiles.bk)).T
            seen = seen.reshape(-1, WORD, tiles.bq).astype(jnp.uint32)
            found = (seen << shift).sum(1, dtype=jnp.uint32)
            found = lax.bitcast_convert_type(found, jnp.int32)[None, None]
            start = example, head, col * (tiles.bk // WORD), row * tiles.bq
            start = [jnp.asarray(n, jnp.int32) for n in start]
            return lax.dynamic_update_slice(words, found, start)

        return lax.fori_loop(first, stop, block, words)

    count = batch * heads * lines * bounds
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), interval, words)
