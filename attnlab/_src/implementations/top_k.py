"""The greatest weights of each query, without an array ``[T, S]``."""

import jax.numpy as jnp
from jax import lax

from attnlab._src.implementations.schedule import Operands, Tiles
from attnlab._src.implementations.tile import compare, kept, modify
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.types import Array, AttentionInputs, Plan, Tile
from attnlab._src.varying import vary_like


def top_weights(
    inputs: AttentionInputs, plan: Plan, lse: Array, k: int
) -> tuple[Array, Array]:
    """The k greatest weights of each query and their key slots.

    Args:
        inputs: the canonical record.
        plan: the plan with its live blocks.
        lse: log-sum-exp ``[B, T, N]``.
        k: number of weights.

    Returns:
        Weights after dropout ``[B, N, T, k]``, descending, without a gradient; and key
        slots int32 ``[B, N, T, k]``, -1 if a query sees fewer than k keys.
    """
    inputs, lse = lax.stop_gradient((inputs, lse))
    tiles = Tiles(inputs, plan)
    dtype = inputs.accumulation_dtype
    q = tiles.queries(inputs.query)
    keys = tiles.keys(inputs.key)
    shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    shift = tiles.queries(shift[..., None])
    operands = Operands.of(tiles)
    start = (
        jnp.full((tiles.bq, k), -1, dtype),
        jnp.full((tiles.bq, k), -1, jnp.int32),
    )
    start = tuple(vary_like(x, (inputs, plan)) for x in start)

    def row(_: None, r: Array) -> tuple[None, tuple[Array, Array]]:
        where = tiles.row(r)
        query, row_shift = (tiles.query_block(x, where) for x in (q, shift))

        def step(ids: Array, valid: Array, state: tuple, masked: bool) -> tuple:
            best, slots = state
            here = operands.at(tiles, where, ids, valid)
            tile = Tile(here.query_positions, here.key_positions, where.head)
            key = tiles.key_blocks(keys, where, ids)
            logits = compare(inputs, here.params, here.head_scale, query, key)
            logits = modify(inputs, logits, tile, here.modifiers)
            weights = jnp.exp(logits - row_shift)
            if here.words is not None:
                scale = 1 / (1 - inputs.dropout_rate)
                weights = jnp.where(kept(inputs, here.words), weights * scale, 0)
            # A logit of -inf hides a pair, as a mask does.
            seen = visible_pairs(inputs.mask, tile, here.mask) & ~jnp.isneginf(logits)
            weights = jnp.where(seen, weights, -1)
            within = jnp.arange(tiles.bk, dtype=jnp.int32)[None]
            found = ids[:, None] * tiles.bk + within
            found = jnp.broadcast_to(found.reshape(1, -1), weights.shape)
            best = jnp.concatenate([best, weights.astype(dtype)], 1)
            best, which = lax.top_k(best, k)
            slots = jnp.concatenate([slots, found], 1)
            return best, jnp.take_along_axis(slots, which, 1)

        return None, tiles.over_chunks(where, step, start)

    _, (best, slots) = lax.scan(row, None, tiles.all_rows())
    best, slots = (tiles.unrow(x).swapaxes(1, 2) for x in (best, slots))
    return jnp.maximum(best, 0), jnp.where(best < 0, -1, slots)
