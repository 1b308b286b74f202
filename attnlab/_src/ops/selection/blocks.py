"""The blocks of keys that score best for each block of queries."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src import arguments
from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.planning import (
    index_blocks,
    make_plan,
    normalise_tree,
    position_blocks,
)
from attnlab._src.ops.selection.common import (
    MOST_LOGITS,
    Places,
    Queries,
    given_places,
    greatest,
    in_chunks,
    on_any_mesh,
    queries_at,
)
from attnlab._src.scores.inner import ScaledDot
from attnlab._src.types import (
    Array,
    ArrayLike,
    Intervals,
    Plan,
    Score,
    accumulation_dtype,
)


def top_blocks(
    query: Array,
    key: Array,
    count: int,
    *,
    key_block: int,
    query_block: int = 1,
    score: Score | None = None,
    mask: Mask | ArrayLike | None = None,
    first: int = 0,
    local: int = 1,
    each_head: bool = False,
    by: Literal["mean", "weights"] = "mean",
    key_length: int | None = None,
    query_offset: int | ArrayLike = 0,
    query_positions: ArrayLike | None = None,
) -> Array:
    """The blocks of keys that score best for each block of queries.

    Give the result to :func:`attnlab.masks.selected`, together with the mask: a block
    is taken if the mask shows a pair in it, so that some of its keys may be hidden.

    Args:
        query: ``[*batch, T, N, H]``.
        key: ``[*batch, blocks, K, H]``: a key for each block, as :func:`pool` makes.
        count: blocks for each block of queries. Where the mask shows fewer, -1.
        key_block: keys in a block.
        query_block: queries that share their blocks.
        score: any score function; scaled dot product if not given.
        mask: which query may attend to which key; all may if not given.
        first: so many blocks at the beginning are taken whatever their scores, if the
            mask shows them.
        local: so many blocks up to that of the query itself likewise; 0: it has no
            advantage. These blocks count.
        each_head: whether each query head chooses, and not each key head for the query
            heads that share it.
        by: what is compared, if several queries or heads choose together. "mean": the
            mean of their logits; "weights": the sum of their weights, which are the
            softmax of the logits over those blocks that the mask shows whole.
        key_length: S, if the last block holds fewer keys.
        query_offset: position of the first query.
        query_positions: ``[T]`` or ``[*batch, T]``, -1 = empty slot; instead of an
            offset.

    Returns:
        int32 ``[*batch, heads, ceil(T / query_block), count]``, each list ascending; K
        heads, or N. Of equal blocks the first is taken. No gradient flows through it.

    Raises:
        ValueError: if shapes do not fit, or ``count`` is less than the blocks that are
            taken whatever their scores.

    Example:
        >>> from attnlab.select import pool
        >>> x = jnp.eye(4)[:, None]  # four keys, or queries, of size 4
        >>> key = pool(x, 2)
        >>> top_blocks(x, key, 1, key_block=2, local=0)[0].ravel()
        Array([0, 0, 1, 1], dtype=int32)

    References:
        Lu et al., "MoBA", 2025, section 2.2 (mean, single queries, each head); Yuan et
        al., "Native Sparse Attention", 2025, section 3.3.2 (weights, key heads).
    """
    arguments.sizes(1, count=count, key_block=key_block, query_block=query_block)
    if by not in ("mean", "weights"):
        raise ValueError(f"by: expected 'mean' or 'weights', got {by!r}")
    _check_sides(query, key)
    (heads, _), (blocks, key_heads, _) = query.shape[-2:], key.shape[-3:]
    arguments.sizes(0, first=first, local=local)
    s = blocks * key_block if key_length is None else key_length
    if -(-s // key_block) != blocks:
        raise ValueError(
            f"key_length: expected what makes {blocks} blocks of {key_block} keys, got "
            f"{key_length}"
        )
    group = heads if each_head else key_heads
    how = _How(count, query_block, key_block, first, local, group, by, s, MOST_LOGITS)
    places = given_places(query_offset, query_positions)
    _check_taken(how, blocks, at_zero=all(x is None for x in places))
    score = ScaledDot() if score is None else score
    run = functools.partial(_top_blocks, how=how)
    # Rows are not sharded where they are blocks of queries, nor blocks of keys.
    rows = -3 if each_head and query_block == 1 else None
    run = on_any_mesh(run, query if each_head else key, -2, rows, None)
    return run((query, key, places), score, as_mask(mask))


class _How(NamedTuple):
    """The settings of a choice: structure.

    Attributes:
        count: blocks for each block of queries.
        query_block: queries in a block.
        key_block: keys in a block.
        first: how many first blocks are taken.
        local: how many last ones, up to that of the query itself.
        group: how many heads choose.
        by: what is compared, "mean" or "weights".
        key_length: S.
        most: greatest number of logits at once.
    """

    count: int
    query_block: int
    key_block: int
    first: int
    local: int
    group: int
    by: str
    key_length: int
    most: int


@functools.partial(jax.jit, static_argnames="how")
def _top_blocks(
    arrays: tuple[Array, Array, Places], score: Score, mask: Mask, how: _How
) -> Array:
    query, key, places = arrays
    count, query_block, key_block, first, local, group, by, s, most = how
    batch, (t, heads, _), blocks = query.shape[:-3], query.shape[-3:], key.shape[-3]
    at = queries_at(batch, t, *places)
    query, key = lax.stop_gradient((query, key))
    query = query.reshape(math.prod(batch), *query.shape[-3:])
    key = key.reshape(math.prod(batch), *key.shape[-3:])
    score, scale = score.without_scale(query.shape[-1])
    query, key = score.project_query(query), score.project_key(key)
    dtype = accumulation_dtype(query.dtype)
    # One factor, or one for each head.
    scale = jnp.asarray(scale, dtype).reshape(1, 1, -1, 1)
    rows = -(-t // query_block)
    plan = _plan(mask, batch, (t, s), (query_block, key_block), at)

    def together(x: Array) -> Array:
        """Sums ``[B, N, q, ...]`` over query heads that choose together."""
        return x.reshape(x.shape[0], group, -1, *x.shape[2:]).sum(2)

    padding = [(0, 0), (0, rows * query_block - t), (0, 0), (0, 0)]
    query = jnp.pad(query, padding)
    positions = jnp.pad(at.positions, padding[:2], constant_values=-1)
    positions = positions.reshape(-1, rows, query_block)
    exists = (positions >= 0)[:, None]  # [B or 1, 1, rows, query_block]

    of_mean = by == "mean" and score.is_inner_product
    if of_mean:
        # The mean of products with a key is the product with the mean.
        query = (query.astype(dtype) * scale).swapaxes(1, 2)
        query = together(query).reshape(-1, group, rows, query_block, query.shape[-1])
        query = jnp.where(exists[..., None], query, 0).sum(3).swapaxes(1, 2)

    def chunk(start: Array, size: int) -> Array:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=start)
        own_rows = part(positions, slice_size=size, axis=1)
        # [B or 1, N or 1, size, blocks]: shown whole, and shown at all.
        whole, seen = _shown(plan, start, size, blocks)
        if of_mean:
            found = _pairs(score, part(query, slice_size=size, axis=1), key)
        else:
            queries = lax.dynamic_slice_in_dim(
                query, start * query_block, size * query_block, 1
            )
            found = _pairs(score, queries, key) * scale.swapaxes(1, 2)
            found = found.reshape(*found.shape[:2], size, query_block, blocks)
            if by == "weights":
                found = jnp.where(whole[..., None, :], found, -jnp.inf)
                top = found.max(-1, keepdims=True, initial=jnp.finfo(dtype).min)
                found = jnp.exp(found - top)
                found = found / jnp.maximum(found.sum(-1, keepdims=True), 1e-30)
            there = part(exists, slice_size=size, axis=2)[..., None]
            found = together(jnp.where(there, found, 0).sum(-2))
        some = together(jnp.broadcast_to(seen, (len(query), heads, size, blocks))) > 0
        # Not a number is no reason to take a block.
        found = jnp.where(some & ~jnp.isnan(found), found, -jnp.inf)
        number = jnp.arange(blocks, dtype=jnp.int32)[None, None]
        taken = jnp.broadcast_to(number < first, (1, size, blocks))
        if local:
            known = jnp.where(own_rows < 0, jnp.iinfo(jnp.int32).max, own_rows)
            least = known.min(-1)[..., None] // key_block - (local - 1)
            taken |= (number >= least) & (
                number <= own_rows.max(-1)[..., None] // key_block
            )
        found = jnp.where(some & taken[:, None], jnp.inf, found)
        return greatest(found, count)

    held = len(query) * blocks * (group if of_mean else heads * query_block)
    chosen = in_chunks(chunk, rows, most // max(held, 1))
    return chosen.reshape(*batch, *chosen.shape[1:])


def _pairs(score: Score, query: Array, key: Array) -> Array:
    """Logits of all pairs: ``[B, T, N, P], [B, S, K, P] -> [B, N, T, S]``."""
    b, t, heads, size = query.shape
    s, key_heads = key.shape[1:3]
    dtype = accumulation_dtype(query.dtype)
    if score.is_inner_product:
        grouped = query.reshape(b, t, key_heads, -1, size)
        found = jnp.einsum(
            "btkgp,bskp->bkgts", grouped, key, preferred_element_type=dtype
        )
        return found.reshape(b, heads, t, s)

    def of_head(x: Array) -> Array:
        return jnp.broadcast_to(x, (heads, *x.shape[1:]))

    params = jax.tree.map(of_head, score.pair_params())
    key = jnp.repeat(key, heads // key_heads, axis=2)
    compare = jax.vmap(score.compare, (0, 1, 1))
    return jax.vmap(compare, (None, 0, 0))(params, query, key).astype(dtype)


def _check_taken(how: _How, blocks: int, at_zero: bool) -> None:
    """Raises a ValueError if more blocks than ``count`` may be taken unasked."""
    count, query_block, key_block, first, local, *_ = how
    own = -(-query_block // key_block)
    fits = query_block % key_block == 0 or key_block % query_block == 0
    if query_block > 1 and not (at_zero and fits):
        own = (query_block - 1) // key_block + 2
    taken = min(first + (own + local - 1 if local else 0), blocks)
    if count < taken:
        raise ValueError(
            f"count: expected at least {taken}, because first={first} and local="
            f"{local} take so many blocks of {key_block} keys for a block of "
            f"{query_block} queries, got {count}"
        )


def _check_sides(query: Array, key: Array) -> None:
    """Raises unless they are ``[*batch, T, N, H]`` and ``[*batch, blocks, K, H]``."""
    for name, x in (("query", query), ("key", key)):
        if x.ndim < 3:
            raise ValueError(
                f"{name}: expected [*batch, length, heads, H], got shape {x.shape}"
            )
    if query.shape[:-3] != key.shape[:-3] or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"key: expected the batch axes {query.shape[:-3]} of the query, and a "
            f"number of heads that divides its {query.shape[-2]}, got shape {key.shape}"
        )


def _plan(
    mask: Mask,
    batch: tuple[int, ...],
    lengths: tuple[int, int],
    sizes: tuple[int, int],
    at: Queries,
) -> Plan:
    operands = normalise_tree(mask.operands(*lengths), batch, "mask")
    if at.offset is None:
        query: Any = position_blocks("query", at.positions, sizes[0])
    else:
        query = index_blocks("query", lengths[0], sizes[0], at.offset)
    key = index_blocks("key", lengths[1], sizes[1])
    return make_plan(mask, operands, query, key, cols=False)


def _shown(plan: Plan, start: Array, size: int, blocks: int) -> tuple[Array, Array]:
    """Which blocks some rows see whole, and which at all; the last one may be short."""
    number = jnp.arange(blocks, dtype=jnp.int32).reshape(1, 1, 1, blocks, 1)

    def inside(intervals: Intervals) -> Array:
        lo, hi = (
            lax.dynamic_slice_in_dim(jnp.asarray(x), start, size, 2) for x in intervals
        )
        found = (number >= lo[..., None, :]) & (number < hi[..., None, :])
        return found.any(-1)

    full, partial = map(inside, plan.rows)
    return full, full | partial
