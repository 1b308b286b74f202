"""Products with parameters on meshes with explicit axes, where results need a sharding.

There JAX refuses a product whose contracted axis is sharded, and a lookup by sharded
indices, unless the sharding of the result is given. Elsewhere nothing changes.

References:
    https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src.placement import names_of
from attnlab._src.types import Array


def project(linear: Any, x: Array) -> Array:
    """``linear(x)``: rows are sharded as those of x, features as those of the kernel.

    Args:
        linear: a ``flax.nnx.Linear`` or ``LinearGeneral``; any other callable must find
            its own sharding.
        x: ``[*rows, *inputs]``.
    """
    kernel = getattr(linear, "kernel", None)
    if kernel is None or not _is_explicit(x):
        return linear(x)
    inputs = linear.in_features
    inward = len(inputs) if isinstance(inputs, tuple) else 1
    outward = _spec(kernel[...])[inward:]
    return linear(x, out_sharding=_beside(x, x.ndim - inward, outward))


def look_up(table: nnx.Embed, tokens: Array) -> Array:
    """``table(tokens)``, sharded as tokens are: ``[*rows] -> [*rows, features]``."""
    if not _is_explicit(tokens):
        return table(tokens)
    return table(tokens, out_sharding=_beside(tokens, tokens.ndim, [None]))


def logits(table: nnx.Embed, x: Array) -> Array:
    """``table.attend(x)``: ``[*rows, features] -> [*rows, V]``, likewise."""
    if not _is_explicit(x):
        return table.attend(x)
    vocabulary = _spec(table.embedding[...])[:1]
    return table.attend(x, out_sharding=_beside(x, x.ndim - 1, vocabulary))


def _is_explicit(x: Array) -> bool:
    return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def _spec(x: Array) -> list[Any]:
    spec = jax.typeof(x).sharding.spec
    return [*spec, *[None] * (x.ndim - len(spec))]


def _beside(x: Array, rows: int, features: list[Any]) -> NamedSharding:
    """Rows sharded as those of x; features by axes that do not shard the rows."""
    lead = _spec(x)[:rows]
    used = {axis for entry in lead for axis in names_of(entry)}
    rest = [None if used & {*names_of(entry)} else entry for entry in features]
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*lead, *rest))
