"""``attnlab static``: estimates the cost of attention on a TPU, without a device.

Cycles of a block come from the compiler: from the differences of problems in which
every block is live, so that the constant cost of a call cancels. The number of blocks
comes from the plan. These are estimates, for ratios, not times.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental.pallas import tpu as pltpu

from attnlab import cost
from attnlab._src.bench import splash
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.per_block import per_block, splash_per_block, splash_ways
from attnlab._src.bench.problem import problem, projected_size, sized
from attnlab._src.bench.targets import TARGETS, Kernel, on
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.pallas_tpu.blocks import Blocks
from attnlab._src.ops.explain import canonical
from attnlab._src.ops.validate import Options


@dataclasses.dataclass(frozen=True)
class Row:
    """Estimates for one pass.

    Attributes:
        target: a name in ``TARGETS``.
        of: "forward" or "backward".
        spec: the problem.
        blocks: block sizes: queries, keys, and keys that are computed at once.
        full: number of live blocks without mask, over all heads and examples.
        partial: number of live blocks with mask.
        total: number of all blocks, including dead ones.
        block_cycles: cycles of a full and of a partial block; None if there is none.
        cycles: cycles of one core for all blocks; None if the compiler reports none.
        kernel: bundles, slots, spills and memory of the larger problem.
        flops: operations that the pass executes.
        bytes: bytes that it moves to and from memory.
        bounds: least cycles of the matrix units, the function unit and memory.
        ratio_to_splash: cycles over those of JAX's splash attention with blocks of the
            same size; None if splash attention cannot compute this problem.
        why: why there are no cycles, else None.
    """

    target: str
    of: str
    spec: Spec
    blocks: Blocks
    full: int
    partial: int
    total: int
    block_cycles: tuple[float | None, float | None]
    cycles: float | None
    kernel: Kernel | None
    flops: float
    bytes: float
    bounds: dict[str, float]
    ratio_to_splash: float | None
    why: str | None

    @property
    def binds(self) -> str:
        """Name of the highest bound."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    def content(self) -> dict[str, Any]:
        """The row as a record for JSON."""
        kernel = None if self.kernel is None else dataclasses.asdict(self.kernel)
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "spec": dataclasses.asdict(self.spec),
            "blocks": self.blocks._asdict(),
            "kernel": kernel,
            "binds": self.binds,
        }


def least(
    spec: Spec, of: str, target: str, pairs: float, moved: float
) -> dict[str, float]:
    """Lower bounds of a pass in cycles of a core, for each unit by itself.

    Args:
        spec: the problem.
        of: "forward" or "backward".
        target: a name in ``TARGETS``.
        pairs: number of query-key pairs that are computed.
        moved: bytes moved to and from memory.
    """
    known = TARGETS[target]
    _, options = problem(dataclasses.replace(spec, batch=1, length=128))
    score = options["score"]
    hidden = score.transcendentals_per_pair(projected_size(spec))
    # Logits of other scores use no matrix unit: their networks have one hidden layer.
    inner = score.is_inner_product
    # The backward pass computes logits again; tanh' is a polynomial of tanh.
    products = (1, 2) if of == "forward" else (2, 5)
    with on(target):
        told = pltpu.get_tpu_info()
    clock = told.bf16_ops_per_second / (2 * known.multiplies)
    return {
        "matrix units": products[inner] * pairs * spec.head_size / known.multiplies,
        "function unit": (1 + hidden) * pairs / known.elementwise,
        "memory": moved / (told.mem_bw_bytes_per_second / clock),
    }


def row(
    spec: Spec,
    of: str,
    target: str,
    *,
    blocks: Blocks | None = None,
    cache: Path | None = None,
) -> Row:
    """Estimates for one pass of one problem.

    Args:
        spec: the problem.
        of: "forward" or "backward".
        target: a name in ``TARGETS``.
        blocks: block sizes; None: those of attnlab's table.
        cache: see ``study``.
    """
    shapes, options = problem(spec)
    with on(target):
        query, key, value = shapes
        *_, inputs = canonical(query, key, value, Options(**options))
        # Short sequences and small memories reduce the block sizes.
        with sized(blocks) if blocks else contextlib.nullcontext(PallasTpu()) as ours:
            blocks = ours.sizes(inputs, of)
        with sized(blocks) as ours:
            told = cost(*shapes, **options, implementation=ours.name, platform="tpu")
    counts = {False: told.blocks_full, True: told.blocks_partial}
    found = {
        masked: per_block(spec, blocks, of, target, masked=masked, cache=cache)
        for masked, count in counts.items()
        if count
    }
    known = {masked: each.cycles for masked, each in found.items()}
    outer = spec.batch * spec.heads * -(-spec.queries // blocks.q)
    if of == "backward":
        outer = spec.batch * spec.key_heads * -(-spec.length // blocks.k)
    # Sums of an outer block are finished once, whatever blocks it has.
    shares = {masked: outer * n / sum(counts.values()) for masked, n in counts.items()}
    totals = [x.total(counts[masked], shares[masked]) for masked, x in found.items()]
    cycles = None if None in totals else sum(filter(None, totals))
    peers = []
    if cycles and splash.expresses(spec.pattern, spec.score):
        # Splash attention masks every block of a pattern computed in the kernel.
        masked = spec.pattern != "full"
        peers = [
            splash_per_block(spec, b, of, target, masked=masked, fused=f, cache=cache)
            for b, f in splash_ways(blocks, of)
        ]
    live = sum(counts.values())
    peer = min(filter(None, (x.total(live, outer) for x in peers)), default=None)
    item = np.dtype(spec.dtype).itemsize
    queries = spec.batch * spec.heads * spec.queries * spec.head_size
    # Each block reads two arrays of the other side; sums are written once.
    other = blocks.k if of == "forward" else blocks.q
    moved = 2 * live * other * spec.head_size * item + 2 * queries * (item + 4)
    forward, backward = told.flops_forward_executed, told.flops_backward_executed
    return Row(
        target=target,
        of=of,
        spec=spec,
        blocks=blocks,
        full=counts[False],
        partial=counts[True],
        total=told.blocks_total,
        block_cycles=(known.get(False), known.get(True)),
        cycles=cycles,
        kernel=next((each.kernel for each in reversed(found.values())), None),
        flops=forward if of == "forward" else backward,
        bytes=moved,
        bounds=least(spec, of, target, live * blocks.q * blocks.k, moved),
        ratio_to_splash=cycles / peer if cycles and peer else None,
        why=next((each.why for each in found.values() if each.why), None),
    )
