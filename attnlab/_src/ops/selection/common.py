"""What choosing blocks and choosing keys share: places, chunks of rows, the best."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src import arguments
from attnlab._src.types import Array, ArrayLike

#: Greatest number of logits that are held at once, 64 MiB in float32.
MOST_LOGITS = 2**24


class Queries(NamedTuple):
    """Where the queries of a call are.

    Attributes:
        positions: ``[B or 1, T]``; -1 = empty.
        offset: ``[B or 1]``, the position of the first query; None where positions are
            given one by one.
    """

    positions: Array
    offset: ArrayLike | None


#: The position of the first query, None if it is 0; or all positions, or None.
Places = tuple[ArrayLike | None, ArrayLike | None]


def given_places(offset: int | ArrayLike, positions: ArrayLike | None) -> Places:
    """Where queries are, checked.

    Raises:
        TypeError: if they are no integers.
        ValueError: if an integer that is known here does not fit 32 bits.
    """
    if positions is not None:
        return None, arguments.integers("query_positions", positions)
    if isinstance(offset, int) and offset == 0:
        return None, None  # structure: plans of other masks are known, then
    return arguments.integers("query_offset", offset), None


def queries_at(
    batch: tuple[int, ...], t: int, offset: ArrayLike | None, given: ArrayLike | None
) -> Queries:
    """The queries of T slots; arguments as of :data:`Places`."""
    if given is not None:
        places = jnp.asarray(given).reshape(-1, t)
        return Queries(jnp.broadcast_to(places, (math.prod(batch), t)), None)
    first = np.zeros(1, np.int32) if offset is None else offset.reshape(-1)
    slots = np.arange(t, dtype=np.int32)
    return Queries(jnp.asarray(first)[:, None] + slots[None], first)


def on_any_mesh(
    function: Callable[..., Array], query: Array, *axes: int | None
) -> Callable[..., Array]:
    """A function whose result is sharded as a query is, where a mesh has explicit axes.

    The compiler shards the arrays in between.

    Args:
        function: of arrays.
        query: ``[*batch, T, heads, H]``.
        axes: for each axis of the result after the batch, the axis of the query that it
            is sharded as, counted from the end; None: not sharded.
    """
    sharding = jax.typeof(query).sharding
    if not sharding.mesh.explicit_axes:
        return function
    spec = [*sharding.spec, *[None] * query.ndim][: query.ndim]
    placed = PartitionSpec(*spec[:-3], *(a if a is None else spec[a] for a in axes))
    out_sharding = NamedSharding(sharding.mesh, placed)
    run: Any = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return run


def keys_at(batch: tuple[int, ...], s: int, given: ArrayLike | None) -> Array:
    """Positions ``[B or 1, S]`` of keys; slot numbers if not given."""
    if given is None:
        return jnp.arange(s, dtype=jnp.int32)[None]
    return jnp.broadcast_to(given, (*batch, s)).reshape(math.prod(batch), s)


def cut(first: Array, size: int) -> Callable[[Array], Array]:
    """A function that takes some rows of ``[B, rows, ...]``."""
    return lambda x: lax.dynamic_slice_in_dim(x, first, size, 1)


def in_chunks(chunk: Callable[[Array, int], Array], rows: int, most: int) -> Array:
    """``[B, heads, rows, ...]`` of ``chunk(first, size)``, at most so many rows."""
    most = max(most, 1)
    if rows <= most:
        return chunk(jnp.int32(0), rows)
    # The last chunk begins earlier, so that all have one size.
    count = -(-rows // most)
    starts = np.minimum(np.arange(count, dtype=np.int32) * most, rows - most)
    found = lax.map(lambda first: chunk(first, most), jnp.asarray(starts))
    found = jnp.moveaxis(found, 0, 2)
    kept = np.concatenate([
        np.arange(n * most, (n + 1) * most)[n * most - start :]
        for n, start in enumerate(starts.tolist())
    ])
    found = found.reshape(*found.shape[:2], count * most, *found.shape[4:])
    return found if len(kept) == count * most else found[:, :, kept]


def rows_of(x: ArrayLike, first: Array, size: int) -> Array:
    """Some queries of an operand ``[B, N, T, S, *payload]``."""
    x = jnp.asarray(x)
    return x if x.shape[2] == 1 else lax.dynamic_slice_in_dim(x, first, size, 2)


def greatest(x: Array, count: int) -> Array:
    """Indices of the greatest entries, ascending; -1 instead of those of -inf."""
    found = min(count, x.shape[-1])
    values, places = lax.top_k(x, found)
    places = jnp.where(values > -jnp.inf, places, -1).astype(jnp.int32)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, count - found)]
    return jnp.sort(jnp.pad(places, padding, constant_values=-1), -1)
