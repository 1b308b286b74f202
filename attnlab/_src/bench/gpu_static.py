"""``attnlab static`` for GPUs: what the compilers and the plan tell of attention there.

It prints no times: the card is not here.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from attnlab import attention, cost
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.gpus import CARDS, GpuKernel, gpu_study
from attnlab._src.bench.problem import problem, the_pass
from attnlab._src.types import Array

#: The implementation that has kernels, and the one in XLA.
_KERNELS, _XLA = "pallas_gpu", "batched"


@dataclasses.dataclass(frozen=True)
class GpuRow:
    """What is known of one pass.

    Attributes:
        target: a name in ``CARDS``.
        of: "forward" or "backward".
        spec: the problem.
        implementation: what was compiled.
        full: number of live blocks without mask, over all heads and examples.
        partial: number of live blocks with mask.
        total: number of all blocks, including dead ones.
        kernels: the kernels of the pass.
        flops: operations that the pass executes.
        bytes: if the forward pass reads and writes every array once, as caches let it
            do for short sequences; None for the backward pass.
        temporary: bytes of memory besides arguments and results.
        why: why there are no kernels, else None.
    """

    target: str
    of: str
    spec: Spec
    implementation: str
    full: int
    partial: int
    total: int
    kernels: tuple[GpuKernel, ...]
    flops: float
    bytes: int | None
    temporary: int
    why: str | None

    @property
    def binds(self) -> str | None:
        """What takes longer at the card's greatest speed; None: bytes are not known."""
        card = CARDS[self.target]
        if self.bytes is None:
            return None
        moves = self.bytes / card.bandwidth
        return "tensor cores" if self.flops / card.products > moves else "memory"

    def content(self) -> dict[str, Any]:
        """The row as a record for JSON."""
        return {**dataclasses.asdict(self), "binds": self.binds}


def gpu_row(spec: Spec, of: str, target: str, cache: Path | None = None) -> GpuRow:
    """What is known of one pass of one problem.

    Args:
        spec: the problem.
        of: "forward" or "backward".
        target: a name in ``CARDS``.
        cache: see ``gpu_study``.

    Raises:
        NotImplementedError: if no implementation can compute the problem.
    """
    shapes, options = problem(spec)
    why, name = None, _KERNELS
    if CARDS[target].capability != (9, 0):
        major, minor = CARDS[target].capability
        why, name = f"no kernels for compute capability {major}.{minor}", _XLA
    with jax.default_matmul_precision("default"):
        try:
            told = cost(*shapes, **options, implementation=name, platform="cuda")
        except NotImplementedError as error:
            if name == _XLA:
                raise
            why, name = str(error), _XLA
            told = cost(*shapes, **options, implementation=name, platform="cuda")

        def attend(*arrays: Array) -> Array:
            return attention(*arrays, **options, implementation=name)

        found = gpu_study(the_pass(attend, of), *shapes, target=target, cache=cache)
    start = "attnlab_forward" if of == "forward" else "attnlab_backward"
    forward, backward = told.flops_forward_executed, told.flops_backward_executed
    return GpuRow(
        target=target,
        of=of,
        spec=spec,
        implementation=name,
        full=told.blocks_full,
        partial=told.blocks_partial,
        total=told.blocks_total,
        kernels=tuple(k for k in found.kernels if k.name.startswith(start)),
        flops=forward if of == "forward" else backward,
        bytes=told.bytes_least if of == "forward" else None,
        temporary=found.temporary,
        why=found.why or why,
    )
