"""Learned projections whose axes have logical names."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src.nn.parameters import GLOROT, ZEROS, Initializer, named
from attnlab._src.ops.validate import is_wide_float
from attnlab._src.types import Array


def projection(
    in_features: int,
    out_features: int,
    name: str | None = "hidden",
    *,
    use_bias: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    kernel_init: Initializer = GLOROT,
    bias_init: Initializer = ZEROS,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A layer ``x W`` or ``x W + b`` from features of the residual stream.

    Args:
        in_features: size of the inputs.
        out_features: size of the outputs.
        name: logical name of the output axis, for sharding.
        use_bias: whether there is a bias.
        dtype: type of the computation; that of inputs and parameters if not given.
        param_dtype: type of the parameters.
        kernel_init: initializer of the weights.
        bias_init: initializer of the bias.
        rngs: Flax's random streams.
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
    """Raises if the projection cannot take x, by its shape or type."""
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


class Projections(NamedTuple):
    """The projections of an attention layer: features to heads, and heads to features.

    Attributes:
        query: ``[*, in_features] -> [*, N, H]``.
        key: ``[*, key_features] -> [*, K, H]``.
        value: ``[*, key_features] -> [*, K, D]``.
        out: ``[*, N, D] -> [*, out_features]``.
        query_norm: norm applied to queries ``[*, T, N, H]``, or None.
        key_norm: norm applied to keys ``[*, S, K, H]``, or None.
    """

    query: nnx.LinearGeneral
    key: nnx.LinearGeneral
    value: nnx.LinearGeneral
    out: nnx.LinearGeneral
    query_norm: Callable[[Array], Array] | None = None
    key_norm: Callable[[Array], Array] | None = None

    @classmethod
    def linear(
        cls,
        in_features: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        key_features: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
        out_features: int | None = None,
        query_norm: Callable[[Array], Array] | None = None,
        key_norm: Callable[[Array], Array] | None = None,
        use_bias: bool = True,
        out_bias: bool | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "Projections":
        """Linear projections, a matrix each, with or without biases.

        Args:
            in_features: size of the inputs that queries are made from.
            num_heads: N, the number of query heads.
            num_key_heads: K, the number of key and value heads, a divisor of N; N if
                not given.
            key_features: size of the inputs that keys and values are made from;
                ``in_features`` if not given.
            head_size: H, the size of a query or key head; ``in_features / num_heads``
                if not given.
            value_size: D, the size of a value head; H if not given.
            out_features: size of the outputs; ``in_features`` if not given.
            query_norm: applied to queries.
            key_norm: applied to keys.
            use_bias: whether projections add a bias.
            out_bias: whether the output projection adds a bias; ``use_bias`` if not
                given.
            rngs: Flax's random streams.
            **options: further arguments of ``flax.nnx.LinearGeneral`` for each
                projection: ``dtype``, ``param_dtype``, ``precision``, ``kernel_init``,
                ``bias_init``.

        Raises:
            ValueError: if K does not divide N, or N does not divide ``in_features``.
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
        value_size = head_size if value_size is None else value_size
        key_features = in_features if key_features is None else key_features
        out_features = in_features if out_features is None else out_features

        def into(features: int, heads: int, size: int, name: str) -> nnx.LinearGeneral:
            axes = ("embed", name, "head_size")
            return heads_projection(
                (features,),
                (heads, size),
                axes,
                use_bias=use_bias,
                rngs=rngs,
                **options,
            )

        return cls(
            into(in_features, num_heads, head_size, "heads"),
            into(key_features, key_heads, head_size, "key_heads"),
            into(key_features, key_heads, value_size, "key_heads"),
            heads_projection(
                (num_heads, value_size),
                (out_features,),
                ("heads", "head_size", "embed"),
                use_bias=use_bias if out_bias is None else out_bias,
                rngs=rngs,
                **options,
            ),
            query_norm,
            key_norm,
        )


def heads_projection(
    inputs: Sequence[int],
    outputs: Sequence[int],
    axes: Sequence[str | None],
    *,
    kernel_init: Initializer = GLOROT,
    bias_init: Initializer = ZEROS,
    **options: Any,
) -> nnx.LinearGeneral:
    """A projection from features to heads, or from heads to features.

    Args:
        inputs: sizes of the last axes of inputs.
        outputs: sizes of the last axes of outputs.
        axes: logical names of input axes, then of output axes, for sharding.
        kernel_init: initializer of the weights.
        bias_init: initializer of the bias.
        **options: further arguments of ``flax.nnx.LinearGeneral``.
    """
    inward = len(inputs)
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-inward, 0)),
        kernel_init=kernel_init,
        bias_init=bias_init,
        kernel_metadata=named(*axes),
        bias_metadata=named(*axes[inward:]),
        **options,
    )
