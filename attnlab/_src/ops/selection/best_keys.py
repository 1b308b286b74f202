"""The choice of keys as one primitive: by XLA's operations, or by the CPU kernel.

Which one is decided when the primitive is lowered, because only then the platform is
known, and whether XLA divides the program among devices: it could not divide a kernel.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src.implementations.native.choosing import (
    Choice,
    can_choose,
    chosen_keys,
)
from attnlab._src.masks.planning import dense_visible
from attnlab._src.ops.partition import is_divided, spans_devices
from attnlab._src.ops.primitive import Asked
from attnlab._src.ops.selection.common import cut, greatest, in_chunks, rows_of
from attnlab._src.types import Array, accumulation_dtype
from attnlab._src.varying import vary_like


def best_keys(choice: Choice, count: int, most: int) -> Array:
    """The keys that an indexer scores best for each query.

    Args:
        choice: what to choose from.
        count: keys for each query; -1 where the mask shows fewer.
        most: greatest number of logits that XLA's operations hold at once.

    Returns:
        int32 ``[B, T, count]``: slots, each list ascending. Of equal keys the first
        slot is taken. No gradient flows through it.
    """
    choice = lax.stop_gradient(choice)
    choice = jax.tree.map(lambda x: vary_like(jnp.asarray(x), choice), choice)
    leaves, structure = jax.tree.flatten(choice)
    return best_keys_p.bind(
        *leaves,
        structure=structure,
        count=count,
        most=most,
        asked=Asked.now(None, None),
    )


@jax.custom_vjp
def indexed(query: Array, key: Array, weights: Array) -> Array:
    """Scores ``[B, T, S]`` of an indexer with one batch axis."""
    return _indexed(query, key, weights)[0]


def _indexed(query: Array, key: Array, weights: Array) -> tuple[Array, Any]:
    dtype = accumulation_dtype(query.dtype)
    found = jnp.einsum("btjh,bsh->btjs", query, key, preferred_element_type=dtype)
    # Head by head: XLA computes a sum over an axis in the middle several times slower,
    # on CPUs.
    parts = zip(_heads(found), _heads(weights.astype(dtype)[..., None]), strict=True)
    scores = sum((jax.nn.relu(x) * w for x, w in parts), jnp.zeros((), dtype))
    return scores, (query, key, weights, found)


def _indexed_backward(kept: Any, above: Array) -> tuple[Array, Array, Array]:
    query, key, weights, found = kept
    wide_query, wide_key, wide_weights = (x.astype(above.dtype) for x in kept[:3])
    d_found = jnp.where(found > 0, above[:, :, None], 0)  # but for the weights
    # The sums over keys of a query serve its gradient and that of its weights.
    sums = jnp.einsum("btjs,bsh->btjh", d_found, wide_key)
    d_weights = (sums * wide_query).sum(-1)
    weighted = wide_query * wide_weights[..., None]
    # Rows of `d_found` are read as they lie, not across.
    (b, _, _, h), s = query.shape, key.shape[1]
    rows = weighted.reshape(b, -1, h), d_found.reshape(b, -1, s)
    d_key = jnp.einsum("bnh,bns->bhs", *rows).swapaxes(1, 2)
    return (
        (sums * wide_weights[..., None]).astype(query.dtype),
        d_key.astype(key.dtype),
        d_weights.astype(weights.dtype),
    )


def _heads(x: Array) -> list[Array]:
    """Each of the heads ``[B, T, S]`` of ``[B, T, J, S]``."""
    return [part[:, :, 0] for part in lax.split(x, [1] * x.shape[2], 2)]


indexed.defvjp(_indexed, _indexed_backward)


def by_xla(choice: Choice, count: int, most: int) -> Array:
    """See :func:`best_keys`: the definition, in chunks of queries."""
    query, key, weights, rows, places, mask, operands = choice
    (total, t, small, _), s = query.shape, key.shape[1]

    def chunk(first: Array, size: int) -> Array:
        part = cut(first, size)
        found = indexed(part(query), key, part(weights))
        own = jax.tree.map(lambda x: rows_of(x, first, size), operands)
        at = part(rows)[:, None, :, None], places[:, None, None]
        seen = dense_visible(mask, own, *at).any(1)
        found = jnp.where(seen & ~jnp.isnan(found), found, -jnp.inf)
        return greatest(found[:, None], count)

    return in_chunks(chunk, t, most // max(total * s * small, 1))[:, 0]


best_keys_p = jax.extend.core.Primitive("best_keys")


@best_keys_p.def_abstract_eval
def _type(*avals: Any, structure: Any, count: int, **_: Any) -> Any:
    # All inputs vary over the same manual axes, and so does the result.
    query: Any = jax.tree.unflatten(structure, avals).query
    sharding = query.sharding
    placed = PartitionSpec(*[*sharding.spec, None, None][:2], None)
    return query.update(
        shape=(*query.shape[:2], count),
        dtype=np.dtype(np.int32),
        weak_type=False,
        sharding=NamedSharding(sharding.mesh, placed),
    )


def _lower(
    ctx: Any, *values: Any, structure: Any, count: int, most: int, asked: Asked
) -> Sequence[Any]:
    module = ctx.module_context
    context = module.axis_context
    platforms = tuple(ctx.platforms or module.platforms)
    exported = module.lowering_parameters.for_export
    choice: Any = jax.tree.unflatten(structure, ctx.avals_in)
    alone = platforms == ("cpu",) and not exported and not spans_devices(context)

    def run(*leaves: Array) -> Array:
        given: Any = jax.tree.unflatten(structure, leaves)
        if alone and can_choose(choice):
            return chosen_keys(given, count)
        return by_xla(given, count, most)

    is_share = is_divided(context)
    # Without the manual axes of shard_map: these are one device's arrays.
    avals = [
        jax.core.ShapedArray(
            x.shape, x.dtype, x.weak_type, sharding=None if is_share else x.sharding
        )
        for x in ctx.avals_in
    ]
    lower = mlir.lower_fun(run, multiple_results=False)
    with asked.settings():
        return lower(ctx.replace(avals_in=avals), *values)


mlir.register_lowering(best_keys_p, _lower)


@functools.partial(jax.jit, static_argnames=("structure", "count", "most", "asked"))
def _bind(*leaves: Array, **static: Any) -> Array:
    return best_keys_p.bind(*leaves, **static)


@best_keys_p.def_impl
def _run_alone(*leaves: Array, **static: Any) -> Array:
    with jax.disable_jit(False):
        return _bind(*leaves, **static)


def _batched(
    leaves: Sequence[Array], axes: Sequence[Any], *, structure: Any, **static: Any
) -> tuple[Array, int]:
    """``vmap``: more examples."""
    size = next(
        x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None
    )
    where: Any = jax.tree.unflatten(structure, axes)
    examples = jax.tree.unflatten(structure, leaves).query.shape
    b = examples[0 if where.query is None or where.query > 0 else 1]

    def merged(x: Array, axis: Any, shared: bool = True) -> Array:
        if axis is None:
            if shared and x.shape[0] == 1:
                return x
            x = jnp.broadcast_to(x[None], (size, *x.shape))
        else:
            x = jnp.moveaxis(x, axis, 0)
        return jnp.broadcast_to(x, (size, b, *x.shape[2:])).reshape(-1, *x.shape[2:])

    # The first three have all examples; the others may be shared.
    each = [
        merged(x, axis, place > 2)
        for place, (x, axis) in enumerate(zip(leaves, axes, strict=True))
    ]
    found = best_keys_p.bind(*each, structure=structure, **static)
    return found.reshape(size, b, *found.shape[1:]), 0


batching.primitive_batchers[best_keys_p] = _batched
