"""Positions: added to embeddings, rotating queries and keys, or added to logits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src import arguments
from attnlab._src.modifiers.relative import alibi, alibi_slopes, relative_bias
from attnlab._src.nn.angles import sin_cos, sinusoids
from attnlab._src.nn.parameters import named
from attnlab._src.types import (
    Array,
    ArrayLike,
    Modifier,
    Operand,
    Tile,
    accumulation_dtype,
    pytree,
    static,
)


def _of_rank(x: Array, rank: int) -> Array:
    """Adds leading axes of size 1, up to ``rank`` axes in all."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def positions_of(x: Array, offset: int | ArrayLike, given: Array | None) -> Array:
    """Positions ``[T]`` or ``[*batch, T]``: as given, or slot numbers plus an offset.

    Args:
        x: ``[*batch, T, features]``.
        offset: an int, a scalar array, or ``[*batch]``.
        given: ``[T]`` or ``[*batch, T]``.
    """
    if given is not None:
        return jnp.asarray(arguments.integers("positions", given))
    slots = jnp.arange(x.shape[-2], dtype=jnp.int32)
    offset = jnp.asarray(arguments.integers("query_offset", offset))[..., None]
    return _of_rank(slots, offset.ndim) + offset


def zero_empty(x: Array, positions: Array | None) -> Array:
    """Sets x to zero where the position is -1.

    Args:
        x: ``[*batch, T, features]``.
        positions: ``[T]`` or ``[*batch, T]``; None: no slot is empty.
    """
    if positions is None:
        return x
    held = _of_rank(jnp.asarray(positions)[..., None] >= 0, x.ndim)
    return jnp.where(held, x, jnp.zeros((), x.dtype))


class Sinusoidal(nnx.Module):
    """Adds fixed sinusoids to embeddings.

    Example:
        >>> x = jnp.zeros((1, 3, 4))
        >>> Sinusoidal()(x, jnp.arange(3)).shape
        (1, 3, 4)

    References:
        Vaswani et al., 2017, section 3.5.
    """

    def __init__(self, *, base: float = 10_000.0, interleaved: bool = True):
        """See :func:`sinusoids` for the arguments."""
        self.base, self.interleaved = base, interleaved

    def __call__(self, x: Array, positions: ArrayLike) -> Array:
        """``[*batch, T, features], [*batch or none, T] -> [*batch, T, features]``."""
        added = sinusoids(
            positions,
            x.shape[-1],
            base=self.base,
            interleaved=self.interleaved,
            dtype=accumulation_dtype(x.dtype),
        )
        return x + _of_rank(added, x.ndim).astype(x.dtype)


