"""Embedding of tokens, and logits by the same vectors."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src import arguments
from attnlab._src.nn import explicit
from attnlab._src.nn.parameters import named
from attnlab._src.types import Array, ArrayLike


class Embedding(nnx.Module):
    """Maps tokens to vectors and adds positions; also makes logits by the same vectors.

    Example:
        >>> from attnlab.nn import Sinusoidal
        >>> embedding = Embedding(100, 8, position=Sinusoidal(), rngs=nnx.Rngs(0))
        >>> embedding(jnp.zeros((2, 5), int)).shape
        (2, 5, 8)

    References:
        Vaswani et al., 2017, section 3.4 (shared with the output, times
        ``sqrt(features)``).
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        *,
        position: Callable[[Array, Array], Array] | None = None,
        scale: float | None = None,
        norm: Callable[[Array], Array] | None = None,
        dropout_rate: float = 0.0,
        logits_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Draws the vectors from a normal distribution of variance ``1 / features``.

        Args:
            vocabulary_size: V, the number of tokens.
            features: size of the residual stream.
            position: ``Sinusoidal()``, ``Learned(...)``, or None if positions enter in
                the attention.
            scale: factor of the vectors; ``sqrt(features)`` if not given.
            norm: applied to the sum of vector and position.
            dropout_rate: dropout rate of the (normed) sum.
            logits_bias: whether a learned number for each token is added to the logits.
            dtype: type of the result; ``param_dtype`` if not given.
            param_dtype: type of the parameters.
            rngs: Flax's random streams.
        """
        self.table = nnx.Embed(
            vocabulary_size,
            features,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(1 / math.sqrt(features)),
            embedding_metadata=named("vocabulary", "embed"),
            rngs=rngs,
        )
        self.position, self.norm = position, norm
        self.scale = math.sqrt(features) if scale is None else scale
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None

        self.bias = nnx.data(
            nnx.Param(jnp.zeros(vocabulary_size, param_dtype), **named("vocabulary"))
            if logits_bias
            else None
        )

    def __call__(self, tokens: ArrayLike, positions: Array | None = None) -> Array:
        """``[*batch, T]`` integers -> ``[*batch, T, features]``."""
        tokens = jnp.asarray(arguments.integers("tokens", tokens))
        if positions is None:
            positions = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
        x = explicit.look_up(self.table, tokens) * self.scale
        if self.position is not None:
            x = self.position(x, positions)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.dropout is None else self.dropout(x)

    def logits(self, x: Array) -> Array:
        """Logits ``[*, features] -> [*, V]``: products with the tokens' vectors."""
        logits = explicit.logits(self.table, x)
        if self.bias is None:
            return logits
        lead = (1,) * (logits.ndim - 1)
        return logits + self.bias.astype(logits.dtype).reshape(*lead, -1)
