"""An adapter to ``jax.nn.dot_product_attention``, for inputs with the same result."""

import jax
import jax.numpy as jnp

from attnlab._src.exact import exactly
from attnlab._src.implementations.deferred import scaled_query
from attnlab._src.masks.base import Full
from attnlab._src.masks.planning import visible
from attnlab._src.modifiers.bias import Bias
from attnlab._src.types import Array, AttentionInputs, Implementation


class JaxNn(Implementation):
    """``jax.nn.dot_product_attention`` with a dense boolean mask where needed."""

    name = "jax_nn"
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
        if inputs.value.dtype in (jnp.float16, jnp.bfloat16):
            reasons.append("it rounds the weights to 16 bits")
        if inputs.precision is not None:
            reasons.append("it takes no precision=")
        return tuple(reasons)

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
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
        output = jax.nn.dot_product_attention(
            scaled_query(inputs),
            inputs.key,
            inputs.value,
            bias,
            None if exactly(inputs.mask, Full) and bias is None else seen,
            scale=1.0,
        )
        output = jnp.where(sees, output, 0)
        return output, jnp.zeros(output.shape[:3], inputs.accumulation_dtype)