class Learned(nnx.Module):
    """Adds a learned vector for each position.

    Example:
        >>> learned = Learned(8, 4, rngs=nnx.Rngs(0))
        >>> learned(jnp.zeros((1, 3, 4)), jnp.arange(3)).shape
        (1, 3, 4)

    References:
        Gehring et al., "Convolutional Sequence to Sequence Learning", 2017, 3.1.
    """

    def __init__(
        self,
        length: int,
        features: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the vectors from a normal distribution of standard deviation 0.02.

        Args:
            length: number of positions; others than 0 to ``length - 1`` raise an error
                or, if they are traced, yield NaN.
            features: size of an embedding vector.
            param_dtype: type of the parameters.
            rngs: Flax's random streams.
        """
        table = 0.02 * jax.random.normal(rngs.params(), (length, features), param_dtype)
        self.table = nnx.Param(table, **named("positions", "embed"))

    def __call__(self, x: Array, positions: ArrayLike) -> Array:
        """``[*batch, T, features], [*batch or none, T] -> [*batch, T, features]``."""
        length = self.table.shape[0]
        most = -1
        if not isinstance(positions, jax.core.Tracer):
            most = int(np.max(positions, initial=-1))
        if most >= length:
            raise ValueError(
                f"positions: expected less than {length}, the number of learned "
                f"positions, got {most}"
            )
        # An empty slot (-1) gets the vector of position 0, but no query attends to it.
        index = jnp.maximum(positions, 0)
        rows = jnp.take(self.table[...], index, axis=0, mode="fill", fill_value=jnp.nan)
        return x + _of_rank(rows, x.ndim).astype(x.dtype)


class Positions(nnx.Module):
    """Base class of positions inside attention; override one or both methods.

    As it is, positions change nothing.

    Example:
        >>> from attnlab import modifiers
        >>> class Distance(Positions):  # logits fall by one for each position between
        ...     def modifiers(self, query):
        ...         return (modifiers.alibi(np.ones(query.shape[-2])),)
        >>> len(Distance().modifiers(jnp.ones((1, 3, 2, 4))))
        1
    """

    def rotate(self, x: Array, positions: Array) -> Array:
        """Transforms queries or keys ``[*batch, T, heads, H]`` by their positions."""
        return x

    def modifiers(self, query: Array) -> tuple[Modifier, ...]:
        """Modifiers of the logits, given the queries ``[*batch, T, N, H]``."""
        return ()


def as_positions(position: object) -> Positions:
    """Checks that it is a ``Positions``; None becomes one that changes nothing."""
    if position is None:
        return Positions()
    if isinstance(position, Positions):
        return position
    refuse_added(position)
    if isinstance(position, type):
        got, hint = f"the class {position.__name__}", "call it"
    else:
        got, hint = type(position).__name__, "write Rotary(), Alibi(...), ..."
    raise TypeError(f"position: expected an instance of Positions, got {got}; {hint}")


def refuse_added(position: object) -> None:
    """Raises for positions that are added to embeddings, a class or an instance."""
    kind = position if isinstance(position, type) else type(position)
    if issubclass(kind, (Sinusoidal, Learned)):
        raise TypeError(
            f"position: {kind.__name__} is added to embeddings, attention cannot take "
            "it; it belongs in Embedding(position=...)"
        )


class Rotary(Positions):
    """Rotates pairs of features of queries and keys by angles proportional to position.

    The first ``size`` features are rotated, the rest stay. Their dot products then
    depend on position differences only.

    Example:
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> Rotary()(x, jnp.arange(3)).shape
        (1, 3, 2, 4)

    References:
        Su et al., "RoFormer", 2021, section 3.2.2; Chen et al., "Extending Context
        Window of Large Language Models via Positional Interpolation", 2023 (scaling).
    """

    def __init__(
        self,
        *,
        base: float = 10_000.0,
        size: int | None = None,
        scaling: float = 1.0,
        offset: int = 0,
        interleaved: bool = False,
    ):
        """Sets which features are rotated, and how fast.

        Args:
            base: base of the geometric series of wavelengths.
            size: number of features that are rotated, even; all if not given.
            scaling: number that positions are divided by.
            offset: number added to positions before the division.
            interleaved: whether pairs are neighbouring features (RoFormer's layout)
                instead of features i and ``i + size / 2`` (Llama's and Mistral's).
        """
        if size is not None and (size < 2 or size % 2):
            raise ValueError(f"size: expected an even number >= 2, got {size}")
        if scaling <= 0:
            raise ValueError(f"scaling: expected a positive number, got {scaling}")
        self.base, self.size = base, size
        self.scaling, self.offset, self.interleaved = scaling, offset, interleaved

    def __call__(self, x: Array, positions: ArrayLike) -> Array:
        """``[*batch, T, heads, H], [*batch or none, T] -> [*batch, T, heads, H]``."""
        size = x.shape[-1] if self.size is None else self.size
        if size % 2 or size > x.shape[-1]:
            raise ValueError(
                f"size: {size} features cannot be rotated in heads of size "
                f"{x.shape[-1]}; give an even size= that fits"
            )
        turning, rest = x[..., :size], x[..., size:]
        pairs = turning.astype(accumulation_dtype(x.dtype))
        sin, cos = sin_cos(
            positions,
            size,
            base=self.base,
            scaling=self.scaling,
            offset=self.offset,
            dtype=pairs.dtype,
        )
        sin, cos = (_of_rank(y[..., None, :], x.ndim) for y in (sin, cos))
        if self.interleaved:
            a, b = pairs[..., 0::2], pairs[..., 1::2]
        else:
            a, b = jnp.split(pairs, 2, -1)
        turned = (a * cos - b * sin, b * cos + a * sin)
        if self.interleaved:
            made = jnp.stack(turned, -1).reshape(pairs.shape)
        else:
            made = jnp.concatenate(turned, -1)
        return jnp.concatenate([made.astype(x.dtype), rest], -1)

    def rotate(self, x: Array, positions: Array) -> Array:
        """See :class:`Positions`."""
        return self(x, positions)


class Alibi(Positions):
    """Subtracts from each logit the head's slope times the distance; not learned.

    Example:
        >>> Alibi(4).slopes
        (0.25, 0.0625, 0.015625, 0.00390625)

    References:
        Press, Smith, Lewis, 2022, section 3.
    """

    def __init__(self, num_heads: int):
        self.slopes = tuple(float(s) for s in alibi_slopes(num_heads))

    def modifiers(self, query: Array) -> tuple[Modifier, ...]:
        """See :class:`Positions`."""
        return (alibi(np.asarray(self.slopes, np.float32)),)


class RelativeBias(Positions):
    """T5's relative bias: a learned number for each head and bucket of offsets.

    Example:
        >>> bias = RelativeBias(4, rngs=nnx.Rngs(0))
        >>> bias.table.shape
        (4, 32)

    References:
        Raffel et al., 2020, section 2.1.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the biases from a normal distribution of standard deviation 0.02.

        Args:
            num_heads: N, the number of query heads.
            buckets: number of buckets.
            max_distance: offsets of at least this size share the last bucket.
            bidirectional: whether half of the buckets are for keys after the query.
            param_dtype: type of the parameters.
            rngs: Flax's random streams.
        """
        shape = (num_heads, buckets)
        table = 0.02 * jax.random.normal(rngs.params(), shape, param_dtype)
        self.table = nnx.Param(table, **named("heads", None))
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def modifiers(self, query: Array) -> tuple[Modifier, ...]:
        """See :class:`Positions`."""
        return (
            relative_bias(
                self.table[...],
                bidirectional=self.bidirectional,
                max_distance=self.max_distance,
            ),
        )


class ClippedRelative(Positions):
    """Shaw's relative keys: adds ``q . a[clip(s - t)] / sqrt(H)`` to the logits.

    ``a`` is a learned vector for each offset from ``-left`` to ``right``. Memory is
    ``left + right + 1`` numbers for each query and head, never ``[T, S]``.

    Example:
        >>> local = ClippedRelative(8, left=4, right=4, rngs=nnx.Rngs(0))
        >>> local.table.shape
        (9, 8)

    References:
        Shaw, Uszkoreit, Vaswani, 2018, equations 4 and 5 (keys only: section 4.3 finds
        that relative values add nothing).
    """

    def __init__(
        self,
        head_size: int,
        *,
        left: int,
        right: int,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the vectors, shared by all heads, from N(0, 0.02^2).

        Args:
            head_size: H, the size of a query or key head.
            left: number of offsets before the query that have their own vector.
            right: number of offsets after the query that have their own vector.
            param_dtype: type of the parameters.
            rngs: Flax's random streams.
        """
        if min(left, right) < 0:
            raise ValueError(f"left, right: expected at least 0, got {left}, {right}")
        shape = (left + right + 1, head_size)
        table = 0.02 * jax.random.normal(rngs.params(), shape, param_dtype)
        self.table = nnx.Param(table, **named(None, "head_size"))
        self.left, self.right = left, right

    def modifiers(self, query: Array) -> tuple[Modifier, ...]:
        """See :class:`Positions`."""
        scale = 1 / math.sqrt(query.shape[-1])
        # These are added to logits, so they are not computed in 16 bits.
        wide = accumulation_dtype(query.dtype)
        pair = query.astype(wide), self.table[...].astype(wide)
        sums = jnp.einsum("...tnh,rh->...ntr", *pair) * scale
        return (_OffsetSums(sums, self.left, self.right),)


@pytree
class _OffsetSums(Modifier):
    """``logits + sums[t, clip(s - t)]``; sums hold a number per query and offset."""

    flops_per_pair = 4

    sums: Array
    left: int = static()
    right: int = static()

    def operands(self) -> tuple[Operand, ...]:
        """See :class:`attnlab.Modifier`."""
        return (Operand(self.sums[..., None, :], payload=1),)

    def apply(self, logits: Array, tile: Tile, *operands: Array) -> Array:
        """See :class:`attnlab.Modifier`."""
        offset = tile.key_positions - tile.query_positions
        index = jnp.clip(offset, -self.left, self.right) + self.left
        sums = operands[0][:, 0].astype(logits.dtype)
        return logits + jnp.take_along_axis(sums, index, axis=1)
