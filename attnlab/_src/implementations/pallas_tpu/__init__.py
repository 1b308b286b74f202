"""Pallas kernels for TPU, whose grid has one step for each live block of the plan."""

import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from attnlab._src.implementations import not_finite
from attnlab._src.implementations.elementwise import (
    modifier_is_elementwise,
    needs_bits,
    why_not_score,
)
from attnlab._src.implementations.pallas_tpu.backward import Backward
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, best, limit
from attnlab._src.implementations.pallas_tpu.forward import forward
from attnlab._src.implementations.pallas_tpu.memory import bytes_needed, segment_of
from attnlab._src.implementations.pallas_tpu.steps import (
    MOST_BLOCKS,
    MOST_BYTES,
    MOST_MEMBERS,
    by_key,
    by_query,
)
from attnlab._src.implementations.schedule import fit
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import Array, ArrayLike, AttentionInputs, Implementation

#: Greatest memory beyond O(T + S), in bytes: for bits of masks that a kernel cannot
#: evaluate, and for gradients of a bias that heads or examples share, which are stored
#: for each of them.
_MOST_BYTES = 2**30


class PallasTpu(Implementation):
    """Pallas kernels for TPU; memory O(T + S); dead blocks are not fetched."""

    name = "pallas_tpu"
    platforms = ("tpu",)
    partitionable = False
    # JAX lowers every branch of such a program for each of them.
    shares_program = False

    #: See ``pallas_call``; True runs on any platform, slowly.
    interpret: ClassVar[bool | pltpu.InterpretParams] = False
    #: Number that block sizes are multiples of.
    lanes: ClassVar[int] = 128
    #: Block sizes to use instead of the table's.
    blocks: ClassVar[Blocks | None] = None

    def unsupported(self, inputs: AttentionInputs) -> tuple[str, ...]:
        """See :class:`attnlab.extend.Implementation`."""
        reasons = []
        s = inputs.sizes
        for x in (inputs.query, inputs.value):
            if x.dtype not in (jnp.float32, jnp.bfloat16):
                reasons.append(f"it computes float32 and bfloat16, not {x.dtype}")
                break
        if 0 in s:
            reasons.append("an axis is empty")
        score = why_not_score(inputs.score)
        if score is not None:
            reasons.append(score)
        for modifier, own in zip(
            inputs.modifiers, inputs.modifier_operands, strict=True
        ):
            if not modifier_is_elementwise(modifier, own):
                name = type(modifier).__name__
                reasons.append(f"{name} is no function of one pair at a time")
            # The gradient of an operand of pairs is stored per head and example, then
            # summed.
            shared = any(
                min(x.shape[2:4]) > 1 and x.shape[0] * x.shape[1] < s.B * s.N
                for x in own
            )
            if shared and 4 * s.B * s.N * s.T * s.S > _MOST_BYTES:
                name = type(modifier).__name__
                reasons.append(
                    f"the gradient of {name}, which all share, needs too much"
                )
        parts = needs_bits(inputs.mask, inputs.mask_operands)
        if parts * s.B * s.N * s.T * s.S / 8 > _MOST_BYTES:
            reasons.append("bits of the mask, which it does not know, need too much")
        if not reasons:
            reasons += self._too_large(inputs)
        return tuple(reasons)

    def _too_large(self, inputs: AttentionInputs) -> list[str]:
        """Reasons why the number, or the memory, of blocks exceeds a limit."""
        s, reasons = inputs.sizes, []
        if s.N // s.K > MOST_MEMBERS:
            reasons.append(
                f"{s.N // s.K} query heads share a key head, and {MOST_MEMBERS} may"
            )
        for of in ("forward", "backward"):
            blocks = self.sizes(inputs, of)
            needed = bytes_needed(inputs, blocks, of, limit())
            if needed > limit():
                reasons.append(
                    f"its {of} pass needs {needed / 2**20:.0f} MiB of vector memory, "
                    f"and {limit() / 2**20:.0f} MiB may be used"
                )
            count = max(-(-s.T // blocks.q), -(-s.S // blocks.k))
            if count > MOST_BLOCKS:
                reasons.append(f"{count} blocks are more than it can number")
                continue
            words = self._bytes_of_words(inputs, of, blocks)
            if words > MOST_BYTES:
                reasons.append(
                    f"the live blocks of its {of} pass need {words / 2**10:.0f} KiB of "
                    f"scalar memory, and {MOST_BYTES / 2**10:.0f} KiB may be used"
                )
        return reasons

    def _bytes_of_words(self, inputs: AttentionInputs, of: str, blocks: Blocks) -> int:
        """Scalar memory for the list of live blocks; it depends on shapes only."""
        s = inputs.sizes

        def words(inputs: AttentionInputs) -> tuple[ArrayLike, ...]:
            plan = plan_of(inputs, blocks[:2], cols=of == "backward")
            plan = fit(plan, blocks[:2])
            if of == "forward":
                return by_query(plan).words
            segment = segment_of(inputs, blocks, limit())
            return by_key(plan, s.N // s.K, segment).words

        return sum(4 * math.prod(x.shape) for x in jax.eval_shape(words, inputs))

    def sizes(self, inputs: AttentionInputs, of: str) -> Blocks:
        """Block sizes of the "forward" or "backward" pass, reduced to fit memory."""
        s = inputs.sizes
        blocks = self.blocks or best(max(s.P, s.D), of)
        q, k = (
            min(size, -(-length // self.lanes) * self.lanes)
            for size, length in ((blocks.q, s.T), (blocks.k, s.S))
        )
        chunk = min(blocks.chunk, k)
        blocks = Blocks(q, k, chunk if k % chunk == 0 else self.lanes)
        while bytes_needed(inputs, blocks, of, limit()) > limit():
            smaller = self._smaller(blocks)
            if smaller is None:
                break
            blocks = smaller
        return blocks

    def _smaller(self, blocks: Blocks) -> Blocks | None:
        """Fewer keys at once, else half the keys or queries; None: there is none."""
        fewer = range(self.lanes, blocks.chunk, self.lanes)
        chunk = max((n for n in fewer if blocks.k % n == 0), default=None)
        if chunk is not None:
            return blocks._replace(chunk=chunk)
        larger = max(blocks.q, blocks.k)
        half = -(-larger // (2 * self.lanes)) * self.lanes
        if half == larger:
            return None
        return blocks._replace(**{"k" if blocks.k == larger else "q": half})

    def block_sizes(self, inputs: AttentionInputs) -> tuple[int, int]:
        """See :class:`attnlab.extend.Implementation`."""
        return self.sizes(inputs, "forward")[:2]

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        blocks = self.sizes(inputs, "forward")
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
        blocks = self.sizes(inputs, "backward")

        def run(inputs: AttentionInputs, *above: Array) -> list[Array | None]:
            return Backward(inputs, wanted, blocks, limit(), self.interpret).run(*above)

        return not_finite.backward(inputs, output, lse, d_output, d_lse, run)
