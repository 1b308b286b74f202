"""An adapter to ``jax.nn.dot_product_attention``, for inputs with the same result."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attnlab._src.exact import exactly
from attnlab._src.implementations.capability import default_capability
from attnlab._src.masks.base import Full
from attnlab._src.masks.planning import visible
from attnlab._src.masks.structural import Window
from attnlab._src.modifiers.bias import Bias
from attnlab._src.types import Array, AttentionInputs, Implementation


class JaxNn(Implementation):
    """``jax.nn.dot_product_attention``, with a dense mask unless it is causal or none.

    It rounds weights of 16-bit inputs to 16 bits. On NVIDIA GPUs these inputs run on
    cuDNN where JAX offers that.
    """

    name = "jax_nn"
    why_not_automatic = "it holds [T, S] in memory"
    differentiable = True
    symbolic = "BTS"

    def unsupported(self, inputs: AttentionInputs) -> tuple[str, ...]:
        """See :class:`attnlab.extend.Implementation`."""
        sizes = inputs.sizes
        reasons = []
        if not inputs.score.is_inner_product:
            reasons.append("the score is not an inner product")
        # A subclass may do something else.
        reasons += [
            f"the modifier {type(m).__name__} is not a bias"
            for m in inputs.modifiers
            if not exactly(m, Bias)
        ]
        if inputs.dropout_rate > 0:
            reasons.append("it has no dropout")
        if inputs.needs_lse:
            reasons.append("its log-sum-exp carries no gradient")
        if sizes.P != sizes.D:
            reasons.append(
                f"the value head size {sizes.D} differs from the key's {sizes.P}"
            )
        if inputs.query.dtype == jnp.float64:
            reasons.append("its softmax is float32, for float64 inputs too")
        if inputs.value.dtype.itemsize == 2 and inputs.head_scale is not None:
            reasons.append("it would round the query, scaled by head, to 16 bits")
        config: Any = jax.config
        strict = config.jax_numpy_dtype_promotion == "strict"
        if inputs.value.dtype.itemsize == 2 and strict:
            reasons.append(
                "it promotes 16-bit types, which jax_numpy_dtype_promotion='strict' "
                "forbids"
            )
        if inputs.precision is not None:
            reasons.append("it takes no precision=")
        return tuple(reasons)

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        s, mask = inputs.sizes, inputs.mask
        lse = jnp.zeros((s.B, s.T, s.N), inputs.accumulation_dtype)
        sides = inputs.query, inputs.key, inputs.value
        if inputs.head_scale is not None:
            scale = inputs.head_scale.swapaxes(1, 2).astype(inputs.query.dtype)
            sides = inputs.query * scale, *sides[1:]

        # It scales the logits: a scaled query may be rounded to 16 bits.
        attend = functools.partial(
            jax.nn.dot_product_attention, *sides, scale=inputs.logit_scale
        )
        causal = exactly(mask, Window) and (mask.left, mask.right) == (None, 0)
        causal = causal and mask.step == 1 and s.T == s.S
        everything = exactly(mask, Full) and s.S != 0  # it may be symbolic
        if (everything or causal) and inputs.index_positions and not inputs.modifiers:
            way = "cudnn" if _has_cudnn(inputs) else None
            return attend(is_causal=causal, implementation=way), lse
        bias = None
        for (operand,) in inputs.modifier_operands:
            wide = operand.astype(inputs.accumulation_dtype)
            bias = wide if bias is None else bias + wide
        seen = visible(inputs)
        if bias is not None:
            seen = seen & ~jnp.isneginf(bias)
        sees = seen.any(-1).swapaxes(1, 2)[..., None]
        # jax.nn adds its mask to the logits: for a query that sees nothing it yields
        # the mean of the values, where attnlab yields zero.
        return jnp.where(sees, attend(bias=bias, mask=seen), 0), lse


def _has_cudnn(inputs: AttentionInputs) -> bool:
    """Whether JAX offers cuDNN for such arrays, on the default device.

    The platform of the program is not known yet: JAX differentiates ``forward``, so it
    is traced at once.
    """
    capability, size = default_capability(), inputs.sizes.P
    small = inputs.query.dtype.itemsize == 2 and size <= 128 and size % 8 == 0
    return small and capability is not None and capability >= 8
