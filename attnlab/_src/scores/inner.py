"""Scores that are inner products of their projections: every kernel runs them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from attnlab._src import arguments
from attnlab._src.exact import exactly
from attnlab._src.types import Array, Score, accumulation_dtype, pytree


@pytree
class Dot(Score):
    """``score(q, k) = q . k``, unscaled.

    References:
        Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine
        Translation", 2015, section 3.1 ("dot").
    """

    @classmethod
    def init(cls, rng: Array) -> "Dot":
        """It has no parameters; ``rng`` is not read."""
        return cls()


@pytree
class ScaledDot(Score):
    """``score(q, k) = scale * q . k``; ``scale`` defaults to ``1 / sqrt(H)``.

    Args:
        scale: a number or ``[N]``; may be traced and differentiated.

    References:
        Vaswani et al., "Attention Is All You Need", 2017, equation 1.
    """

    scale: Any = None

    @classmethod
    def init(cls, rng: Array) -> "ScaledDot":
        """It has no parameters; ``rng`` is not read."""
        return cls()

    def project_query(self, query: Array) -> Array:
        """See :class:`attnlab.Score`."""
        if self.scale is None:
            return _widened(query) * _default_scale(query.shape[-1])
        return _times(query, "scale", self.scale)

    def without_scale(self, head_size: int) -> tuple[Score, float | Array]:
        """See :class:`attnlab.Score`."""
        # A subclass may do more than this class.
        if not exactly(self, ScaledDot):
            return self, 1.0
        if self.scale is None:
            return Dot(), _default_scale(head_size)
        return Dot(), _factor("scale", self.scale)

    def flops_per_query(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return head_size


@pytree
class Bilinear(Score):
    """``score(q, k) = q W k`` (Luong's "general").

    Attributes:
        weight: ``[N or 1, H of query, H of key]``.

    References:
        Luong, Pham, Manning, 2015, section 3.1 ("general").
    """

    weight: Any

    @classmethod
    def init(
        cls,
        rng: Array,
        query_size: int,
        key_size: int | None = None,
        *,
        num_heads: int = 1,
        dtype: DTypeLike = jnp.float32,
    ) -> "Bilinear":
        """Normal weights of variance ``1 / (H of query * H of key)``.

        Logits of unit-variance inputs then have variance 1, as scaled dot's have.

        Args:
            rng: a PRNG key.
            query_size: H of the query.
            key_size: H of the key; the query's if not given.
            num_heads: N, or 1 to share one matrix.
            dtype: of the parameters.
        """
        arguments.prng_key("rng", rng)
        key_size = query_size if key_size is None else key_size
        arguments.sizes(query_size=query_size, key_size=key_size, num_heads=num_heads)
        shape = (num_heads, query_size, key_size)
        scale = 1 / math.sqrt(query_size * key_size)
        return cls(jax.random.normal(rng, shape, dtype) * scale)

    def project_query(self, query: Array) -> Array:
        """``[B, T, N, H of query] -> [B, T, N, H of key]``."""
        return project(query, "weight", self.weight)

    def flops_per_query(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 2 * head_size * self.weight.shape[-1]


@pytree
class _Directions(Score):
    """Inner products of unit vectors, float32 where the vectors have 16 bits."""

    def project_query(self, query: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return _unit(query)

    def project_key(self, key: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return _unit(key)


@pytree
class Cosine(_Directions):
    """``score(q, k) = temperature * (q . k) / (|q| |k|)``: bounded by the temperature.

    Attributes:
        temperature: a number or ``[N]``; may be traced and differentiated.

    Numerics:
        Unit vectors of 16-bit queries and keys are float32, so that they are not
        rounded; a zero vector has cosine 0 with every vector.

    References:
        Graves, Wayne, Danihelka, "Neural Turing Machines", 2014, equation 6;
        Henry et al., "Query-Key Normalization for Transformers", 2020, section 3.
    """

    temperature: Any = 10.0

    @classmethod
    def init(
        cls, rng: Array, *, num_heads: int = 1, temperature: float = 10.0
    ) -> "Cosine":
        """A learnable temperature for each head; ``rng`` is not read."""
        arguments.sizes(num_heads=num_heads)
        return cls(jnp.full((num_heads,), temperature))

    def project_query(self, query: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return _times(_unit(query), "temperature", self.temperature)

    def without_scale(self, head_size: int) -> tuple[Score, float | Array]:
        """See :class:`attnlab.Score`."""
        # A subclass may do more than this class.
        if not exactly(self, Cosine):
            return self, 1.0
        return _Directions(), _factor("temperature", self.temperature)

    def flops_per_query(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 4 * head_size

    def flops_per_key(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return 3 * head_size


def _default_scale(head_size: int) -> float:
    # For H = 0 every inner product is 0, whatever its scale.
    return 1 / math.sqrt(max(head_size, 1))


def _widened(x: Array) -> Array:
    return x.astype(accumulation_dtype(x.dtype))


def _factor(name: str, x: object) -> Array:
    """The factor as an array, a scalar or ``[N]``; ``name`` is for errors."""
    factor = jnp.asarray(arguments.real(name, x))
    if factor.ndim > 1:
        raise ValueError(f"{name}: expected a number or [N], got shape {factor.shape}")
    return factor


def _times(x: Array, name: str, factor: object) -> Array:
    """``[*, N, H]`` times a number or ``[N]``, in the accumulation type.

    ``name``: that of the factor, for errors.
    """
    x, factor = _widened(x), _factor(name, factor)
    heads = x.shape[-2]
    if factor.shape not in ((), (1,), (heads,)):
        raise ValueError(
            f"{name}: expected a number or [{heads}], got shape {factor.shape}"
        )
    return x * factor.astype(x.dtype).reshape((1,) * (x.ndim - 2) + (-1, 1))


def _unit(x: Array) -> Array:
    x = _widened(x)
    square = (x * x).sum(-1, keepdims=True)
    # The inner where keeps the gradient of a zero vector finite.
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def check_weight(name: str, x: Any, *shape: int | str | tuple[int, ...]) -> None:
    """Checks for a floating array of a shape, in which a string stands for any size.

    Raises:
        TypeError, ValueError: if it is none, naming the array.
    """
    arguments.floating(name, x)
    fits = len(x.shape) == len(shape) and all(
        isinstance(want, str) or have in (want if isinstance(want, tuple) else (want,))
        for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(
            " or ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in shape
        )
        raise ValueError(f"{name}: expected [{wanted}], got shape {tuple(x.shape)}")


def project(x: Array, name: str, weight: Array, bias: Array | None = None) -> Array:
    """``[B, L, heads, H] , [heads or 1, H, P] -> [B, L, heads, P]``.

    ``name``: that of the weight, for errors.
    """
    heads = tuple(dict.fromkeys((x.shape[2], 1)))
    check_weight(name, weight, heads, x.shape[-1], "P")
    if bias is not None:
        check_weight("bias", bias, heads, weight.shape[-1])
    if weight.shape[0] == 1:
        result = jnp.einsum("blnh,hp->blnp", x, weight[0].astype(x.dtype))
    else:
        result = jnp.einsum("blnh,nhp->blnp", x, weight.astype(x.dtype))
    if bias is None:
        return result
    return result + bias.astype(x.dtype)[None, None]
