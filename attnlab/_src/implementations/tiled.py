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
import jax.numpy as jnp
from jax import lax

from attnlab._src.implementations.measured import measured
from attnlab._src.implementations.schedule import Operands, Tiles, make_walk
from attnlab._src.implementations.tile import (
    compare,
    finite,
    kept,
    matmul,
    modify,
    scaled,
    spoilt,
)
from attnlab._src.masks.planning import plan_of
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionInputs,
    Implementation,
    Plan,
    PyTree,
    Tile,
)

#: Greatest number of floats that a score may store for one tile (MLP: P per pair).
TILE_FLOATS = 2**21


class Tiled(Implementation):
    """Pure XLA, tile by tile; memory O(T + S); dead blocks cost nothing."""

    name = "tiled"
    symbolic = "B"

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        s = inputs.sizes
        if s.T == 0 or s.S == 0:
            return 1, 1
        candidates = [(1024, 512), (512, 512), (256, 128)]
        if not inputs.score.is_inner_product:
            held = inputs.score.floats_per_pair
            if held is None:
                widths = [x.shape[-1] for x in jax.tree.leaves(inputs.pair_params)]
                held = max([s.P, *widths])
            side = int((TILE_FLOATS / held) ** 0.5) // 8 * 8
            side = min(max(side, 8), 512)
            candidates = [(side, side)]
        sizes = [(min(q, s.T), min(k, s.S)) for q, k in candidates]
        if len(set(sizes)) == 1:
            return sizes[0]
        return min(sizes, key=lambda size: _estimate(inputs, size))

    def _tiles(self, inputs: AttentionInputs) -> Tiles:
        return Tiles(inputs, plan_of(inputs, self.block_sizes(inputs), cols=False))

    def blocks_executed(self, plan: Plan) -> ArrayLike:
        """See :class:`attnlab.extend.Implementation`: counts whole chunks."""
        walk = make_walk(plan)
        in_full, in_rest = walk.chunks()
        return in_full * walk.wide + in_rest * walk.chunk

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        tiles = self._tiles(inputs)
        s, dtype = inputs.sizes, inputs.accumulation_dtype
        q, k, v = (
            tiles.queries(inputs.query),
            tiles.keys(inputs.key),
            tiles.keys(inputs.value),
        )
        operands = Operands.of(tiles)
        lowest = jnp.finfo(dtype).min
        start = (
            jnp.full((tiles.bq,), lowest, dtype),
            jnp.zeros((tiles.bq,), dtype),
            jnp.zeros((tiles.bq, s.D), dtype),
        )

        def row(_: None, r: Array) -> tuple[None, tuple[Array, Array]]:
            where = tiles.row(r)
            query = tiles.query_block(q, where).astype(dtype)

            def step(ids: Array, valid: Array, state: tuple, masked: bool) -> tuple:
                top, total, sums = state
                here = operands.at(tiles, where, ids, valid)
                tile = Tile(here.query_positions, here.key_positions, where.head)
                key = tiles.key_blocks(k, where, ids)
                logits = compare(inputs, here.params, here.head_scale, query, key)
                logits = modify(inputs, logits, tile, here.modifiers)
                seen = visible_pairs(inputs.mask, tile, here.mask) if masked else None
                if seen is not None:
                    logits = jnp.where(seen, logits, -jnp.inf)
                # ``top`` stays finite, so a hidden pair gives exp(-inf) = 0 exactly.
                new = jnp.maximum(top, logits.max(1))
                p = jnp.exp(logits - new[:, None])
                shrink = jnp.exp(top - new)
                total = total * shrink + p.sum(1)
                if here.words is not None:
                    p = jnp.where(kept(inputs, here.words), p, 0)
                value = tiles.key_blocks(v, where, ids)
                if seen is not None:
                    # The weight 0 of a hidden pair times NaN would be NaN.
                    p = jnp.where(seen & spoilt(value)[None], jnp.nan, p)
                    value = finite(value)
                product = matmul(inputs, p, value, (1, 0))
                return new, total, sums * shrink[:, None] + product

            top, total, sums = tiles.over_chunks(where, step, start)
            alive = total != 0  # True for NaN, which so reaches the output
            safe = jnp.where(alive, total, 1)
            output = sums / (safe * (1 - inputs.dropout_rate))[:, None]
            output = jnp.where(alive[:, None], output, 0)
            lse = jnp.where(alive, top + jnp.log(safe), -jnp.inf)
            return None, (output, lse)

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
        tiles = self._tiles(inputs)
        s, dtype = inputs.sizes, inputs.accumulation_dtype
        want = jax.tree.unflatten(jax.tree.structure(inputs), list(wanted))
        k, v = tiles.keys(inputs.key), tiles.keys(inputs.value)
        delta = (d_output.astype(dtype) * output.astype(dtype)).sum(-1)
        if d_lse is not None:
            delta = delta - d_lse
        # For a row that sees nothing, or of padding: exp(logits - inf) = 0.
        shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
        padding = [(0, 0), (0, tiles.nq * tiles.bq - s.T), (0, 0)]
        shift = jnp.pad(shift, padding, constant_values=jnp.inf)
        by_row = [
            tiles.queries(x)
            for x in (inputs.query, d_output, delta[..., None], shift[..., None])
        ]
        operands = Operands.of(tiles)
        learned = (operands.params, operands.modifiers)

        def zeros(shape: tuple[int, ...], on: bool) -> Array | None:
            return jnp.zeros(shape, dtype) if on else None

        start = _Sums(
            zeros((s.B * s.K, tiles.nk, s.P, tiles.bk), want.key),
            zeros((s.B * s.K, tiles.nk, s.D, tiles.bk), want.value),
            jax.tree.map(
                lambda x, on: zeros(x.shape, on),
                learned,
                (want.pair_params, want.modifier_operands),
            ),
        )

        def row(sums: _Sums, r: Array) -> tuple[_Sums, Array | None]:
            where = tiles.row(r)
            kv = tiles.key_row(where)
            query, d_o, row_delta, row_shift = (
                tiles.query_block(x, where).astype(dtype) for x in by_row
            )
            # Scale of dropout, applied once and not in every tile.
            d_o = d_o * (1 / (1 - inputs.dropout_rate))
            lost = spoilt(query) | spoilt(d_o)
            finite_query, finite_d_o = finite(query), finite(d_o)

            def step(ids: Array, valid: Array, state: tuple, masked: bool) -> tuple:
                d_query, sums = state
                here = operands.at(tiles, where, ids, valid)
                tile = Tile(here.query_positions, here.key_positions, where.head)
                key = tiles.key_blocks(k, where, ids).astype(dtype)
                value = tiles.key_blocks(v, where, ids).astype(dtype)
                seen = visible_pairs(inputs.mask, tile, here.mask) if masked else None
                sides, above = (query, key), d_o
                if seen is not None:  # as in the forward pass
                    sides, above = (finite_query, finite(key)), finite_d_o
                logits, pull = _pullback(inputs, here, tile, *sides, seen)
                p = jnp.exp(logits - row_shift)
                if seen is not None:
                    bad = lost[:, None] | spoilt(key)[None]
                    p = jnp.where(seen, jnp.where(bad, jnp.nan, p), 0)
                d_p = matmul(inputs, above, value, (1, 1))
                dropped = p
                if here.words is not None:
                    keep = kept(inputs, here.words)
                    d_p = jnp.where(keep, d_p, 0)
                    dropped = jnp.where(keep, p, 0)
                d_logits = p * (d_p - row_delta)
                if seen is not None:
                    d_logits = jnp.where(seen, d_logits, 0)
                part_query, part_key, part_learned = pull(d_logits)
                part_value = matmul(inputs, above, dropped, (0, 0))
                add = functools.partial(_add, tiles.add_transposed, row=kv, ids=ids)
                sums = _Sums(
                    add(sums.key, part_key),
                    add(sums.value, part_value),
                    jax.tree.map(
                        lambda x, part: _add(tiles.add, x, part, row=where, ids=ids),
                        sums.learned,
                        part_learned,
                        is_leaf=lambda x: x is None,
                    ),
                )
                return None if d_query is None else d_query + part_query, sums

            d_query = zeros((tiles.bq, s.P), want.query)
            d_query, sums = tiles.over_chunks(where, step, (d_query, sums))
            return sums, d_query

        sums, d_query = lax.scan(row, start, tiles.all_rows())
        d_learned = jax.tree.map(
            lambda x, like: x[:, :, : like.shape[2], : like.shape[3]],
            sums.learned,
            _like(sums.learned, (inputs.pair_params, inputs.modifier_operands)),
        )
        gradients: dict[str, PyTree] = {
            "query": None if d_query is None else tiles.unrow(d_query),
            "key": tiles.unblock(sums.key),
            "value": tiles.unblock(sums.value),
            "pair_params": d_learned[0],
            "modifier_operands": d_learned[1],
        }
        return inputs.gradients(**gradients)


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


