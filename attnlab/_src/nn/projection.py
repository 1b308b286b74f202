"""Learned projections whose axes have names."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class Projections(NamedTuple):
    """How heads are made from features, and features from heads.

    Attributes:
        query: ``[*, in_features] -> [*, N, H]``.
        key: ``[*, key_features] -> [*, K, H]``.
        value: ``[*, key_features] -> [*, K, D]``.
        out: ``[*, N, D] -> [*, out_features]``.
        query_norm: applied to queries ``[*, T, N, H]``; None: nothing is.
        key_norm: applied to keys ``[*, S, K, H]``; None: nothing is.
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
        """A matrix each, and biases.

        Args:
            in_features: of what the queries are made from.
            num_heads: N.
            num_key_heads: K, a divisor of N; N if not given.
            key_features: of what keys and values are made from; ``in_features`` if not
                given.
            head_size: H; ``in_features / num_heads`` if not given.
            value_size: D; H if not given.
            out_features: ``in_features`` if not given.
            query_norm: applied to queries.
            key_norm: applied to keys.
            use_bias: whether projections add a bias.
            out_bias: whether the output's does; ``use_bias`` if not given.
            rngs: Flax's.
            **options: of every matrix, as of ``flax.nnx.LinearGeneral``: ``dtype``,
                ``param_dtype``, ``precision``, ``kernel_init``, ``bias_init``.

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
    axes: Sequence[str],
    *,
    kernel_init: Initializer = GLOROT,
    bias_init: Initializer = ZEROS,
    **options: Any,
) -> nnx.LinearGeneral:
    """Between features and heads.

    Args:
        inputs: sizes of the last axes of what comes in.
        outputs: sizes of the axes that take their place.
        axes: names of both, see :mod:`attnlab._src.nn.parameters`.
        kernel_init: of the weights.
        bias_init: of the bias.
        **options: as of ``flax.nnx.LinearGeneral``.
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
