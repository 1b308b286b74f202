"""The keys that an indexer scores best for each query."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab._src import arguments
from attnlab._src.implementations.native.choosing import Choice
from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.planning import normalise_tree
from attnlab._src.ops.selection.best_keys import best_keys
from attnlab._src.ops.selection.common import (
    MOST_LOGITS,
    given_places,
    keys_at,
    on_any_mesh,
    queries_at,
)
from attnlab._src.pytrees import skeleton
from attnlab._src.types import Array, ArrayLike

#: Queries ``[*batch, T, J, H]``, keys ``[*batch, S, H]``, weights ``[*batch, T, J]``.
Indexer = tuple[Array, Array, Array]


def top_keys(
    query: Array,
    key: Array,
    weights: Array,
    count: int,
    *,
    mask: Mask | ArrayLike | None = None,
    query_offset: int | ArrayLike = 0,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
) -> Array:
    """The keys that an indexer scores best for each query.

    The indexer is a small attention of J heads with one key head:
    ``sum over j of weights[j] * relu(query[j] . key)``.

    Args:
        query: ``[*batch, T, J, H]``.
        key: ``[*batch, S, H]``.
        weights: ``[*batch, T, J]``.
        count: keys for each query; -1 where the mask shows fewer.
        mask: which query may attend to which key; all may if not given.
        query_offset: position of the first query.
        query_positions: ``[T]`` or ``[*batch, T]``, -1 = empty slot.
        key_positions: ``[S]`` or ``[*batch, S]``, -1 = empty slot; slot numbers if not
            given.

    Returns:
        int32 ``[*batch, 1, T, count]``: positions of keys, each list ascending, for
        :func:`attnlab.masks.selected`. Of equal keys the first slot is taken. No
        gradient flows through it.

    Raises:
        ValueError: if shapes do not fit.

    References:
        DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, section 1, equations 1 and 2.
    """
    arguments.sizes(1, count=count)
    check_indexer(query, key, weights)
    if key_positions is not None:
        key_positions = arguments.integers("key_positions", key_positions)
    places = *given_places(query_offset, query_positions), key_positions
    arrays = query, key, weights, places
    run = functools.partial(_top_keys, count=count, most=MOST_LOGITS)
    return on_any_mesh(run, query, None, -3, None)(arrays, as_mask(mask))


def check_indexer(query: Array, key: Array, weights: Array) -> None:
    """Raises a ValueError unless the shapes are those of :data:`Indexer`."""
    if query.ndim < 3:
        raise ValueError(f"query: expected [*batch, T, J, H], got shape {query.shape}")
    batch, (t, small, size) = query.shape[:-3], query.shape[-3:]
    if small < 1:
        raise ValueError(
            f"query: expected at least one head of the indexer, got shape {query.shape}"
        )
    s = key.shape[-2] if key.ndim > 1 else "S"
    for name, x, wanted in (
        ("key", key, (*batch, s, size)),
        ("weights", weights, (*batch, t, small)),
    ):
        if x.shape != wanted:
            raise ValueError(
                f"{name}: expected shape {wanted} with a query of shape "
                f"{query.shape}, got {x.shape}"
            )


@functools.partial(jax.jit, static_argnames=("count", "most"))
def _top_keys(
    arrays: tuple[Array, Array, Array, Any], mask: Mask, count: int, most: int
) -> Array:
    """See :func:`top_keys`; ``most`` is the greatest number of logits at once."""
    query, key, weights, (offset, query_positions, key_positions) = arrays
    batch = query.shape[:-3]
    (t, small, size), s = query.shape[-3:], key.shape[-2]
    total = math.prod(batch)
    query = query.reshape(total, t, small, size)
    key, weights = key.reshape(total, s, size), weights.reshape(total, t, small)
    at = queries_at(batch, t, offset, query_positions)
    places = keys_at(batch, s, key_positions)
    operands = normalise_tree(mask.operands(t, s), batch, "mask")
    choice = Choice(query, key, weights, at.positions, places, skeleton(mask), operands)
    chosen = best_keys(choice, count, most)[:, None]
    if key_positions is not None:
        held = jnp.broadcast_to(places, (total, s))[:, None, None]
        held = jnp.take_along_axis(held, jnp.maximum(chosen, 0), -1)
        chosen = jnp.sort(jnp.where(chosen < 0, -1, held), -1)
    return chosen.reshape(*batch, *chosen.shape[1:])
