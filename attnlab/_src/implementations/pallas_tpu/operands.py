"""Operands as a kernel reads them, and the functions of pairs that it can evaluate.

Logits lie transposed in the kernels, ``[keys, queries]``: what is summed for a query is
then summed along sublanes, and a small head size wastes no lanes. Any function of a
pair that looks at one pair at a time works on a tile of either orientation; others
reach the kernel as bits, made by XLA where blocks are partial (masks), or are refused.
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
from attnlab._src.masks.rule import seen_by, visible_pairs
from attnlab._src.types import Array, PyTree, Tile

#: Keys whose bits share a word.
WORD = 32


class Place(NamedTuple):
    """Which blocks a step reads: example, query head, block of queries, of keys."""

    example: Any
    head: Any
    row: Any
    col: Any


class Reader(NamedTuple):
    """An array for a kernel.

    Attributes:
        array: as the kernel takes it.
        spec: how it is cut.
        read: ``read(reference, place, first, size)``: for keys ``first`` to ``first +
            size`` of the block, ``[size, queries]``, or a scalar.
    """

    array: Array
    spec: pl.BlockSpec
    read: Callable[[Any, Place, int, int], Array]


class Readers:
    """The arrays that a kernel takes beside queries, keys and values."""

    def __init__(self, tiles: Tiles, place: Callable[..., Place]):
        """Nothing yet.

        Args:
            tiles: of the inputs, in blocks of the kernel's sizes.
            place: of a step, from the indices of the grid and the words of the steps.
        """
        self.tiles, self.place = tiles, place
        self.readers: list[Reader] = []

    def add(self, x: Array, fill: Any = None) -> int:
        """An operand ``[B or 1, N or 1, T or 1, S or 1]``; its number."""
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

        def index(*index: Any) -> tuple[Any, ...]:
            at = self.place(*index)
            if pairs:
                return *_own(x, at), at.row, at.col
            return *_own(x, at), 0, at.row if along_q else at.col

        return self._add(Reader(x, pl.BlockSpec((None, None, *shape), index), read))

    def add_words(self, words: Array) -> int:
        """Bits ``[B or 1, N or 1, keys / WORD, queries]``; their number."""

        def read(ref: Any, at: Place, first: int, size: int) -> Array:
            rows = ref[first // WORD : (first + size) // WORD, :]
            rows = jnp.repeat(rows, WORD, axis=0)
            bit = lax.broadcasted_iota(jnp.int32, rows.shape, 0) % WORD
            return (lax.shift_right_logical(rows, bit) & 1) != 0

        def index(*index: Any) -> tuple[Any, ...]:
            at = self.place(*index)
            return *_own(words, at), at.col, at.row

        shape = self.tiles.bk // WORD, self.tiles.bq
        return self._add(Reader(words, pl.BlockSpec((None, None, *shape), index), read))

    def _add(self, reader: Reader) -> int:
        self.readers.append(reader)
        return len(self.readers) - 1


def _own(x: Array, at: Place) -> tuple[Any, Any]:
    """Where a place finds its own in ``[B or 1, N or 1, ...]``."""
    return at.example if x.shape[0] > 1 else 0, at.head if x.shape[1] > 1 else 0


def _widened(x: Array) -> Array:
    """In words of 32 bits, as scalar memory and transposing want them."""
    if x.dtype.itemsize >= 4:
        return x
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


#: ``evaluate(tile, read) -> bool [keys, queries]``, ``read`` an operand by its number.
Visible = Callable[[Tile, Callable[[int], Array]], Array]


def visibility(
    mask: Mask, operands: PyTree, readers: Readers, make_bits: Callable[..., Array]
) -> Visible:
    """A mask as a kernel evaluates it.

    Args:
        mask: skeleton.
        operands: its operands.
        readers: get what it reads.
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
    return lambda tile, read: seen_by(mask, tile, jax.tree.map(read, numbers))


def bits(mask: Mask, operands: PyTree, tiles: Tiles) -> Array:
    """A word of ``WORD`` keys for each query, where the plan's blocks are partial.

    Args:
        mask: skeleton.
        operands: its operands.
        tiles: of the inputs and the plan; its columns say what is partial if it has
            them, for they need not say the same as its rows.

    Returns:
        int32 ``[B or 1, N or 1, keys / WORD, queries]``, zero where none is partial.
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
        """Partial blocks of one line."""
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
