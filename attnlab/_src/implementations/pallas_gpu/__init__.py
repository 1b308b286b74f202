"""Fused kernels for NVIDIA GPUs (Hopper), which walk the live blocks of the plan."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from attnlab._src.implementations import not_finite
from attnlab._src.implementations.capability import default_capability
from attnlab._src.implementations.elementwise import (
    modifier_is_elementwise,
    needs_bits,
)
from attnlab._src.implementations.pallas_gpu.blocks import BLOCKS, LANES, Blocks
from attnlab._src.implementations.pallas_gpu.substitute import LACKING, knows
from attnlab._src.implementations.tile import may_round
from attnlab._src.types import Array, AttentionInputs, Implementation

#: Greatest size of an axis of the grid of thread blocks, but for the last one.
_MOST_BLOCKS = 65_535
#: Greatest memory for bits of masks that a kernel cannot evaluate, in bytes.
_MOST_BYTES = 2**30


class PallasGpu(Implementation):
    """Kernels in Mosaic GPU for compute capability 9.0.

    Memory is O(T + S), and a bit for each pair for masks that they do not know.
    """

    name = "pallas_gpu"
    platforms = ("cuda",)
    why_not_automatic = "it has not been timed on a GPU yet"
    # JAX lowers every branch of such a program for each of them.
    shares_program = False

    #: Parameters of JAX's interpreter of such kernels; None: they are compiled.
    interpret: ClassVar[Any] = None
    #: Block sizes to use instead of the table's, for every pass.
    blocks: ClassVar[Blocks | None] = None

    def unsupported(self, inputs: AttentionInputs) -> tuple[str, ...]:
        """See :class:`attnlab.extend.Implementation`."""
        reasons = []
        s, capability = inputs.sizes, default_capability()
        if capability not in (None, 9.0):
            reasons.append(
                "it needs compute capability 9.0, and the default device has "
                f"{capability}"
            )
        types = {x.dtype for x in (inputs.query, inputs.key, inputs.value)}
        if types not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
            found = ", ".join(sorted(map(str, types)))
            reasons.append(f"it computes bfloat16 or float16, all alike, not {found}")
        elif not may_round(inputs):
            reasons.append("it rounds weights to 16 bits, which precision= forbids")
        if 0 in s:
            reasons.append("an axis is empty")
        for axis, size in (("B", s.B), ("N", s.N)):
            if size > _MOST_BLOCKS:
                reasons.append(f"{axis} is {size:,}, and its grid has {_MOST_BLOCKS:,}")
        if not inputs.score.is_inner_product:
            reasons.append("the score is not an inner product")
        for size in dict.fromkeys((s.P, s.D)):
            if size > 128:
                reasons.append(f"heads of size {size} are larger than 128")
        for modifier, own in zip(
            inputs.modifiers, inputs.modifier_operands, strict=True
        ):
            name = type(modifier).__name__
            if not modifier_is_elementwise(modifier, own, LACKING):
                reasons.append(
                    f"{name} is no function of one pair at a time, in operations that "
                    "its kernels know"
                )
            if any(min(x.shape[2:4]) > 1 for x in own):
                reasons.append(f"{name} has a number for each pair")
        parts = needs_bits(inputs.mask, inputs.mask_operands, knows)
        if parts * s.B * s.N * s.T * s.S / 8 > _MOST_BYTES:
            reasons.append(
                "bits of the mask, which it does not know, need more than "
                f"{_MOST_BYTES / 2**30:.0f} GiB"
            )
        return tuple(reasons)

    def _sizes(self, inputs: AttentionInputs, of: str) -> Blocks:
        """Block sizes of the "forward", "query" or "key" pass."""
        head = max(inputs.sizes.P, inputs.sizes.D)
        return self.blocks or BLOCKS[of, -(-head // LANES) * LANES]

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        blocks = self._sizes(inputs, "forward")
        return blocks.rows, blocks.columns

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        # Importing it takes as long as half of attnlab.
        from attnlab._src.implementations.pallas_gpu.forward import forward

        blocks = self._sizes(inputs, "forward")
        return not_finite.forward(inputs, lambda x: forward(x, blocks, self.interpret))

    def backward(
        self,
        inputs: AttentionInputs,
        output: Array,
        lse: Array,
        d_output: Array,
        d_lse: Array | None,
        wanted: Sequence[bool],
    ) -> list[Array | None]:
        """See :class:`attnlab.extend.Implementation`."""
        from attnlab._src.implementations.pallas_gpu.backward import Backward

        want = jax.tree.unflatten(jax.tree.structure(inputs), list(wanted))

        sizes = [self._sizes(inputs, of) for of in ("query", "key")]

        def run(*given: Any) -> list[Array | None]:
            return Backward(self.interpret, want, *given).run(*sizes)

        return not_finite.backward(inputs, output, lse, d_output, d_lse, run)
