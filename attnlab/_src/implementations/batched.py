"""Pure XLA, many rows at once: few operations, each over many tiles, for GPUs.

Each step of one loop computes a chunk of keys for many rows of the plan. A row has at
most one chunk in a step, so its state is read and written without conflicts. There are
as many steps as the longest row has chunks; more only where memory limits a step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.implementations.schedule import Row, Tiles
from attnlab._src.implementations.sizes import blocks_within, floats_per_pair, side_of
from attnlab._src.implementations.steps import BackwardSteps, ForwardSteps, Softmax
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionInputs,
    Implementation,
    Plan,
    PyTree,
)

#: Greatest number of floats that a step holds in one array of its tiles, 128 MiB in
#: float32; one lane may need more.
STEP_FLOATS = 2**25
#: Greatest number of keys in a chunk.
LONGEST_CHUNK = 1024
#: Keys in a chunk where the plan is known only when it runs.
CHUNK = 256
#: Constant cost of a chunk, in pairs: its row's state is read and written.
_CHUNK_OVERHEAD = 2**15


class Batched(Implementation):
    """Pure XLA, many rows at once; memory O(T + S); dead blocks cost nothing."""

    name = "batched"
    chosen_on = ("cuda", "rocm")

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        s, side = inputs.sizes, side_of(inputs, most=128)
        of_queries, of_keys = blocks_within(inputs.mask, side, side)
        return min(max(s.T, 1), of_queries), min(max(s.S, 1), of_keys)

    def blocks_executed(self, plan: Plan) -> ArrayLike:
        """See :class:`attnlab.extend.Implementation`: counts whole chunks."""
        chunk = _chunk_of(plan)
        return -(-plan.rows.per_row() // chunk) * chunk

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        tiles = Tiles.of(inputs, self.block_sizes(inputs))
        steps, lanes = ForwardSteps(tiles), Lanes.of(tiles)

        def body(number: Array, states: Softmax) -> Softmax:
            rows, ranks = lanes.at(number)

            def lane(r: Array, rank: Array, state: Softmax) -> Softmax:
                where = tiles.row(r)
                ids, valid = tiles.locate(where, rank, lanes.chunk)
                query = steps.row(where)
                return steps.step(where, query, ids, valid, state, True)

            new = jax.vmap(lane)(lanes.real(rows), ranks, _read(states, rows))
            return _written(states, rows, new)

        start = jax.tree.map(lanes.each, steps.start())
        states = lax.fori_loop(jnp.int32(0), lanes.steps, body, start)
        output, lse = steps.results(states)
        return tiles.unrow(output), tiles.unrow(lse)

    def backward(
        self,
        inputs: AttentionInputs,
        output: Array,
        lse: Array,
        d_output: Array,
        d_lse: Array | None,
        wanted: Sequence[bool],
    ) -> list[Array | None]:
        """See :class:`attnlab.extend.Implementation`."""
        tiles = Tiles.of(inputs, self.block_sizes(inputs))
        steps = BackwardSteps(tiles, output, lse, d_output, d_lse, wanted)
        lanes, s = Lanes.of(tiles), inputs.sizes

        def body(number: Array, sums: _Sums) -> _Sums:
            rows, ranks = lanes.at(number)
            where = tiles.row(lanes.real(rows))

            def lane(where: Row, rank: Array) -> tuple[Array, PyTree]:
                ids, valid = tiles.locate(where, rank, lanes.chunk)
                return ids, steps.step(where, steps.row(where), ids, valid, True)

            ids, parts = jax.vmap(lane)(where, ranks)
            kv = tiles.key_row(where)[:, None]

            def blocks(x: Array | None, part: Array) -> Array | None:
                """Adds ``[lanes, X, chunk * bk]``; several lanes may add to a block."""
                if x is None:
                    return None
                part = part.reshape(*part.shape[:2], lanes.chunk, tiles.bk)
                return x.at[kv, ids].add(part.swapaxes(1, 2))

            def learned(x: Array | None, part: Array) -> Array | None:
                return None if x is None else _add(x, where, ids, part)

            query = sums.query
            if query is not None:
                query = _written(query, rows, _read(query, rows) + parts.query)
            return _Sums(
                query,
                blocks(sums.key, parts.key),
                blocks(sums.value, parts.value),
                jax.tree.map(
                    learned, sums.learned, parts.learned, is_leaf=lambda x: x is None
                ),
            )

        start = _Sums(
            steps.zeros((lanes.rows, tiles.bq, s.P), steps.want.query),
            steps.zeros((s.B * s.K, tiles.nk, s.P, tiles.bk), steps.want.key),
            steps.zeros((s.B * s.K, tiles.nk, s.D, tiles.bk), steps.want.value),
            steps.learned(lambda x, on: steps.zeros(_blocked(x, tiles), on)),
        )
        found = lax.fori_loop(jnp.int32(0), lanes.steps, body, start)
        learned = jax.tree.map(_unblocked, found.learned)
        return steps.gradients(found.query, found.key, found.value, learned)


class Lanes(NamedTuple):
    """Which chunk of which row each lane computes in each step.

    The chunks of all rows, one row after another, are dealt to the lanes in equal runs.
    As no row has more chunks than there are steps, no two lanes work on one row in the
    same step (McNaughton, "Scheduling with deadlines and loss functions", 1959).

    Attributes:
        ends: int32 ``[rows]``, the number of chunks of all rows up to and with each.
        rows: number of rows.
        count: number of lanes.
        steps: number of steps.
        chunk: number of blocks in a chunk.
    """

    ends: ArrayLike
    rows: int
    count: int
    steps: ArrayLike
    chunk: int

    @classmethod
    def of(cls, tiles: Tiles) -> "Lanes":
        """The lanes for a plan."""
        s, plan = tiles.sizes, tiles.plan
        chunk = _chunk_of(plan)
        xp = np if plan.is_static else jnp
        each = -(-plan.rows.per_row() // chunk)
        each = xp.broadcast_to(each, (s.B, s.N, tiles.nq)).reshape(-1)
        rows = each.shape[0]
        ends = each.cumsum(dtype=np.int32)
        most, work = each.max(initial=0), ends[-1:].sum(dtype=np.int32)
        # A lane has a copy of its chunk's keys and values, too.
        held = max(floats_per_pair(tiles.inputs) * tiles.bq, s.P, s.D)
        floats = held * tiles.bk * chunk
        limit = max(STEP_FLOATS // floats, 1)
        count = max(min(limit, rows), 1)
        if plan.is_static:
            # With fewer lanes there are as many steps, and fewer idle lanes.
            count = max(min(count, -(-int(work) // max(int(most), 1))), 1)
        steps = xp.maximum(most, -(-work // count)).astype(np.int32)
        return cls(ends, rows, count, steps, chunk)

    def at(self, number: Array) -> tuple[Array, Array]:
        """What the lanes compute in a step.

        Args:
            number: of the step.

        Returns:
            The row of each lane, ``[lanes]``, and the rank of the first block of its
            chunk, ``[lanes]``. For a lane without work, a number from ``rows`` on,
            another one for each, and a rank that no block has.
        """
        ends = jnp.asarray(self.ends)
        lane = jnp.arange(self.count, dtype=jnp.int32)
        chunks = lane * jnp.asarray(self.steps) + number
        # Unrolled: one kernel, where a loop would be many.
        row = jnp.searchsorted(ends, chunks, side="right", method="scan_unrolled")
        row = row.astype(jnp.int32)
        first = jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0)
        ranks = (chunks - first) * self.chunk
        works = row < self.rows
        ranks = jnp.where(works, ranks, jnp.iinfo(jnp.int32).max - self.chunk)
        return jnp.where(works, row, self.rows + lane), ranks

    def real(self, rows: Array) -> Array:
        """A row for each lane, for a lane without work some row."""
        return jnp.minimum(rows, self.rows - 1)

    def each(self, x: Array) -> Array:
        """The same state for each row."""
        return jnp.broadcast_to(x, (self.rows, *x.shape))


class _Sums(NamedTuple):
    """Sums of gradients; None if a gradient is not wanted.

    Attributes:
        query: ``[rows, bq, P]``.
        key: ``[B * K, nk, P, bk]``.
        value: ``[B * K, nk, D, bk]``.
        learned: gradients of pair parameters and modifier operands, padded as these, in
            blocks: ``[B, N, nq, nk, bq, bk, *payload]``.
    """

    query: Array | None
    key: Array | None
    value: Array | None
    learned: PyTree


def _chunk_of(plan: Plan) -> int:
    """Number of blocks in a chunk, so that the chunks of all rows cost least."""
    count = -(-plan.key_length // plan.block_k)
    most = max(min(LONGEST_CHUNK // plan.block_k, count), 1)
    if not plan.is_static:
        return min(max(CHUNK // plan.block_k, 1), most)
    live, pairs = plan.rows.per_row(), plan.block_q * plan.block_k

    def cost(chunk: int) -> int:
        return int((-(-live // chunk)).sum()) * (chunk * pairs + _CHUNK_OVERHEAD)

    return min(range(1, most + 1), key=cost)


def _read(states: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), states)


def _written(states: PyTree, rows: Array, new: PyTree) -> PyTree:
    """The states with new ones of some rows; rows that do not exist are left out."""

    def one(x: Array, new: Array) -> Array:
        return x.at[rows].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(one, states, new)


def _blocked(x: Array, tiles: Tiles) -> tuple[int, ...]:
    """The shape of a padded operand in blocks."""
    (b, n, t, s), payload = x.shape[:4], x.shape[4:]
    bq, bk = min(tiles.bq, t), min(tiles.bk, s)
    return (b, n, t // bq, s // bk, bq, bk, *payload)


def _unblocked(x: Array) -> Array:
    """``[B, N, nq, nk, bq, bk, *payload] -> [B, N, nq * bq, nk * bk, *payload]``."""
    b, n, nq, nk, bq, bk = x.shape[:6]
    return x.swapaxes(3, 4).reshape(b, n, nq * bq, nk * bk, *x.shape[6:])


def _add(x: Array, where: Row, ids: Array, part: Array) -> Array:
    """Adds the lanes' tiles ``[lanes, q or 1, k or 1, *payload]`` to a blocked sum.

    For lanes and blocks that do not exist the tile is zero.
    """
    bq, bk = x.shape[4:6]
    part = part.reshape(part.shape[0], bq, -1, bk, *x.shape[6:]).swapaxes(1, 2)
    lanes, chunk = part.shape[:2]
    places = [jnp.broadcast_to(n[:, None], (lanes, chunk)) for n in where]
    places.append(ids[:, :chunk])
    for axis in range(4):
        if x.shape[axis] == 1:
            places[axis] = jnp.zeros_like(places[axis])
    return x.at[tuple(places)].add(part)
