"""Operands as a kernel reads them, from global memory into registers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab._src.implementations.pallas_gpu.call import (
    BY_COLUMN,
    BY_ROW,
    TILE,
    along,
    load,
    spread,
)
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.visibility import WORD
from attnlab._src.types import Array


class Place(NamedTuple):
    """A tile of logits.

    Attributes:
        example: index of the example.
        head: index of the query head.
        query: number of its first query.
        key: number of its first key.
        shape: queries and keys, or keys and queries if it is transposed.
    """

    example: Array
    head: Array
    query: Array
    key: Array
    shape: tuple[int, int]


class Readers:
    """The arrays of a kernel other than queries, keys and values."""

    def __init__(self, tiles: Tiles, transposed: bool):
        """Starts without arrays.

        Args:
            tiles: tiles of the inputs, with the kernel's block sizes.
            transposed: whether tiles of logits are ``[keys, queries]``.
        """
        self._tiles, self._transposed = tiles, transposed
        self.arrays: list[Array] = []
        self._kinds: list[str] = []
        self._bool: list[bool] = []

    def add(self, x: Array, fill: int | None = None) -> int:
        """Adds an operand ``[B or 1, N or 1, T or 1, S or 1]``; returns its number.

        It must not run along both T and S.
        """
        x = self._tiles.pad(x, fill)
        is_bool = x.dtype == jnp.bool_
        if is_bool:
            x = x.astype(jnp.int32)
        elif x.dtype.itemsize < 4:
            floating = jnp.issubdtype(x.dtype, jnp.floating)
            x = x.astype(jnp.float32 if floating else jnp.int32)
        along_q, along_k = x.shape[2] > 1, x.shape[3] > 1
        if along_q or along_k:
            x, kind = x.reshape(*x.shape[:2], -1), "queries" if along_q else "keys"
        else:
            x, kind = x.reshape(x.shape[:2]), "scalar"
        return self._add(x, kind, is_bool)

    def add_words(self, words: Array) -> int:
        """Adds bits ``[B or 1, N or 1, keys / WORD, queries]``; returns the number."""
        return self._add(words, "words", False)

    def _add(self, x: Array, kind: str, is_bool: bool) -> int:
        self.arrays.append(x)
        self._kinds.append(kind)
        self._bool.append(is_bool)
        return len(self.arrays) - 1

    def read(self, number: int, refs: Sequence[Any], at: Place) -> Array:
        """The operand with this number, as a tile."""
        ref, x, kind = refs[number], self.arrays[number], self._kinds[number]
        own = (at.example if x.shape[0] > 1 else 0, at.head if x.shape[1] > 1 else 0)
        rows, columns = at.shape
        starts = (at.key, at.query) if self._transposed else (at.query, at.key)
        if kind == "words":
            found = self._read_words(ref.at[own], at)
        elif kind == "scalar":
            found = spread(ref[own], at.shape)
        elif (kind == "queries") is self._transposed:
            found = load(ref.at[*own, pl.ds(starts[1], columns)], BY_COLUMN)
            found = along(found, at.shape, 1)
        else:
            found = load(ref.at[*own, pl.ds(starts[0], rows)], BY_ROW)
            found = along(found, at.shape, 0)
        return found != 0 if self._bool[number] else found

    def _read_words(self, ref: Any, at: Place) -> Array:
        """The bits of a tile, as booleans."""
        axis = 0 if self._transposed else 1
        keys, queries = at.shape[axis], at.shape[1 - axis]
        key = iota(at.shape, axis)
        found = None
        for n in range(keys // WORD):
            row = lax.div(at.key, jnp.int32(WORD)) + n
            layout = BY_COLUMN if self._transposed else BY_ROW
            word = load(ref.at[row, pl.ds(at.query, queries)], layout)
            word = along(word, at.shape, 1 - axis)
            found = word if found is None else jnp.where(key < n * WORD, found, word)
        assert found is not None
        bit = lax.shift_right_logical(found, key & (WORD - 1))
        return (bit & 1) != 0


def iota(shape: tuple[int, int], axis: int) -> Array:
    """The numbers of the rows or columns of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
