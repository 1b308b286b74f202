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
from attnlab._src.implementations.pallas_tpu.blocks import (
    Blocks,
    Entry,
    entries,
    limit,
)
from attnlab._src.implementations.pallas_tpu.forward import forward
from attnlab._src.implementations.pallas_tpu.memory import bytes_needed, segment_of
from attnlab._src.implementations.pallas_tpu.slices import (
    by_slices,
    slices_of,
    some_queries,
)
from attnlab._src.implementations.pallas_tpu.steps import (
    MOST_BLOCKS,
    MOST_BYTES,
    MOST_MEMBERS,
    by_key,
    by_query,
)
from attnlab._src.implementations.sizes import fit
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import Array, AttentionInputs, Implementation
from attnlab._src.types import ArrayLike as ArrayLike

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
    #: Block sizes to choose from; empty: those of the table for the TPU and head size.
    table: ClassVar[Sequence[Entry]] = ()

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

        found: list[int] = []

        def count(inputs: AttentionInputs) -> None:
            if of == "forward":
                plan = plan_of(inputs, blocks[:2], cols=False)
                found.append(by_query(fit(plan, blocks[:2])).bytes)
                return
            for part in slices_of(inputs, blocks, limit()):
                own = some_queries(inputs, part)
                plan = fit(plan_of(own, blocks[:2], cols=True), blocks[:2])
                segment = segment_of(own, blocks, limit())
                found.append(by_key(plan, s.N // s.K, segment).bytes)

        jax.eval_shape(count, inputs)
        return max(found)

    def sizes(self, inputs: AttentionInputs, of: str) -> Blocks:
        """Block sizes of the "forward" or "backward" pass.

        They are the cheapest for the plan among those of the table that fit the vector
        memory, and whose steps fit the scalar memory; if none fits, the cheapest ones
        are reduced.
        """
        ranked = self._ranked(inputs, of)
        fits = lambda blocks: bytes_needed(inputs, blocks, of, limit()) <= limit()
        for blocks in filter(fits, ranked):
            if self._bytes_of_words(inputs, of, blocks) <= MOST_BYTES:
                return blocks
        blocks = next(filter(fits, ranked), next(iter(ranked)))
        while bytes_needed(inputs, blocks, of, limit()) > limit():
            smaller = self._smaller(blocks)
            if smaller is None:
                break
            blocks = smaller
        return blocks

    def _ranked(self, inputs: AttentionInputs, of: str) -> dict[Blocks, float]:
        """The sizes of the table, no longer than the inputs; cheapest first, costs."""
        s = inputs.sizes
        given = self.table or entries(max(s.P, s.D), of)
        least = min(entry.full for entry in given)
        found: dict[Blocks, float] = {}
        for (q, k, chunk), outer, *costs in given:
            short_q, short_k = (
                min(size, -(-length // self.lanes) * self.lanes)
                for size, length in ((q, s.T), (k, s.S))
            )
            part = min(chunk, short_k)
            part = self.lanes if short_k % part else part
            blocks = Blocks(short_q, short_k, part)
            # A short block costs in proportion, but no less than the smallest one.
            share = short_q * short_k / (q * k)
            full, partial = (max(cost * share, least) for cost in costs)
            owners, fulls, partials = _count(inputs, blocks, of)
            cost = owners * outer * share + fulls * full + partials * partial
            found[blocks] = min(cost, found.get(blocks, math.inf))
        return dict(sorted(found.items(), key=lambda each: each[1]))

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

    def candidates(self, inputs: AttentionInputs) -> dict[tuple[int, int], float]:
        """See :class:`attnlab.extend.Implementation`."""
        found: dict[tuple[int, int], float] = {}
        for blocks, cost in self._ranked(inputs, "forward").items():
            if bytes_needed(inputs, blocks, "forward", limit()) <= limit():
                found.setdefault(blocks[:2], cost)
        return found

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

        def some(inputs: AttentionInputs, *above: Array) -> list[Array | None]:
            return Backward(inputs, wanted, blocks, limit(), self.interpret).run(*above)

        def run(inputs: AttentionInputs, *above: Array) -> list[Array | None]:
            parts = slices_of(inputs, blocks, limit())
            if len(parts) == 1:
                return some(inputs, *above)
            return by_slices(inputs, parts, some, *above)

        return not_finite.backward(inputs, output, lse, d_output, d_lse, run)


#: Where a plan is known only at run time, each outer block is taken to see a run of the
#: inner ones, anywhere: this part of their length, as if so many documents were packed.
_RUNS = 4


def _count(
    inputs: AttentionInputs, blocks: Blocks, of: str
) -> tuple[float, float, float]:
    """Number of outer, full and partial blocks, for all lists of the plan."""
    s, (q, k, _) = inputs.sizes, blocks
    plan = None
    if inputs.position_kinds == ("index", "index") and not jax.tree.leaves(
        inputs.mask_operands
    ):
        plan = plan_of(inputs, blocks[:2], cols=False)
    rows, cols = -(-s.T // q), -(-s.S // k)
    if of == "forward":
        owners, inners, segments, run = rows, cols, 1, (s.S / _RUNS + q) / k + 1
    else:
        owners, inners, run = cols, rows, (s.T / _RUNS + k) / q + 1
        # Each segment of queries has sums for every block of keys.
        segments = -(-rows // segment_of(inputs, blocks, limit()))
    if plan is None or not plan.is_static:
        return owners * segments, 0, owners * min(run, inners)
    full, partial = (x.per_row() for x in plan.rows)
    lists = math.prod(full.shape[:2])
    return lists * owners * segments, float(full.sum()), float(partial.sum())
