"""JAX's splash attention with every block live, for the compiler's static counts.

The static profile leaves out code that runs only under a condition read from memory. So
these kernels have no such condition: each block is computed, and masked if ``masked``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_masks,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as info,
)

from attnlab._src.bench.cases import WINDOW
from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.implementations.splash import block_sizes

#: Patterns that splash attention computes in the kernel, as ours does.
_MASKS: dict[str, Callable[[tuple[int, int]], Any]] = {
    "causal": splash_masks.CausalMask,
    "window": lambda shape: splash_masks.LocalMask(shape, (WINDOW, WINDOW), 0),
    "causal_window": lambda shape: splash_masks.LocalMask(shape, (WINDOW - 1, 0), 0),
}


def expresses(pattern: str, score: str) -> bool:
    """Whether splash attention has this pattern and score."""
    return score == "scaled_dot" and (pattern == "full" or pattern in _MASKS)


def every_block(
    pattern: str,
    lengths: tuple[int, int],
    blocks: Blocks,
    *,
    masked: bool,
    fused: bool,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Makes ``(q, k, v) -> output``, differentiable; each ``[heads, length, size]``.

    Args:
        pattern: one that :func:`expresses` accepts.
        lengths: T and S.
        blocks: block sizes.
        masked: whether each block is masked.
        fused: whether the backward pass is one kernel.
    """
    function, positions = None, None
    if masked:
        function = _MASKS[pattern](lengths).mask_function
        positions = np.arange(lengths[0], dtype=np.int32)
    everything = info.MaskInfo(
        data_next=None,
        mask_next=None,
        block_mask=None,
        partial_mask_blocks=None,
        q_sequence=positions,
    )
    made: Any = kernel.SplashAttentionKernel(
        everything,
        None if fused else everything,
        everything,
        block_sizes=block_sizes(*blocks, fused),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=function,
        interpret=False,
    )

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return made(q * (1 / jnp.sqrt(q.shape[-1])).astype(q.dtype), k, v)

    return run
