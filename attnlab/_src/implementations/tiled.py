"""Pure XLA, tile by tile: walks the plan, forward and backward, on any backend.

A sequential loop runs over (batch, head, block of queries); inside, a loop of dynamic
length runs over chunks of live key blocks, first full ones without mask, then others
with mask. Softmax is online, so memory is O(T + S). The backward pass walks the same
rows once; gradients of key and value are stored transposed, ``[block, size, slots]``,
because XLA would otherwise transpose the probabilities of every tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from attnlab._src.implementations.measured import measured
from attnlab._src.implementations.schedule import Tiles, make_walk
from attnlab._src.implementations.sizes import blocks_within, side_of
from attnlab._src.implementations.steps import BackwardSteps, ForwardSteps
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionInputs,
    Implementation,
    Plan,
    PyTree,
)


class Tiled(Implementation):
    """Pure XLA, tile by tile; memory O(T + S); dead blocks cost nothing."""

    name = "tiled"
    symbolic = "B"

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        sizes = self._sizes(inputs)
        if len(sizes) == 1:
            return sizes[0]
        return min(sizes, key=lambda size: _estimate(inputs, size))

    def candidates(self, inputs: AttentionInputs) -> dict[tuple[int, int], float]:
        """See :class:`attnlab.extend.Implementation`."""
        sizes = self._sizes(inputs)
        return {size: _estimate(inputs, size) for size in sizes if len(sizes) > 1}

    def _sizes(self, inputs: AttentionInputs) -> list[tuple[int, int]]:
        s = inputs.sizes
        if s.T == 0 or s.S == 0:
            return [(1, 1)]
        sizes = [(1024, 512), (512, 512), (256, 128)]
        if not inputs.score.is_inner_product:
            side = side_of(inputs, most=512)
            sizes = [(side, side)]
        sizes = [blocks_within(inputs.mask, *size) for size in sizes]
        return list(dict.fromkeys((min(q, s.T), min(k, s.S)) for q, k in sizes))

    def blocks_executed(self, plan: Plan) -> ArrayLike:
        """See :class:`attnlab.extend.Implementation`: counts whole chunks."""
        walk = make_walk(plan)
        in_full, in_rest = walk.chunks()
        return in_full * walk.wide + in_rest * walk.chunk

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        tiles = Tiles.of(inputs, self.block_sizes(inputs))
        steps = ForwardSteps(tiles)
        start = steps.start()

        def row(_: None, r: Array) -> tuple[None, tuple[Array, Array]]:
            where = tiles.row(r)
            query = steps.row(where)
            step = functools.partial(steps.step, where, query)
            return None, steps.results(tiles.over_chunks(where, step, start))

        _, (output, lse) = lax.scan(row, None, tiles.all_rows())
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
        tiles, s = Tiles.of(inputs, self.block_sizes(inputs)), inputs.sizes
        steps = BackwardSteps(tiles, output, lse, d_output, d_lse, wanted)
        start = _Sums(
            steps.zeros((s.B * s.K, tiles.nk, s.P, tiles.bk), steps.want.key),
            steps.zeros((s.B * s.K, tiles.nk, s.D, tiles.bk), steps.want.value),
            steps.learned(lambda x, on: steps.zeros(x.shape, on)),
        )

        def row(sums: _Sums, r: Array) -> tuple[_Sums, Array | None]:
            where = tiles.row(r)
            kv = tiles.key_row(where)
            values = steps.row(where)

            def step(ids: Array, valid: Array, state: tuple, masked: bool) -> tuple:
                d_query, sums = state
                parts = steps.step(where, values, ids, valid, masked)
                add = functools.partial(_add, tiles.add_transposed, row=kv, ids=ids)
                sums = _Sums(
                    add(sums.key, parts.key),
                    add(sums.value, parts.value),
                    jax.tree.map(
                        lambda x, part: _add(tiles.add, x, part, row=where, ids=ids),
                        sums.learned,
                        parts.learned,
                        is_leaf=lambda x: x is None,
                    ),
                )
                return None if d_query is None else d_query + parts.query, sums

            d_query = steps.zeros((tiles.bq, s.P), steps.want.query)
            d_query, sums = tiles.over_chunks(where, step, (d_query, sums))
            return sums, d_query

        sums, d_query = lax.scan(row, start, tiles.all_rows())
        return steps.gradients(d_query, *sums)


class _Sums(NamedTuple):
    """Sums of gradients that many rows add to; None if a gradient is not wanted.

    Attributes:
        key: ``[B * K, nk, P, bk]``.
        value: ``[B * K, nk, D, bk]``.
        learned: gradients of pair parameters and modifier operands, padded as these.
    """

    key: Array | None
    value: Array | None
    learned: PyTree


def _add(
    how: Callable[..., Array], x: Array | None, tile: Array, **place: Any
) -> Array | None:
    return None if x is None else how(x, tile=tile, **place)


def _estimate(inputs: AttentionInputs, size: tuple[int, int]) -> float:
    """Relative time of a block size: executed area over a measured rate."""
    structural = not jax.tree.leaves(inputs.mask_operands)
    if not (structural and inputs.index_positions):
        # The plan is unknown until run time: prefer small blocks, which fit documents.
        return float(size[0])
    walk = make_walk(plan_of(inputs, size, cols=False))

    def seconds(chunks: ArrayLike, blocks: int) -> float:
        area = size[0] * size[1] * blocks
        # Small tiles have lower rates, as they use one core only.
        rate = next(rate for least, rate in measured().tile_rates if area >= least)
        return float(chunks.sum()) * area / rate

    in_full, in_rest = walk.chunks()
    return seconds(in_full, walk.wide) + seconds(in_rest, walk.chunk)
