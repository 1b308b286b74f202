"""How far the choice of an indexer is from what attention sees."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from attnlab._src import arguments
from attnlab._src.masks.base import Mask
from attnlab._src.masks.planning import dense_visible, normalise_tree
from attnlab._src.ops.attention import attend
from attnlab._src.ops.selection.best_keys import indexed
from attnlab._src.ops.selection.common import (
    MOST_LOGITS,
    cut,
    given_places,
    in_chunks,
    keys_at,
    on_any_mesh,
    queries_at,
    rows_of,
)
from attnlab._src.ops.selection.keys import Indexer, check_indexer
from attnlab._src.ops.validate import check
from attnlab._src.reverse import reverse_only
from attnlab._src.types import Array, ArrayLike, Modifier, Score, accumulation_dtype


def index_loss(
    indexer: Indexer,
    query: Array,
    key: Array,
    *,
    chosen: Array | None = None,
    mask: Mask | ArrayLike | None = None,
    query_offset: int | ArrayLike = 0,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    score: Score | None = None,
    modifiers: Sequence[Modifier] = (),
    sinks: ArrayLike | None = None,
) -> Array:
    """How far an indexer is from the attention that it chooses keys for.

    For each query the Kullback-Leibler divergence ``sum over s of p * log(p / q)``: p
    are the weights of attention, their mean over the heads; q is the softmax of the
    indexer's scores. Its gradient reaches the indexer only.

    Args:
        indexer: queries ``[*batch, T, J, P]``, keys ``[*batch, S, P]`` and weights
            ``[*batch, T, J]``, as of :func:`top_keys`.
        query: ``[*batch, T, N, H]`` of the attention.
        key: ``[*batch, S, K, H]`` of the attention.
        chosen: ``[*batch, 1, T, count]``, as :func:`top_keys` returns with this mask:
            both distributions are over these keys. Over all that the mask shows, if not
            given, which takes the time of dense attention.
        mask: which query may attend to which key; with ``chosen`` it is not needed.
        query_offset: position of the first query.
        query_positions: ``[T]`` or ``[*batch, T]``, -1 = empty slot.
        key_positions: ``[S]`` or ``[*batch, S]``, -1 = empty slot; slot numbers if not
            given.
        score: of the attention, as of :func:`attnlab.attention`.
        modifiers: of its logits.
        sinks: ``[N]``, its sinks.

    Returns:
        ``[*batch, T]``, float32 (float64 for float64); 0 for a query that sees no key.

    Raises:
        TypeError, ValueError: on arguments that do not fit, naming the argument.

    References:
        DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, section 2.1, equations 3 (all keys) and
        4 (those chosen).
    """
    if len(indexer) != 3:
        raise ValueError(
            f"indexer: expected queries, keys and weights, got {len(indexer)} arrays"
        )
    check_indexer(*indexer)
    args, _ = check(
        query,
        key,
        key,
        mask=mask,
        score=score,
        modifiers=modifiers,
        sinks=sinks,
        query_offset=query_offset,
        query_positions=query_positions,
        key_positions=key_positions,
    )
    batch, (t, s) = query.shape[:-3], (query.shape[-3], key.shape[-3])
    sides = indexer[0].shape[:-2], indexer[1].shape[:-1]
    if sides != ((*batch, t), (*batch, s)):
        raise ValueError(
            f"indexer: expected queries for {(*batch, t)} and keys for {(*batch, s)}, "
            f"as of the attention, got {sides[0]} and {sides[1]}"
        )
    if chosen is not None and (
        chosen.shape[:-1] != (*batch, 1, t) or chosen.shape[-1] < 1
    ):
        raise ValueError(
            f"chosen: expected shape {(*batch, 1, t)} and a count of at least 1, got "
            f"{chosen.shape}"
        )
    if key_positions is not None:
        key_positions = arguments.integers("key_positions", key_positions)
    places = *given_places(query_offset, query_positions), key_positions
    arrays = _Arrays(tuple(indexer), query, key, chosen, places)
    logits = {"score": args.score, "modifiers": args.modifiers, "sinks": args.sinks}
    run = functools.partial(_index_loss, most=MOST_LOGITS)
    return on_any_mesh(run, query, -3)(arrays, args.mask, logits)


#: Names what the backward pass of chosen keys keeps of the forward pass.
_SHARE = "attnlab_share_of_keys"


class _Arrays(NamedTuple):
    """Arguments of :func:`index_loss`."""

    indexer: Any
    query: Array
    key: Array
    chosen: Array | None
    places: Any


@functools.partial(jax.jit, static_argnames="most")
def _index_loss(arrays: _Arrays, mask: Mask, logits: Any, most: int) -> Array:
    """See :func:`index_loss`; ``most`` is the greatest number of logits at once."""
    (offset, query_positions, key_positions), chosen = arrays.places, arrays.chosen
    query, key, logits = lax.stop_gradient((arrays.query, arrays.key, logits))
    batch, total = query.shape[:-3], math.prod(query.shape[:-3])
    (t, heads), s = query.shape[-3:-1], key.shape[-3]
    query, key = (x.reshape(total, *x.shape[-3:]) for x in (query, key))
    small, keys, weights = (
        x.reshape(total, *x.shape[len(batch) :])
        for x in reverse_only(arrays.indexer, "select.index_loss")
    )
    at = queries_at(batch, t, offset, query_positions)
    where = keys_at(batch, s, key_positions)

    def weights_of(query: Array, key: Array, **places: Any) -> Any:
        """``[B, N, T, S]``."""
        options: Any = {"stats": True, "top_k": "all", "implementation": "reference"}
        return attend(query, key, key[..., :1], **options, **places, **logits).weights

    def of_all(first: Array, size: int) -> Array:
        part = cut(first, size)
        rows, columns = part(at.positions)[:, None, :, None], where[:, None, None]
        own = jax.tree.map(lambda x: rows_of(x, first, size), operands)
        seen = dense_visible(mask, own, rows, columns)
        found = weights_of(
            part(query),
            key,
            mask=seen,
            query_positions=jnp.broadcast_to(part(at.positions), (total, size)),
            key_positions=jnp.broadcast_to(where, (total, s)),
        )
        scores = indexed(part(small), keys, part(weights))
        return _divergence(found, scores, seen.any(1))[:, None]

    def of_chosen(first: Array, size: int) -> Array:
        part = cut(first, size)
        rows = jnp.broadcast_to(part(at.positions), (total, size))
        own = [x[:, :, None] for x in (*map(part, (query, small, weights)), rows)]
        lists, held = part(slots), jnp.broadcast_to(where, (total, s))
        listed = [_listed(x, lists) for x in (key, keys, held)]
        # Each query is an example of its own, with its own keys.
        own, listed = jax.tree.map(
            lambda x: x.reshape(total * size, *x.shape[2:]), (own, listed)
        )
        (query_own, small_own, weights_own, row), (far, near, column) = own, listed
        column = jnp.where(lists.reshape(column.shape) < 0, -1, column)
        found = weights_of(query_own, far, query_positions=row, key_positions=column)
        seen = (column >= 0) & (row >= 0)
        scores = indexed(small_own, near, weights_own)
        lost = _divergence(found, scores, seen[:, None])
        return lost.reshape(total, 1, size)

    if chosen is None:
        operands = normalise_tree(mask.operands(t, s), batch, "mask")
        held, chunk = max(heads, small.shape[2]) * s, of_all
    else:
        listed = chosen.reshape(total, t, -1)
        slots = listed if key_positions is None else _slots_of(where, listed)
        sizes = key.shape[2] * key.shape[3], heads, small.shape[2], keys.shape[-1]
        held, chunk = listed.shape[-1] * max(sizes), of_chosen
    # A chunk is computed again backward: its logits are not kept. The weights of chosen
    # keys are, as they are no larger than the lists.
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names(_SHARE) if chosen is not None else None
    found = in_chunks(
        jax.checkpoint(chunk, static_argnums=1, policy=kept),
        t,
        most // max(total * held, 1),
    )
    return found.reshape(*batch, t)


def _divergence(weights: Array, scores: Array, seen: Array) -> Array:
    """``[B, T]``, of weights ``[B, N, T, S]`` and scores ``[B, T, S]`` of seen keys."""
    dtype = accumulation_dtype(scores.dtype)
    # A product: on CPUs XLA computes a sum over an axis in the middle twenty times
    # slower. Heads that devices divide stay where they are.
    ones, heads = jnp.ones(weights.shape[1], dtype), weights.astype(dtype)
    share = jnp.einsum("n,bnts->bts", ones, heads, precision="highest")
    share /= jnp.maximum(share.sum(-1, keepdims=True), jnp.finfo(dtype).tiny)
    share = checkpoint_name(lax.stop_gradient(share), _SHARE)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True, initial=jnp.finfo(dtype).min)
    # Where nothing is seen, log(1) stands for the logarithm of no sum.
    scores = jnp.where(seen, scores - lax.stop_gradient(top), -jnp.inf)
    sums = jnp.exp(scores).sum(-1, keepdims=True)
    logs = scores - jnp.log(jnp.where(sums > 0, sums, 1))
    counts = seen & (share > 0)
    apart = jnp.log(jnp.where(counts, share, 1)) - jnp.where(counts, logs, 0)
    return jnp.where(counts, share * apart, 0).sum(-1)


def _listed(x: Array, lists: Array) -> Array:
    """``[B, T, R, ...]``: of ``[B, S, ...]`` the slots listed for each query."""
    return jax.vmap(lambda x, slots: x[jnp.maximum(slots, 0)])(x, lists)


def _slots_of(held: Array, positions: Array) -> Array:
    """Slots ``[B, T, R]`` of positions, of which slots ``[B, S]`` hold one each."""

    def of_example(held: Array, positions: Array) -> Array:
        order = jnp.argsort(held).astype(jnp.int32)
        found = jnp.searchsorted(held[order], positions, method="sort")
        return order[jnp.minimum(found, len(held) - 1)]

    held = jnp.broadcast_to(held, (len(positions), held.shape[1]))
    return jnp.where(positions < 0, -1, jax.vmap(of_example)(held, positions))
