"""Residual connections with normalisation, and feed-forward layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src.nn.explicit import project
from attnlab._src.nn.parameters import GLOROT, Initializer, named
from attnlab._src.pytrees import by_name, itself
from attnlab._src.types import Array, promoted

Layer = Callable[[Array], Array]


def _sum(x: Array, added: Array) -> Array:
    x, added = promoted(x, added)
    return x + added


class Residual(nnx.Module):
    """Residual connection ``x + dropout(layer(x))``.

    Example:
        >>> Residual()(jnp.ones(3), lambda x: 2 * x)
        Array([3., 3., 3.], dtype=float32)

    References:
        He et al., "Deep Residual Learning for Image Recognition", 2015, equation 1.
    """

    def __init__(self, *, dropout_rate: float = 0.0, rngs: nnx.Rngs | None = None):
        """Makes the connection; the layer itself is an argument of the call.

        Args:
            dropout_rate: dropout rate of the layer's output.
            rngs: Flax's random streams; needed for dropout.
        """
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None

    def __call__(self, x: Array, layer: Layer) -> Array:
        """Applies the layer, which keeps the shape, to ``x [*, features]``."""
        return _sum(x, self._added(layer(x)))

    def _added(self, x: Array) -> Array:
        return x if self.dropout is None else self.dropout(x)


class _Normed(Residual):
    def __init__(
        self, norm: Layer, *, dropout_rate: float = 0.0, rngs: nnx.Rngs | None = None
    ):
        """Makes the connection; the layer itself is an argument of the call.

        Args:
            norm: ``nnx.LayerNorm`` or ``nnx.RMSNorm``, or any function of features.
            dropout_rate: dropout rate of the layer's output.
            rngs: Flax's random streams; needed for dropout.
        """
        super().__init__(dropout_rate=dropout_rate, rngs=rngs)
        self.norm = norm


class PreNorm(_Normed):
    """``x + dropout(layer(norm(x)))``.

    Example:
        >>> PreNorm(jnp.sign)(jnp.array([2.0, -3.0]), lambda x: 10 * x)
        Array([ 12., -13.], dtype=float32)

    References:
        Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020,
        table 1.
    """

    def __call__(self, x: Array, layer: Layer) -> Array:
        """See :class:`Residual`."""
        return _sum(x, self._added(layer(self.norm(x))))


class PostNorm(_Normed):
    """``norm(x + dropout(layer(x)))``.

    Example:
        >>> PostNorm(jnp.sign)(jnp.array([2.0, -3.0]), lambda x: 10 * x)
        Array([ 1., -1.], dtype=float32)

    References:
        Vaswani et al., 2017, section 3.1.
    """

    def __call__(self, x: Array, layer: Layer) -> Array:
        """See :class:`Residual`."""
        return self.norm(_sum(x, self._added(layer(x))))


class NoResidual(_Normed):
    """``dropout(layer(norm(x)))``, without residual: for ablation.

    Example:
        >>> NoResidual(jnp.sign)(jnp.array([2.0, -3.0]), lambda x: 10 * x)
        Array([ 10., -10.], dtype=float32)
    """

    def __call__(self, x: Array, layer: Layer) -> Array:
        """See :class:`Residual`."""
        return self._added(layer(self.norm(x)))


class FeedForward(nnx.Module):
    """``activation(x W_1 + b_1) W_2 + b_2``, applied to each token.

    Example:
        >>> FeedForward(8, 32, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 8))).shape
        (2, 3, 8)

    References:
        Vaswani et al., 2017, section 3.3.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = GLOROT,
        rngs: nnx.Rngs,
    ):
        """Makes the projections.

        Args:
            features: size of inputs and outputs.
            hidden_features: size of the hidden layer.
            activation: elementwise function.
            dropout_rate: dropout rate of the hidden features.
            use_bias: whether projections add a bias.
            dtype: type of the computation; that of inputs and parameters if not given.
            param_dtype: type of the parameters.
            kernel_init: initializer of the weights.
            rngs: Flax's random streams.
        """
        self.activation = activation

        def linear(inputs: int, outputs: int, *axes: str) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                kernel_metadata=named(*axes),
                bias_metadata=named(axes[-1]),
                rngs=rngs,
            )

        self.up = linear(features, hidden_features, "embed", "hidden")
        self.gate = self._gate(linear, features, hidden_features)
        self.down = linear(hidden_features, features, "hidden", "embed")
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None

    def __getstate__(self) -> dict[str, Any]:
        """The state for a pickle, in which the activation is stored by name."""
        state = super().__getstate__()
        return state | {"activation": by_name(self.activation)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See :meth:`__getstate__`."""
        super().__setstate__(state | {"activation": itself(state["activation"])})

    def _gate(self, linear: Callable, features: int, hidden: int) -> Any:
        return None

    def __call__(self, x: Array) -> Array:
        """``[*, features] -> [*, features]``."""
        hidden = self._hidden(x)
        hidden = hidden if self.dropout is None else self.dropout(hidden)
        return project(self.down, hidden)

    def _hidden(self, x: Array) -> Array:
        return self.activation(project(self.up, x))


class GatedFeedForward(FeedForward):
    """``(activation(x W_g) * x W_1) W_2``: SwiGLU with ``jax.nn.silu``, GEGLU, ...

    Example:
        >>> layer = GatedFeedForward(8, 32, activation=jax.nn.silu, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3, 8))).shape
        (2, 3, 8)

    References:
        Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    """

    def _gate(self, linear: Callable, features: int, hidden: int) -> Any:
        return linear(features, hidden, "embed", "hidden")

    def _hidden(self, x: Array) -> Array:
        return self.activation(project(self.gate, x)) * project(self.up, x)