def _like(wanted: PyTree, full: PyTree) -> PyTree:
    """``full`` with None wherever ``wanted`` has None."""
    return jax.tree.map(
        lambda w, x: None if w is None else x,
        wanted,
        full,
        is_leaf=lambda x: x is None,
    )


def _pullback(
    inputs: AttentionInputs,
    here: Operands,
    tile: Tile,
    query: Array,
    key: Array,
    seen: Array | None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, PyTree]]]:
    """The logits of a tile, and their pullback to the tile's inputs.

    Returns:
        Logits ``[q, k]``, and a function from their gradient to those of query
        ``[q, P]`` (times ``head_scale``), of key, transposed ``[P, k]``, and of (pair
        parameters, modifiers). XLA removes computations of unused gradients.
    """
    if inputs.score.is_inner_product:
        logits = compare(inputs, here.params, here.head_scale, query, key)

        def uncompare(d: Array) -> tuple[PyTree, Array, Array]:
            d_query = scaled(inputs, matmul(inputs, d, key, (1, 0)), None)
            scaled_query = scaled(inputs, query, here.head_scale)
            return here.params, d_query, matmul(inputs, scaled_query, d, (0, 0))

    else:
        logits, pull = jax.vjp(
            functools.partial(compare, inputs), here.params, None, query, key
        )

        def uncompare(d: Array) -> tuple[PyTree, Array, Array]:
            d_params, _, d_query, d_key = pull(d)
            return d_params, d_query, d_key.T

    logits, unmodify = jax.vjp(
        lambda z, operands: modify(inputs, z, tile, operands, seen),
        logits,
        here.modifiers,
    )

    def back(d: Array) -> tuple[Array, Array, PyTree]:
        hidden = d == 0
        d, d_modifiers = unmodify(d)
        if inputs.modifiers:
            # A modifier's derivative need not be finite at hidden pairs.
            d = jnp.where(hidden, 0, d)
        d_params, d_query, d_key = uncompare(d)
        d_params = jax.tree.map(lambda x: x[None, None], d_params)
        return d_query, d_key, (d_params, d_modifiers)

    return logits, back


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
