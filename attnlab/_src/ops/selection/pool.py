"""Blocks of keys as one key each."""

import functools
from typing import Literal

import jax.numpy as jnp

from attnlab._src import arguments
from attnlab._src.ops.selection.common import on_any_mesh
from attnlab._src.types import Array, accumulation_dtype


def pool(
    x: Array,
    block_size: int,
    *,
    how: Literal["mean", "max"] | Array = "mean",
    where: Array | None = None,
) -> Array:
    """Keys (or values) of a block as one.

    Args:
        x: ``[*batch, S, K, H]``.
        block_size: keys in a block; the last block may hold fewer.
        how: "mean", "max", or weights ``[block_size]`` or ``[block_size, K, 1 or H]``
            of a weighted sum.
        where: boolean ``[*batch, S]``, which keys there are; all if not given.

    Returns:
        ``[*batch, ceil(S / block_size), K, H]`` in the type of ``x``; zeros for a block
        without keys. It is differentiable.

    Raises:
        ValueError: if shapes do not fit, or ``how`` is unknown.

    Example:
        >>> x = jnp.arange(5.0).reshape(5, 1, 1)
        >>> pool(x, 2).ravel()
        Array([0.5, 2.5, 4. ], dtype=float32)

    References:
        Lu et al., "MoBA", 2025, section 2.2, equation 6 (mean); Yuan et al., "Native
        Sparse Attention", 2025, section 3.3.1, equation 7 (learned).
    """
    block_size = arguments.size("block_size", block_size)
    if x.ndim < 3:
        raise ValueError(f"x: expected [*batch, S, K, H], got shape {x.shape}")
    batch, (s, heads, size) = x.shape[:-3], x.shape[-3:]
    if where is not None and where.shape != (*batch, s):
        raise ValueError(f"where: expected shape {(*batch, s)}, got {where.shape}")
    if isinstance(how, str) and how in ("mean", "max"):
        run = functools.partial(_pool, block_size=block_size, how=how)
        return on_any_mesh(run, x, None, -2, -1)(x, where)
    shape = getattr(how, "shape", None)
    if shape not in (
        (block_size,),
        (block_size, heads, 1),
        (block_size, heads, size),
    ):
        raise ValueError(
            f"how: expected 'mean', 'max', or weights [{block_size}] or [{block_size}, "
            f"{heads}, 1 or {size}], got {how if shape is None else shape}"
        )
    run = functools.partial(_pool, block_size=block_size, how="sum")
    return on_any_mesh(run, x, None, -2, -1)(x, where, how)


def _pool(
    x: Array,
    where: Array | None,
    weights: Array | None = None,
    *,
    block_size: int,
    how: str,
) -> Array:
    """See :func:`pool`; ``how`` is "mean", "max", or "sum" of weighted keys."""
    batch, s = x.shape[:-3], x.shape[-3]
    count = -(-s // block_size)
    short = [(0, count * block_size - s)]

    def blocks(x: Array, more: int) -> Array:
        x = jnp.pad(x, [(0, 0)] * len(batch) + short + [(0, 0)] * more)
        return x.reshape(*batch, count, block_size, *x.shape[len(batch) + 1 :])

    there = blocks(jnp.ones((*batch, s), bool) if where is None else where, 0)
    there = there[..., None, None]
    wide = blocks(x, 2).astype(accumulation_dtype(x.dtype))
    if how == "max":
        wide = jnp.where(there, wide, jnp.finfo(wide.dtype).min).max(-3)
        return jnp.where(there.any(-3), wide, 0).astype(x.dtype)
    wide = jnp.where(there, wide, 0)
    if weights is None:
        total = jnp.maximum(there.sum(-3, dtype=jnp.int32), 1)
        return (wide.sum(-3) / total.astype(wide.dtype)).astype(x.dtype)
    weights = jnp.asarray(weights, wide.dtype)
    weights = weights.reshape(block_size, *(weights.shape[1:] or (1, 1)))
    weights = weights.reshape(*[1] * (len(batch) + 1), *weights.shape)
    return (wide * weights).sum(-3).astype(x.dtype)
