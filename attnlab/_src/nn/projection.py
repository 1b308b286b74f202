"""A learned projection whose axes have names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnlab._src.nn.parameters import GLOROT, ZEROS, Initializer, named
from attnlab._src.ops.validate import is_wide_float
from attnlab._src.types import Array


def projection(
    in_features: int,
    out_features: int,
    name: str | None = "hidden",
    *,
    use_bias: bool = False,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    kernel_init: Initializer = GLOROT,
    bias_init: Initializer = ZEROS,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """``x W`` or ``x W + b``: of features of the stream to what ``name`` says.

    Args:
        in_features: of the inputs.
        out_features: of the outputs.
        name: what runs along the outputs, see :mod:`attnlab._src.nn.parameters`.
        use_bias: whether there is a bias.
        dtype: of the computation; that of inputs and parameters if not given.
        param_dtype: of the parameters.
        kernel_init: of the weights.
        bias_init: of the bias.
        rngs: Flax's.
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=kernel_init,
        bias_init=bias_init,
        kernel_metadata=named("embed", name),
        bias_metadata=named(name),
        rngs=rngs,
    )


def check_features(name: str, x: Array, linear: nnx.LinearGeneral) -> None:
    """Refuses what a projection cannot take."""
    (expected,) = linear.in_features
    if x.ndim < 2 or x.shape[-1] != expected:
        raise ValueError(
            f"{name}: expected [*batch, length, {expected}], got shape {x.shape}"
        )
    if jnp.issubdtype(x.dtype, jnp.floating) and not is_wide_float(x.dtype):
        raise TypeError(
            f"{name}: expected a floating dtype of at least 16 bits, got {x.dtype}; "
            "cast it with .astype(jnp.bfloat16)"
        )


def head_sizes(
    in_features: int, num_heads: int, num_key_heads: int | None, head_size: int | None
) -> tuple[int, int]:
    """K and H where they are not given.

    Raises:
        ValueError: if the heads do not fit each other, or the features.
    """
    key_heads = num_heads if num_key_heads is None else num_key_heads
    if key_heads < 1 or num_heads % key_heads:
        raise ValueError(
            f"num_key_heads: expected a divisor of num_heads={num_heads}, "
            f"got {key_heads}"
        )
    if head_size is None:
        if in_features % num_heads:
            raise ValueError(
                f"num_heads: {num_heads} heads do not divide in_features="
                f"{in_features}; give head_size="
            )
        head_size = in_features // num_heads
    return key_heads, head_size
