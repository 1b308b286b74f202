"""How ``tiled`` and ``batched`` cut a plan into rows, chunks of live blocks, tiles."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.implementations.tile import squeeze_params, widened
from attnlab._src.masks.planning import plan_of
from attnlab._src.operands import corner, cut
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionInputs,
    Plan,
    PyTree,
)

#: Default number of keys in a chunk; with fewer keys a core is idle.
CHUNK = 512
#: Greatest number of keys in a chunk; chunks of full blocks have this size.
LONGEST_CHUNK = 1024
#: Constant cost of a chunk, in pairs.
_CHUNK_OVERHEAD = 2**15


class Walk(NamedTuple):
    """The plan in the order in which rows walk it.

    The live blocks of a row are numbered by ranks: full blocks, then partial ones.

    Attributes:
        lo: ``[Bp, Np, rows, m]``, first block of each interval.
        end: ``[Bp, Np, rows, m]``, rank at which each interval ends.
        full: ``[Bp, Np, rows]``, number of full blocks.
        total: ``[Bp, Np, rows]``, number of live blocks.
        wide: number of blocks in a chunk of full blocks only.
        chunk: number of blocks in a chunk of the remaining blocks.
        one_chunk: whether every row is exactly one chunk.
        any_full: whether some row may have a chunk of full blocks only.
        any_rest: whether some row may have another chunk.
    """

    lo: ArrayLike
    end: ArrayLike
    full: ArrayLike
    total: ArrayLike
    wide: int
    chunk: int
    one_chunk: bool
    any_full: bool
    any_rest: bool

    def chunks(self) -> tuple[ArrayLike, ArrayLike]:
        """Number of chunks of full blocks, and of others, each ``[Bp, Np, rows]``."""
        fulls = self.full // self.wide
        return fulls, -(-(self.total - fulls * self.wide) // self.chunk)


def make_walk(plan: Plan) -> Walk:
    """Ranks the live blocks of each row, and chooses the size of chunks."""
    full, partial = plan.rows
    xp = np if plan.is_static else jnp
    lo = xp.concatenate([full.lo, partial.lo], -1)
    hi = xp.concatenate([full.hi, partial.hi], -1)
    end = xp.maximum(hi - lo, 0).cumsum(-1).astype(np.int32)
    fulls = full.per_row().astype(np.int32)
    total = end[..., -1:].sum(-1).astype(np.int32)
    count = -(-plan.key_length // plan.block_k)
    wide = min(max(LONGEST_CHUNK // plan.block_k, 1), count)
    chunk = min(max(CHUNK // plan.block_k, 1), count)
    walk = Walk(lo, end, fulls, total, wide, chunk, False, full.lo.shape[-1] > 0, True)
    if not plan.is_static:
        return walk
    most = int(total.max(initial=0))
    if 0 < most <= wide:
        return walk._replace(
            full=np.zeros_like(fulls), chunk=most, one_chunk=True, any_full=False
        )

    def executed(chunk: int) -> int:
        pairs = chunk * plan.block_k * plan.block_q
        return int(walk._replace(chunk=chunk).chunks()[1].sum()) * (
            pairs + _CHUNK_OVERHEAD
        )

    walk = walk._replace(chunk=min(range(1, wide + 1), key=executed))
    in_full, in_rest = walk.chunks()
    return walk._replace(any_full=bool(in_full.any()), any_rest=bool(in_rest.any()))


class Row(NamedTuple):
    """Indices of a row of the walk: example, query head, block of queries."""

    example: Array
    head: Array
    block: Array


class Tiles:
    """Cuts tiles out of the inputs, and adds tiles into accumulators."""

    def __init__(self, inputs: AttentionInputs, plan: Plan):
        self.inputs, self.plan = inputs, plan
        self.sizes = inputs.sizes
        self.bq, self.bk = plan.block_q, plan.block_k
        self.nq = -(-self.sizes.T // self.bq)
        self.nk = -(-self.sizes.S // self.bk)
        self.walk = make_walk(plan)

    @classmethod
    def of(cls, inputs: AttentionInputs, sizes: tuple[int, int]) -> "Tiles":
        """Of a plan by rows, with blocks of these sizes."""
        return cls(inputs, plan_of(inputs, sizes, cols=False))

    def pad(self, x: Array, fill: int | None = None) -> Array:
        """Pads an operand's axes of length T and S to whole blocks.

        Without ``fill``, the padding repeats the last entries, not zeros: a modifier
        may divide by them.
        """
        s = self.sizes
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, self.nq * self.bq - s.T if x.shape[2] == s.T > 1 else 0)
        widths[3] = (0, self.nk * self.bk - s.S if x.shape[3] == s.S > 1 else 0)
        if not any(map(any, widths)):
            return x
        if fill is None:
            return jnp.pad(x, widths, mode="edge")
        return jnp.pad(x, widths, constant_values=fill)

    def queries(self, x: Array) -> Array:
        """Pads ``[B, T, N, X]`` with zeros to whole blocks."""
        return _pad_length(x, self.nq * self.bq)

    def keys(self, x: Array) -> Array:
        """Pads ``[B, S, K, X]`` with zeros to whole blocks."""
        return _pad_length(x, self.nk * self.bk)

    def all_rows(self) -> Array:
        """Numbers of all rows of the walk."""
        return jnp.arange(self.sizes.B * self.sizes.N * self.nq, dtype=jnp.int32)

    def row(self, r: Array) -> Row:
        """Indices of row number ``r``."""
        heads = self.sizes.N
        return Row(r // (heads * self.nq), r // self.nq % heads, r % self.nq)

    def unrow(self, x: Array) -> Array:
        """``[rows, bq, *] -> [B, T, N, *]``."""
        s = self.sizes
        x = x.reshape(s.B, s.N, self.nq * self.bq, *x.shape[2:])
        return x[:, :, : s.T].swapaxes(1, 2)

    def unblock(self, x: Array | None) -> Array | None:
        """``[B * K, nk, X, bk] -> [B, S, K, X]``."""
        if x is None:
            return None
        s = self.sizes
        x = x.reshape(s.B, s.K, self.nk, -1, self.bk).transpose(0, 2, 4, 1, 3)
        return x.reshape(s.B, self.nk * self.bk, s.K, -1)[:, : s.S]

    def key_head(self, row: Row) -> Array:
        """The key head of a row."""
        return row.head // (self.sizes.N // self.sizes.K)

    def key_row(self, row: Row) -> Array:
        """Index into ``[B * K, ...]`` for the gradients that a row adds to."""
        return row.example * self.sizes.K + self.key_head(row)

    def locate(self, row: Row, rank: Array, count: int) -> tuple[Array, Array]:
        """Key blocks at ``count`` ranks from ``rank`` on, and which of them exist."""
        w = self.walk
        lo, end, total = (pick(x, row) for x in (w.lo, w.end, w.total))
        if end.shape[0] == 0:
            return jnp.zeros((count,), jnp.int32), jnp.zeros((count,), bool)
        ranks = rank + jnp.arange(count, dtype=jnp.int32)
        which = (end[None, :] <= ranks[:, None]).sum(1, dtype=jnp.int32)
        which = jnp.minimum(which, end.shape[0] - 1)
        start = jnp.where(which > 0, end[jnp.maximum(which - 1, 0)], 0)
        ids = jnp.clip(lo[which] + ranks - start, 0, self.nk - 1)
        return ids, ranks < total

    def query_block(self, x: Array, row: Row) -> Array:
        """The block ``[bq, X]`` of ``queries(x)`` that belongs to a row."""
        return _block(x, row.example, row.block * self.bq, row.head, self.bq)

    def key_blocks(self, x: Array, row: Row, ids: Array) -> Array:
        """The blocks ``ids`` of ``keys(x)``, concatenated: ``[chunk * bk, X]``."""
        parts = [
            _block(x, row.example, ids[c] * self.bk, self.key_head(row), self.bk)
            for c in range(ids.shape[0])
        ]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _at(self, row: Row, j: Array) -> tuple[tuple[Array, ...], tuple[int, int]]:
        """Start indices and sizes of the tile at key block ``j``."""
        place = (row.example, row.head, row.block * self.bq, j * self.bk)
        return place, (self.bq, self.bk)

    def cut(self, x: Array, row: Row, ids: Array) -> Array:
        """The tile ``[q or 1, k or 1, *payload]`` of a padded operand."""
        count = ids.shape[0] if x.shape[3] > 1 else 1
        parts = [cut(x, *self._at(row, ids[c])) for c in range(count)]
        return parts[0] if count == 1 else jnp.concatenate(parts, axis=1)

    def add(self, x: Array, row: Row, ids: Array, tile: Array) -> Array:
        """Adds a tile into a padded accumulator, in place.

        For ranks that do not exist the tile is zero, so ``ids`` may repeat a block.
        """
        runs = x.shape[3] > 1

        def block(c: Array, x: Array) -> Array:
            start, shape = corner(x, *self._at(row, ids[c]))
            part = lax.dynamic_slice_in_dim(tile, c * shape[3], shape[3], 1)
            old = lax.dynamic_slice(x, start, shape)
            return lax.dynamic_update_slice(x, old + part.reshape(shape), start)

        return self._each_block(block, x, ids.shape[0] if runs else 1)

    def add_transposed(self, x: Array, row: Array, ids: Array, tile: Array) -> Array:
        """Adds ``[X, chunk * bk]`` into ``x [rows, nk, X, bk]``, as ``add`` does."""

        def block(c: Array, x: Array) -> Array:
            start = _starts(row, ids[c], 0, 0)
            part = lax.dynamic_slice_in_dim(tile, c * self.bk, self.bk, 1)[None, None]
            old = lax.dynamic_slice(x, start, part.shape)
            return lax.dynamic_update_slice(x, old + part, start)

        return self._each_block(block, x, ids.shape[0])

    def _each_block(
        self, block: Callable[[Array, Array], Array], x: Array, count: int
    ) -> Array:
        """Loops over blocks with one read and one write each: else XLA copies ``x``."""
        if count == 1:
            return block(jnp.int32(0), x)
        return lax.fori_loop(jnp.int32(0), jnp.int32(count), block, x)

    def over_chunks(
        self,
        row: Row,
        step: Callable[[Array, Array, PyTree, bool], PyTree],
        state: PyTree,
    ) -> PyTree:
        """Runs ``step(ids, valid, state, masked)`` over the chunks of a row."""
        w = self.walk
        if w.one_chunk:
            # Called directly: in a loop that may run zero times, XLA would hoist it.
            ids, valid = self.locate(row, jnp.int32(0), w.chunk)
            return step(ids, valid, state, True)
        in_full, in_rest = (pick(x, row) for x in w.chunks())
        if w.any_full:

            def full(c: Array, state: PyTree) -> PyTree:
                return step(*self.locate(row, c * w.wide, w.wide), state, False)

            state = lax.fori_loop(jnp.int32(0), in_full, full, state)
        if w.any_rest:
            first = in_full * w.wide

            def rest(c: Array, state: PyTree) -> PyTree:
                where = self.locate(row, first + c * w.chunk, w.chunk)
                return step(*where, state, True)

            state = lax.fori_loop(jnp.int32(0), in_rest, rest, state)
        return state


def _pad_length(x: Array, length: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])


def _block(x: Array, example: Array, start: Array, head: Array, size: int) -> Array:
    shape = (1, size, 1, x.shape[-1])
    cut = lax.dynamic_slice(x, _starts(example, start, head, 0), shape)
    return cut.reshape(size, x.shape[-1])


def _starts(*starts: int | Array) -> list[Array]:
    """Indices as int32: in x64 mode Python ints would become int64."""
    return [jnp.asarray(n, jnp.int32) for n in starts]


def pick(x: ArrayLike, row: Row) -> Array:
    """The entry of a row in a plan array ``[Bp, Np, rows, ...]``."""
    x = jnp.asarray(x)
    example = row.example if x.shape[0] != 1 else 0
    return x[example, row.head if x.shape[1] != 1 else 0, row.block]


class Operands(NamedTuple):
    """The operands of score, modifiers, mask and dropout, padded to whole blocks."""

    params: PyTree
    head_scale: Array | None
    modifiers: PyTree
    mask: PyTree
    query_positions: Array
    key_positions: Array
    words: tuple[Array, Array] | None

    @classmethod
    def of(cls, tiles: Tiles) -> "Operands":
        """The operands of ``tiles.inputs``."""
        inputs = tiles.inputs
        pad = functools.partial(jax.tree.map, tiles.pad)
        return cls(
            inputs.pair_params,
            inputs.head_scale,
            pad(inputs.modifier_operands),
            pad(inputs.mask_operands),
            tiles.pad(inputs.query_positions, -1),
            tiles.pad(inputs.key_positions, -1),
            pad(inputs.dropout_words),
        )

    def at(self, tiles: Tiles, row: Row, ids: Array, valid: Array) -> "Operands":
        """The tiles of the operands at some key blocks.

        Keys of blocks that do not exist get the position -1, which hides them.
        """
        cut = jax.tree.map(lambda x: tiles.cut(x, row, ids), self)
        keys = cut.key_positions
        if tiles.inputs.index_positions:
            # Positions are slot numbers: computing them takes fewer operations.
            slots = jnp.arange(tiles.bk, dtype=jnp.int32)[None]
            slots = ids[:, None] * tiles.bk + slots
            keys = jnp.where(slots < tiles.sizes.S, slots, -1).reshape(1, -1)
            slots = jnp.arange(tiles.bq, dtype=jnp.int32)[:, None]
            cut = cut._replace(query_positions=row.block * tiles.bq + slots)
        exists = jnp.repeat(valid, keys.shape[1] // valid.shape[0])
        return cut._replace(
            params=widened(tiles.inputs, squeeze_params(cut.params)),
            modifiers=widened(tiles.inputs, cut.modifiers),
            key_positions=jnp.where(exists, keys, -1),
        )
