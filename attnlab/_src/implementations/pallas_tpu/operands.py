"""Operands as a kernel reads them.

Logits are transposed in the kernels, ``[keys, queries]``: sums for a query are then
along sublanes, and a small head size wastes no lanes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.visibility import WORD
from attnlab._src.types import Array


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
