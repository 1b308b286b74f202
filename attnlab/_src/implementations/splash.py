"""An adapter to JAX's splash attention for TPU, for inputs with the same result."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.implementations.deferred import scaled_query, scaling_rounds
from attnlab._src.masks.base import Mask
from attnlab._src.masks.planning import dense_visible
from attnlab._src.types import Array, AttentionInputs, Implementation

#: Greatest number of pairs: the mask is an array in memory during tracing.
_MOST_PAIRS = 2**27


class Splash(Implementation):
    """``jax.experimental.pallas.ops.tpu.splash_attention``, for structural masks."""

    name = "splash"
    why_not_automatic = "it holds [T, S] in memory"
    differentiable = True
    platforms = ("tpu",)
    partitionable = False

    #: See ``pallas_call``; True runs on any platform, slowly.
    interpret: ClassVar[bool] = False
    #: Number that lengths must be multiples of.
    lanes: ClassVar[int] = 128

    def unsupported(self, inputs: AttentionInputs) -> tuple[str, ...]:
        """See :class:`attnlab.extend.Implementation`."""
        s = inputs.sizes
        config: Any = jax.config
        reasons = []
        if not inputs.score.is_inner_product:
            reasons.append("the score is not an inner product")
        if inputs.modifiers:
            reasons.append("it has no modifiers")
        if inputs.dropout_rate > 0:
            reasons.append("it has no dropout")
        if inputs.needs_lse:
            reasons.append("its log-sum-exp carries no gradient")
        if jax.tree.leaves(inputs.mask_operands):
            reasons.append("the mask carries data")
        if not inputs.index_positions:
            reasons.append("positions are given")
        if inputs.query.dtype not in (jnp.float32, jnp.bfloat16):
            reasons.append(
                f"it computes float32 and bfloat16, not {inputs.query.dtype}"
            )
        if scaling_rounds(inputs):
            reasons.append(
                "the scale of the logits is no power of two, and it would round "
                f"scaled queries to {inputs.query.dtype}"
            )
        if config.jax_enable_x64:
            reasons.append("it does not compile in x64 mode (jax_enable_x64)")
        if inputs.precision is not None:
            reasons.append("it takes no precision=")
        if s.T % self.lanes or s.S % self.lanes or 0 in s:
            reasons.append(f"lengths must be multiples of {self.lanes}")
        elif s.T * s.S > _MOST_PAIRS:
            reasons.append("the mask as an array needs too much memory")
        return tuple(reasons)

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        s = inputs.sizes
        return self._block(s.T), self._block(s.S)

    def _block(self, length: int) -> int:
        sizes = (1024, 512, 256, 128)
        return next((n for n in sizes if length % n == 0), max(length, 1))

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        s, dtype = inputs.sizes, inputs.accumulation_dtype
        lse = jnp.zeros((s.B, s.T, s.N), dtype)
        seen = _dense(inputs.mask, s.T, s.S, s.N)
        if not seen.any():  # splash attention cannot make a kernel for such a mask
            return jnp.zeros((s.B, s.T, s.N, s.D), dtype), lse
        made = self._kernel(seen, *self.block_sizes(inputs))
        query = scaled_query(inputs)
        arrays = (
            x.swapaxes(1, 2).astype(query.dtype)
            for x in (query, inputs.key, inputs.value)
        )
        output = jax.vmap(made)(*arrays).swapaxes(1, 2)
        # For a query that sees nothing, splash yields the mean of the values; we zero.
        output = jnp.where(np.any(seen, axis=-1).T[None, :, :, None], output, 0)
        return output.astype(dtype), lse

    def _kernel(self, seen: np.ndarray, block_q: int, block_k: int) -> Any:
        # Imported here: it takes a while, and most programs do not need it.
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as splash,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as splash_masks,
        )

        return splash.make_splash_mha(
            splash_masks.MultiHeadMask([splash_masks.NumpyMask(x) for x in seen]),
            block_sizes=block_sizes(block_q, block_k),
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
        )


def block_sizes(q: int, k: int, chunk: int | None = None, fused: bool = False) -> Any:
    """Block sizes of splash attention, the same for each of its kernels.

    Args:
        q: queries in a block.
        k: keys in a block.
        chunk: keys that are computed at once; None: all of a block.
        fused: whether the backward pass is one kernel.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )

    alone: dict[str, Any] = {} if fused else {"block_q_dq": q, "block_kv_dq": k}
    return splash.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=chunk,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=chunk,
        use_fused_bwd_kernel=fused,
        **alone,
    )


def _dense(mask: Mask, t: int, s: int, heads: int) -> np.ndarray:
    """A structural mask as booleans ``[N, T, S]``."""
    with jax.ensure_compile_time_eval():
        rows = jnp.arange(t, dtype=jnp.int32)[None, None, :, None]
        cols = jnp.arange(s, dtype=jnp.int32)[None, None, None, :]
        seen = np.asarray(dense_visible(mask, mask.operands(t, s), rows, cols))[0]
    return np.broadcast_to(seen, (heads, t, s))
