"""Output layers of recurrent decoders: state, context and token vector to logits."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src.nn.projection import projection
from attnlab._src.types import Array, promoted


class Readout(nnx.Module):
    """``[state; context; last token's vector] W + b``.

    Example:
        >>> readout = Readout(14, 100, rngs=nnx.Rngs(0))
        >>> readout(jnp.ones((2, 5)), jnp.ones((2, 6)), jnp.ones((2, 3))).shape
        (2, 100)
    """

    def __init__(
        self,
        features: int,
        vocabulary_size: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the matrix and the bias.

        Args:
            features: size of state, context and token vector together.
            vocabulary_size: V, the number of tokens.
            dtype: type of the computation; that of inputs and parameters if not given.
            param_dtype: type of the parameters.
            rngs: Flax's random streams.
        """
        self.out = projection(
            features,
            vocabulary_size,
            "vocabulary",
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, state: Array, context: Array, embedded: Array) -> Array:
        """Logits ``[*, V]`` of inputs ``[*, size]``, each with its own size."""
        return self.out(jnp.concatenate(promoted(state, context, embedded), -1))


class MaxoutReadout(nnx.Module):
    """A hidden layer of maxout units before the logits.

    Each unit is the greater of two sums: t = max(u, v), [u, v] = U_o s + V_o y + C_o c,
    with the last token's vector y and the context c. The state s is the new one, as in
    equation 4 of the paper.

    Example:
        >>> readout = MaxoutReadout(14, 4, 100, rngs=nnx.Rngs(0))
        >>> readout(jnp.ones((2, 5)), jnp.ones((2, 6)), jnp.ones((2, 3))).shape
        (2, 100)

    References:
        Bahdanau, Cho, Bengio, 2015, appendix A.2.2; Goodfellow et al., "Maxout
        Networks", 2013.
    """

    def __init__(
        self,
        features: int,
        hidden_size: int,
        vocabulary_size: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the matrices and biases of both layers.

        Args:
            features: size of state, context and token vector together.
            hidden_size: number of maxout units.
            vocabulary_size: V, the number of tokens.
            dtype: type of the computation; that of inputs and parameters if not given.
            param_dtype: type of the parameters.
            rngs: Flax's random streams.
        """
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.hidden = projection(
            features, 2 * hidden_size, use_bias=True, rngs=rngs, **types
        )
        self.out = projection(
            hidden_size,
            vocabulary_size,
            "vocabulary",
            use_bias=True,
            rngs=rngs,
            **types,
        )

    def __call__(self, state: Array, context: Array, embedded: Array) -> Array:
        """Logits ``[*, V]`` of inputs ``[*, size]``, each with its own size."""
        pairs = self.hidden(jnp.concatenate(promoted(state, context, embedded), -1))
        # Units are paired across halves, so that each operand of maximum is contiguous.
        return self.out(jnp.maximum(*jnp.split(pairs, 2, -1)))
