"""Which slots are alive, and how many pairs are visible: exact, without ``[T, S]``."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap

from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import numbers
from attnlab._src.masks.planning import (
    alone,
    dense_visible,
    index_blocks,
    lengths_of,
    make_plan,
    shared_axes,
    slot_operand,
)
from attnlab._src.masks.rule import Rule, visible_pairs
from attnlab._src.operands import cut
from attnlab._src.types import Array, Plan, PyTree, Tile, skeleton
from attnlab._src.varying import vary_like


def scan_partial(
    mask: Rule,
    operands: PyTree,
    query_positions: Array,
    key_positions: Array,
    plan: Plan,
) -> tuple[Array, Array]:
    """Counts visible pairs, without an array ``[T, S]``.

    Full blocks are counted whole, partial ones by evaluating the mask.

    Returns:
        int32 ``[Bp, Np, T]``, how many keys each query sees, and ``[Bp, Np, S]``, how
        many queries see each key; there an incomplete full block counts as complete.
    """
    t, s, bq, bk = plan.query_length, plan.key_length, plan.block_q, plan.block_k
    nq, nk = -(-t // bq), -(-s // bk)
    leaves = [*jax.tree.leaves(operands), query_positions, key_positions]
    full, partial = jax.tree.map(jnp.asarray, plan.rows)
    batch, heads = _counted(mask, leaves, plan)

    def pad(x: Array, fill: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, nq * bq - t if x.shape[2] == t and t > 1 else 0)
        widths[3] = (0, nk * bk - s if x.shape[3] == s and s > 1 else 0)
        return jnp.pad(x, widths, constant_values=fill)

    padded = jax.tree.map(lambda x: pad(x, 0), operands)
    padded = padded, pad(query_positions, -1), pad(key_positions, -1), full, partial

    def example(arrays: PyTree) -> tuple[Array, Array]:
        """Counts of one example; its arrays ``[N or 1, T, S, *payload]``."""
        tiles, q_pos, k_pos, full, partial = arrays

        def row(
            found: tuple[Array, Array], r: Array
        ) -> tuple[tuple[Array, Array], None]:
            h, i = r // nq, r % nq

            def pick(x: Array) -> Array:
                return x[h if x.shape[0] > 1 else 0, i]

            lo, hi = pick(partial.lo), pick(partial.hi)
            end = jnp.maximum(hi - lo, 0).cumsum(dtype=jnp.int32)

            def block(rank: Array, counts: tuple[Array, Array]) -> tuple[Array, Array]:
                which = (end <= rank).sum(dtype=jnp.int32)
                j = hi[which] - (end[which] - rank)

                def tile_of(x: Array) -> Array:
                    return cut(x[None], (0, h, i * bq, j * bk), (bq, bk))

                tile = Tile(tile_of(q_pos), tile_of(k_pos), h)
                seen = visible_pairs(mask, tile, jax.tree.map(tile_of, tiles))
                seen = jnp.broadcast_to(seen, (bq, bk))
                by_query, by_key = counts
                by_key = lax.dynamic_update_slice(
                    by_key,
                    lax.dynamic_slice(by_key, (j * bk,), (bk,))
                    + seen.sum(0, dtype=jnp.int32),
                    (j * bk,),
                )
                return by_query + seen.sum(1, dtype=jnp.int32), by_key

            counts = (jnp.zeros(bq, jnp.int32), jnp.zeros(nk * bk, jnp.int32))
            counts = jax.tree.map(lambda x: vary_like(x, leaves), counts)
            if end.shape[0]:
                counts = lax.fori_loop(jnp.int32(0), end[-1], block, counts)
            by_query, by_key = counts
            lo, hi = pick(full.lo), pick(full.hi)
            widths = jnp.where(hi > lo, (hi - lo) * bk, 0)
            index = numbers(nk, 2)
            inside = ((index >= lo[:, None]) & (index < hi[:, None])).any(0)
            by_key = by_key + jnp.repeat(inside, bk).astype(jnp.int32) * bq
            # Summed on the way: a result for each row would be O(T S / block).
            by_query = by_query + widths.sum(dtype=jnp.int32)
            # Indexed, not sliced: XLA would hand the sharding of queries on to each
            # tile, and sum over devices in every step.
            slots = i * bq + jnp.arange(bq, dtype=jnp.int32)
            of_queries, of_keys = found
            of_queries = of_queries.at[h, slots].set(by_query)
            return (of_queries, of_keys.at[h].add(by_key)), None

        rows = jnp.arange(heads * nq, dtype=jnp.int32)
        start = [jnp.zeros((heads, n), jnp.int32) for n in (nq * bq, nk * bk)]
        start = jax.tree.map(lambda x: vary_like(x, leaves), tuple(start))
        (by_query, by_key), _ = lax.scan(row, start, rows)
        return by_query[:, :t], by_key[:, :s]

    # Mapped over examples, not looped: where they are sharded, nothing is sent.
    axes, padded = shared_axes(padded)
    return jax.vmap(example, (axes,), axis_size=batch)(padded)


def _counted(mask: Rule, leaves: Sequence[Array], plan: Plan) -> tuple[int, int]:
    """The numbers of examples and of heads that differ in what they see."""
    shapes = [x.shape for x in leaves] + [plan.rows.full.lo.shape]
    return max(s[0] for s in shapes), max(mask.head_count, *(s[1] for s in shapes))


def alive(
    mask: Rule,
    operands: PyTree,
    query_positions: Array,
    key_positions: Array,
    query: Blocks,
    key: Blocks,
) -> tuple[Array | None, Array | None]:
    """Which query slots see some key, and which key slots some query sees.

    Args:
        mask: the mask.
        operands: its operands, normalised.
        query_positions: ``[B or 1, 1, T, 1]``.
        key_positions: ``[B or 1, 1, 1, S]``.
        query: the blocks of queries.
        key: the blocks of keys.

    Returns:
        Booleans ``[Bp, Np, T]`` and ``[Bp, Np, S]``, exact; None for a side where the
        structure shows that every slot is alive.
    """
    at_zero = query.starts_at_zero and key.starts_at_zero
    if at_zero and query.length == key.length and mask.alive_sees_itself:
        return _along("query", mask, operands), _along("key", mask, operands)
    plan = make_plan(mask, operands, query, key, cols=False)
    if plan.is_static and at_zero and _structurally_alive(plan):
        return None, None

    given = (operands, query_positions, key_positions, None if plan.is_static else plan)
    given = jax.tree.map(lambda x: vary_like(x, given), lax.stop_gradient(given))
    fixed, without_arrays = plan if plan.is_static else None, skeleton(mask)

    # One mapped example after another: mapped at once, each loop would run as long as
    # the longest, and the shortcut would never be taken.
    @sequential_vmap
    def decide(operands: PyTree, q: Array, k: Array, plan: Any) -> tuple[Array, Array]:
        return _decide(without_arrays, operands, q, k, fixed if plan is None else plan)

    return decide(*given)


def alive_by_pairs(
    mask: Rule, operands: PyTree, query_positions: Array, key_positions: Array
) -> tuple[Array, Array]:
    """As :func:`alive`, without blocks: it holds ``[T, S]``."""
    seen = dense_visible(mask, operands, query_positions, key_positions)
    return seen.any(3), seen.any(2)


def _decide(
    mask: Rule,
    operands: PyTree,
    query_positions: Array,
    key_positions: Array,
    plan: Any,
) -> tuple[Array, Array]:
    def exact(_: None) -> tuple[Array, Array]:
        by_query, by_key = scan_partial(
            mask, operands, query_positions, key_positions, plan
        )
        return by_query > 0, by_key > 0

    if plan.query_length != plan.key_length:
        return exact(None)
    # Self-attention, as a rule, lets each living token see itself: then the necessary
    # condition for being alive is sufficient, and nothing needs to be counted.
    index = jnp.arange(plan.query_length, dtype=jnp.int32)
    leaves = [*jax.tree.leaves(operands), query_positions, key_positions]
    shape = *_counted(mask, leaves, plan), plan.query_length
    lower = _diagonal(mask, operands, query_positions, key_positions, index)
    uppers = []
    agree = jnp.ones((), bool)
    for side, positions in (("query", query_positions), ("key", key_positions)):
        slots = positions.reshape(*positions.shape[:2], -1) >= 0
        known = _along(side, mask, operands)
        if known is not None:
            slots = slots & known
        upper = jnp.broadcast_to(slots, shape)
        agree &= (upper == jnp.broadcast_to(lower, shape)).all()
        uppers.append(vary_like(upper, leaves))
    return lax.cond(agree, lambda _: tuple(uppers), exact, None)


def _along(side: str, mask: Rule, operands: PyTree) -> Array | None:
    """``may_be_alive`` as ``[Bp, Np, length]``."""
    known = mask.may_be_alive(side, operands)
    return None if known is None else known.reshape(*known.shape[:2], -1)


def _diagonal(
    mask: Rule,
    operands: PyTree,
    query_positions: Array,
    key_positions: Array,
    index: Array,
) -> Array:
    """Whether the query in each slot sees the key in the same slot, ``[Bp, Np, T]``."""
    length = index.shape[0]

    def one(tree: PyTree, q: Array, k: Array, head: Array, i: Array) -> Array:
        def pair(x: Array) -> Array:
            return cut(x[None, None], (0, 0, i, i), (1, 1))

        tile = Tile(pair(q), pair(k), head)
        return visible_pairs(mask, tile, jax.tree.map(pair, tree))[0, 0]

    leaves = [*jax.tree.leaves(operands), query_positions, key_positions]
    batch = max(x.shape[0] for x in leaves)
    heads = max([x.shape[1] for x in leaves] + [mask.head_count])

    def pick(x: Array, b: Array, h: Array) -> Array:
        return x[b if x.shape[0] != 1 else 0, h if x.shape[1] > 1 else 0]

    def cell(b: Array, h: Array) -> Array:
        tree = jax.tree.map(lambda x: pick(x, b, h), operands)
        q, k = pick(query_positions, b, h), pick(key_positions, b, h)
        return jax.vmap(lambda i: one(tree, q, k, h, i))(index)

    over_heads = jax.vmap(cell, (None, 0))
    result = jax.vmap(over_heads, (0, None))(jnp.arange(batch), jnp.arange(heads))
    return result.reshape(batch, heads, length)


def _structurally_alive(plan: Plan) -> bool:
    """Whether the full blocks alone keep every query and every key alive."""
    full = plan.rows.full
    if full.lo.shape[:2] != (1, 1):
        return False
    count = -(-plan.key_length // plan.block_k)
    steps = np.zeros(count + 1, int)
    real = full.hi > full.lo  # rows with fewer intervals are padded
    np.add.at(steps, full.lo[real], 1)
    np.add.at(steps, full.hi[real], -1)
    return bool(full.per_row().all() and (steps.cumsum()[:count] > 0).all())


def mask_density(mask: Rule, t: int, s: int | None) -> float:
    """See ``Mask.density``."""
    t, s = lengths_of(t, s)
    if t == 0 or s == 0:
        return 0.0
    operands, batch = alone(mask, t, s)
    if 0 in batch:
        return 0.0
    size_q, size_k = min(t, 512), min(s, 512)
    plan = make_plan(
        mask,
        operands,
        index_blocks("query", t, size_q),
        index_blocks("key", s, size_k),
        cols=False,
    )
    count = jax.jit(
        lambda ops: scan_partial(
            mask, ops, slot_operand(t, 2), slot_operand(s, 3), plan
        )
    )
    by_query, _ = count(operands)
    cells = by_query.shape[0] * by_query.shape[1] * t * s
    return float(np.asarray(by_query, np.float64).sum() / cells)
