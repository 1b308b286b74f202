"""Modifiers that depend on the offset between key and query position."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.types import Array, ArrayLike, Modifier, Operand, Tile, pytree, static


@pytree
class Alibi(Modifier):
    """``logits - slope * |t - s|``."""

    flops_per_pair = 3

    slopes: ArrayLike

    def operands(self) -> tuple[Operand, ...]:
        """See :class:`attnlab.Modifier`."""
        return (Operand(self.slopes[..., :, None, None]),)

    def apply(self, logits: Array, tile: Tile, *operands: Array) -> Array:
        """See :class:`attnlab.Modifier`."""
        distance = jnp.abs(tile.query_positions - tile.key_positions)
        return logits - operands[0].astype(logits.dtype) * distance.astype(logits.dtype)


@pytree
class RelativeTable(Modifier):
    """``logits + table[bucket(s - t)]``."""

    flops_per_pair = 6

    table: ArrayLike
    bidirectional: bool | None = static()
    left: int = static()
    right: int = static()

    def operands(self) -> tuple[Operand, ...]:
        """See :class:`attnlab.Modifier`."""
        return (Operand(self.table[..., :, None, None, :], payload=1),)

    def apply(self, logits: Array, tile: Tile, *operands: Array) -> Array:
        """See :class:`attnlab.Modifier`."""
        table = operands[0][0, 0].astype(logits.dtype)
        offset = tile.key_positions - tile.query_positions
        return logits + table[self.bucket(offset, table.shape[-1])]

    def bucket(self, offset: Array, count: int) -> Array:
        """The index of each offset ``s - t`` in a table of ``count`` numbers."""
        if self.bidirectional is None:
            return jnp.clip(offset, -self.left, self.right) + self.left
        return _bucket(offset, count, self.left, self.bidirectional)

    @property
    def reach(self) -> tuple[int, int]:
        """Distances (before, after) the query beyond which all share one bucket."""
        return self.left, self.right if self.bidirectional is None else self.left


def _bucket(offset: Array, count: int, far: int, bidirectional: bool) -> Array:
    """T5's bucket of each offset ``s - t``."""
    start = jnp.zeros_like(offset)
    if bidirectional:
        count //= 2
        start = jnp.where(offset > 0, count, 0)
        distance = jnp.abs(offset)
    else:
        distance = jnp.maximum(-offset, 0)
    exact = count // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    coarse = exact + (ratio / math.log(far / exact) * (count - exact)).astype(jnp.int32)
    coarse = jnp.minimum(coarse, count - 1)
    return start + jnp.where(distance < exact, distance, coarse)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """The slopes ``[N]`` of the ALiBi paper: a geometric sequence from ``2^(-8/N)``.

    If N is no power of two, they are the slopes of the next lower power, then every
    other one of the next higher power.

    Example:
        >>> [float(s) for s in alibi_slopes(4)]
        [0.25, 0.0625, 0.015625, 0.00390625]
    """

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    arguments.size("num_heads", num_heads)
    lower = 2 ** math.floor(math.log2(num_heads))
    slopes = powers(lower) + powers(2 * lower)[0::2][: num_heads - lower]
    return np.asarray(slopes, np.float32)


def alibi(slopes: jax.typing.ArrayLike) -> Modifier:
    """Attention with linear biases: ``logits - slope[head] * |t - s|``.

    Args:
        slopes: ``[N]`` floats, or an int N for the paper's slopes.

    References:
        Press, Smith, Lewis, "Train Short, Test Long", 2022, section 3 (there causal;
        the absolute distance extends it to both sides).
    """
    if isinstance(slopes, (int, np.integer)) and not isinstance(slopes, bool):
        slopes = alibi_slopes(int(slopes))
    slopes = arguments.real("slopes", slopes)
    if slopes.ndim < 1:
        raise ValueError(f"slopes: expected [N], got shape {tuple(slopes.shape)}")
    return Alibi(slopes)


def relative_bias(
    table: ArrayLike, *, bidirectional: bool = True, max_distance: int = 128
) -> Modifier:
    """T5's relative bias: a learned number for each bucket of offsets and each head.

    Args:
        table: ``[N or 1, buckets]``, learned.
        bidirectional: whether keys after the query have buckets of their own; False
            for causal attention.
        max_distance: offsets beyond share the last bucket.

    Raises:
        ValueError: if the table has too few buckets for ``max_distance``.

    References:
        Raffel et al., "T5", 2020, section 2.1 (relative position embeddings).
    """
    table = arguments.floating("table", table)
    arguments.size("max_distance", max_distance)
    if table.ndim < 2:
        raise ValueError(
            f"table: expected [N or 1, buckets], got shape {tuple(table.shape)}"
        )
    exact = table.shape[-1] // (4 if bidirectional else 2)
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"table: {table.shape[-1]} buckets do not fit max_distance={max_distance}"
        )
    return RelativeTable(table, bidirectional, max_distance, 0)


def clipped_relative(table: ArrayLike, *, left: int, right: int) -> Modifier:
    """A learned number for each offset of a local window; offsets beyond are clipped.

    ``logits + table[head, clip(s - t, -left, right) + left]``

    Args:
        table: ``[N or 1, left + right + 1]``.
        left: farthest offset before the query with a number of its own.
        right: farthest offset after it.

    Raises:
        ValueError: if the table does not have ``left + right + 1`` entries.

    References:
        Shaw, Uszkoreit, Vaswani, "Self-Attention with Relative Position
        Representations", 2018, section 3.2 (clipping).
    """
    table = arguments.floating("table", table)
    arguments.sizes(0, left=left, right=right)
    if table.ndim < 2 or table.shape[-1] != left + right + 1:
        raise ValueError(
            f"table: expected [N or 1, {left + right + 1}] for left={left}, "
            f"right={right}, got shape {tuple(table.shape)}"
        )
    return RelativeTable(table, None, left, right)
