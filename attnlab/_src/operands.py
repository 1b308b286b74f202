"""Cuts tiles of operands, ``[B, N, T, S, *payload]``."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.types import Array


def corner(
    x: Array, place: Sequence[int | Array], sizes: tuple[int, int]
) -> tuple[list[Array], list[int]]:
    """Start and shape of a tile; axes of 1 are shared by all tiles.

    Args:
        x: an operand, each of its first four axes full or 1.
        place: example, head, first query and first key.
        sizes: queries and keys of the tile.

    Returns:
        What ``lax.dynamic_slice`` takes: starts of one integer type (Python's would be
        another one in x64 mode), and ``[1, 1, q or 1, k or 1, *payload]``.
    """
    start = [jnp.asarray(n, jnp.int32) for n in (*place, *[0] * (x.ndim - 4))]
    shape = [1, 1, *sizes, *x.shape[4:]]
    for axis in range(4):
        if x.shape[axis] == 1:
            start[axis], shape[axis] = jnp.int32(0), 1
    return start, shape


def cut(x: Array, place: Sequence[int | Array], sizes: tuple[int, int]) -> Array:
    """The tile ``[q or 1, k or 1, *payload]``; arguments as of :func:`corner`."""
    start, shape = corner(x, place, sizes)
    return lax.dynamic_slice(x, start, shape).reshape(shape[2:])


def tile_shape(
    x: Array | jax.ShapeDtypeStruct, sizes: tuple[int, int]
) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a tile of those sizes, as traced functions have it."""
    shape = (1 if n == 1 else m for n, m in zip(x.shape[2:4], sizes, strict=True))
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)  # that of NumPy may be wider
    return jax.ShapeDtypeStruct((*shape, *x.shape[4:]), dtype)
