"""How an XLA program walks a plan: rows of blocks, chunks of live keys, tiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.implementations.tile import squeeze_params, widened
from attnlab._src.operands import corner, cut
from attnlab._src.types import Array, AttentionInputs, Plan, PyTree

#: Keys in a chunk where nothing better is known: shorter ones leave a core idle.
CHUNK = 512
#: Keys in a chunk at most, and in one of full blocks wherever there are as many.
LONGEST_CHUNK = 1024
#: What a chunk costs beside its pairs, in pairs.
_CHUNK_OVERHEAD = 2**15


class Walk(NamedTuple):
    """The plan, as the rows walk it.

    Each row's live blocks have ranks: the full ones first, the partial ones behind.

    Attributes:
        lo: ``[Bp, Np, rows, m]``, first block of each interval.
        end: ``[Bp, Np, rows, m]``, rank at which each interval ends.
        full: ``[Bp, Np, rows]``, how many ranks are full blocks.
        total: ``[Bp, Np, rows]``, how many there are.
        wide: blocks in a chunk of full ones.
        chunk: blocks in a chunk of what they leave over.
        one_chunk: every row is one chunk exactly.
        any_full: some row may have a full chunk.
        any_rest: some row may have a chunk that is not full.
    """

    lo: Any
    end: Any
    full: Any
    total: Any
    wide: int
    chunk: int
    one_chunk: bool
    any_full: bool
    any_rest: bool

    def chunks(self) -> tuple[Any, Any]:
        """How many chunks of each kind a row walks, ``[Bp, Np, rows]``."""
        fulls = self.full // self.wide
        return fulls, -(-(self.total - fulls * self.wide) // self.chunk)


def make_walk(plan: Plan) -> Walk:
    """Ranks the live blocks of each row and chooses the chunk."""
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
    """A row of the walk: example, query head, block of queries."""

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

    def pad(self, x: Array, fill: Any = None) -> Array:
        """An operand whose running axes are padded to whole blocks.

        With copies of its edge where no ``fill`` is given: a modifier may divide by it.
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
        """``[B, T, N, X]``, padded by zeros to whole blocks."""
        return _pad_length(x, self.nq * self.bq)

    def keys(self, x: Array) -> Array:
        """``[B, S, K, X]``, padded by zeros to whole blocks."""
        return _pad_length(x, self.nk * self.bk)

    def all_rows(self) -> Array:
        """The numbers of the rows of the walk."""
        return jnp.arange(self.sizes.B * self.sizes.N * self.nq, dtype=jnp.int32)

    def row(self, r: Array) -> Row:
        """Where row ``r`` is."""
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
        """The key head that a row of queries reads."""
        return row.head // (self.sizes.N // self.sizes.K)

    def key_row(self, row: Row) -> Array:
        """The row of ``[B * K, ...]`` that a row of queries adds to."""
        return row.example * self.sizes.K + self.key_head(row)

    def locate(self, row: Row, rank: Array, count: int) -> tuple[Array, Array]:
        """Blocks at ``count`` ranks from ``rank`` on, and which of them exist."""
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
        """A block of ``queries(x)``, ``[bq, X]``, cut from where it lies."""
        return _block(x, row.example, row.block * self.bq, row.head, self.bq)

    def key_blocks(self, x: Array, row: Row, ids: Array) -> Array:
        """Blocks of ``keys(x)``, ``[chunk * bk, X]``."""
        parts = [
            _block(x, row.example, ids[c] * self.bk, self.key_head(row), self.bk)
            for c in range(ids.shape[0])
        ]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def _at(self, row: Row, j: Array) -> tuple[Any, tuple[int, int]]:
        """Place and sizes of the tile at key block ``j``."""
        place = (row.example, row.head, row.block * self.bq, j * self.bk)
        return place, (self.bq, self.bk)

    def cut(self, x: Array, row: Row, ids: Array) -> Array:
        """The tile ``[q or 1, k or 1, *payload]`` of a padded operand."""
        count = ids.shape[0] if x.shape[3] > 1 else 1
        parts = [cut(x, *self._at(row, ids[c])) for c in range(count)]
        return parts[0] if count == 1 else jnp.concatenate(parts, axis=1)

    def add(self, x: Array, row: Row, ids: Array, tile: Array) -> Array:
        """Adds a tile into a padded accumulator, in place.

        Where a rank does not exist the tile is zero, so ``ids`` may repeat a block.
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
        """One read and one write a step of a loop: else XLA copies all of ``x``."""
        if count == 1:
            return block(jnp.int32(0), x)
        return lax.fori_loop(jnp.int32(0), jnp.int32(count), block, x)

    def over_chunks(
        self, row: Row, step: Callable[[Array, Array, Any, bool], Any], state: Any
    ) -> Any:
        """Runs ``step(ids, valid, state, masked)`` over the chunks of a row."""
        w = self.walk
        if w.one_chunk:
            # Called directly: in a loop that may run zero times, XLA would hoist it.
            ids, valid = self.locate(row, jnp.int32(0), w.chunk)
            return step(ids, valid, state, True)
        in_full, in_rest = (pick(x, row) for x in w.chunks())
        if w.any_full:

            def full(c: Array, state: Any) -> Any:
                return step(*self.locate(row, c * w.wide, w.wide), state, False)

            state = lax.fori_loop(jnp.int32(0), in_full, full, state)
        if w.any_rest:
            first = in_full * w.wide

            def rest(c: Array, state: Any) -> Any:
                where = self.locate(row, first + c * w.chunk, w.chunk)
                return step(*where, state, True)

            state = lax.fori_loop(jnp.int32(0), in_rest, rest, state)
        return state


def _pad_length(x: Array, length: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])


def _block(x: Array, example: Any, start: Any, head: Any, size: int) -> Array:
    shape = (1, size, 1, x.shape[-1])
    cut = lax.dynamic_slice(x, _starts(example, start, head, 0), shape)
    return cut.reshape(size, x.shape[-1])


def _starts(*starts: Any) -> list[Array]:
    """Indices of one integer type: in x64 mode Python ints would be another."""
    return [jnp.asarray(n, jnp.int32) for n in starts]


def pick(x: Any, row: Row) -> Array:
    """One row of a plan array ``[Bp, Np, rows, ...]``."""
    x = jnp.asarray(x)
    example = row.example if x.shape[0] != 1 else 0
    return x[example, row.head if x.shape[1] != 1 else 0, row.block]


class Operands(NamedTuple):
    """The operands, padded."""

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
        """Their tiles; blocks that do not exist hold no key."""
        cut = jax.tree.map(lambda x: tiles.cut(x, row, ids), self)
        keys = cut.key_positions
        if tiles.inputs.index_positions:
            # Computed, not cut: fewer operations in the loop.
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
