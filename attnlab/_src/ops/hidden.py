"""Zeroes slots that no query sees, or that see nothing, before they are projected."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnlab._src.masks.base import Mask
from attnlab._src.ops.prepare import what_is_seen
from attnlab._src.ops.validate import Arguments, check
from attnlab._src.types import Array, ArrayLike


def zero_hidden(
    query: Array,
    *memory: Array,
    num_heads: int,
    num_key_heads: int | None = None,
    mask: Mask | ArrayLike | None = None,
    query_offset: int | ArrayLike = 0,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
) -> tuple[Array, ...]:
    """The arrays with zeros in slots that see nothing, or that no query sees.

    What these slots hold, NaN included, then reaches neither a projection of them nor
    the projection's gradient.

    Args:
        query: ``[*batch, T, features]``.
        *memory: ``[*batch, S, features]``: arrays that make keys and values.
        num_heads: N; a slot is hidden if it is hidden for every head.
        num_key_heads: K; N if not given.
        mask: as of :func:`attnlab.attention`, like the further arguments.
        query_offset: position of the first query.
        query_positions: ``[T]`` or ``[*batch, T]``; -1 = empty.
        key_positions: ``[S]`` or ``[*batch, S]``; -1 = empty.

    Raises:
        TypeError, ValueError: as :func:`attnlab.attention` does.
    """

    def heads(x: Array, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*x.shape[:-1], count, 1), jnp.float32)

    # A layer with several keys for each key head has more than divide N.
    key_heads = math.gcd(num_heads, num_key_heads or num_heads)
    keys = heads(memory[0] if memory else query, key_heads)
    args, _ = check(
        heads(query, num_heads),
        keys,
        keys,
        mask=mask,
        query_offset=query_offset,
        query_positions=query_positions,
        key_positions=key_positions,
    )
    if 0 in (*query.shape[:-1], *keys.shape[:-2]):
        return query, *memory
    args = args._replace(query=None, key=None, value=None)
    given = (query, *memory)
    run: Any = functools.partial(_zero_hidden, num_heads=num_heads)
    placed = [jax.typeof(x).sharding for x in given]
    if any(place.mesh.explicit_axes for place in placed):
        run = jax.sharding.auto_axes(run, out_sharding=tuple(placed))
    return run(args, given)


@functools.partial(jax.jit, static_argnames="num_heads")
def _zero_hidden(
    args: Arguments, given: tuple[Array, ...], *, num_heads: int
) -> tuple[Array, ...]:
    query, *memory = given
    batch, t, s = query.shape[:-2], query.shape[-2], given[-1].shape[-2]
    seen = what_is_seen(args, batch, num_heads, t, s)

    def clean(x: Array, alive: Array | None) -> Array:
        if alive is None:
            return x
        kept = jnp.broadcast_to(alive.any(1), (math.prod(batch), x.shape[-2]))
        kept = kept.reshape(*batch, x.shape[-2], 1)
        return jnp.where(kept, x, jnp.zeros((), x.dtype))

    return clean(query, seen.query_alive), *(clean(x, seen.key_alive) for x in memory)
