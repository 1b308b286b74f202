"""An implementation of your own: another way to compute the same mathematics.

This one is a few lines of dense XLA. It computes inner products under a mask, gives its
reasons for refusing other inputs, and has its own backward pass.
"""

import jax
import jax.numpy as jnp

from attnlab import attention, extend, masks


class Dense(extend.Implementation):
    """softmax(q k) v, with all weights in memory."""

    name = "dense"

    def unsupported(self, inputs):
        """Every reason why it cannot take the inputs, in words."""
        reasons = []
        if not inputs.score.is_inner_product:
            reasons.append("it computes inner-product scores only")
        if inputs.modifiers:
            reasons.append("it computes no modifiers")
        if inputs.dropout_rate > 0:
            reasons.append("it has no dropout")
        if inputs.head_scale is not None:
            reasons.append(
                "it needs a scale that is a constant, the same for all heads"
            )
        return tuple(reasons)

    def forward(self, inputs):
        """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, float32."""
        dtype = inputs.accumulation_dtype
        q, k, v = (x.astype(dtype) for x in (inputs.query, inputs.key, inputs.value))
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * inputs.logit_scale
        logits = jnp.where(extend.visible(inputs), logits, -jnp.inf)
        top = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(dtype).min)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)[..., 0]
        weights = weights / jnp.where(total > 0, total, 1)
        return jnp.einsum("bnts,bsnd->btnd", weights, v), lse.swapaxes(1, 2)

    def backward(self, inputs, output, lse, d_output, d_lse, wanted):
        """Gradients of the leaves of ``inputs``; None where they are not wanted."""
        leaves, structure = jax.tree.flatten(inputs)
        moving = [x for x, on in zip(leaves, wanted, strict=True) if on]

        def results(moving):
            given = iter(moving)
            merged = [
                next(given) if on else x for x, on in zip(leaves, wanted, strict=True)
            ]
            return self.forward(jax.tree.unflatten(structure, merged))

        _, pull = jax.vjp(results, moving)
        found = iter(
            pull((d_output, jnp.zeros_like(lse) if d_lse is None else d_lse))[0]
        )
        return [next(found) if on else None for on in wanted]


def main() -> None:
    print(extend.check(Dense()))
    extend.register(Dense())  # priority=5 would let the automatic choice take it
    x = jax.random.normal(jax.random.key(0), (1, 16, 2, 8))
    found = attention(x, x, x, mask=masks.causal(), implementation="dense")
    print("differs by", abs(found - attention(x, x, x, mask=masks.causal())).max())
    extend.unregister("dense")


if __name__ == "__main__":
    main()
