"""What a block costs on a TPU, by the compiler's static cycles: ours, and splash's."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnlab._src.bench import splash
from attnlab._src.bench.cases import Spec
from attnlab._src.bench.every_block import EveryBlock
from attnlab._src.bench.problem import problem, the_pass
from attnlab._src.bench.targets import Kernel, study
from attnlab._src.implementations.pallas_tpu.backward import Backward
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, limit
from attnlab._src.implementations.pallas_tpu.forward import run_kernel
from attnlab._src.implementations.pallas_tpu.memory import bytes_needed
from attnlab._src.masks.planning import alone
from attnlab._src.ops.prepare import prepare
from attnlab._src.ops.validate import check
from attnlab._src.types import Array, PyTree, skeleton

#: Prefix of the kernels' names for each pass.
KERNELS = {"forward": "attnlab_forward", "backward": "attnlab_backward"}
#: Scores whose logits have a cheap upper bound, so that no running maximum is needed.
BOUNDED = ("scaled_dot", "bilinear", "cosine", "additive", "concat")


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """Cost of one live block.

    The sums of a kernel belong to its outer blocks: of queries in the forward pass, of
    keys in the backward pass.

    Attributes:
        cycles: cycles of a core; None if the compiler reports none.
        outer: cycles of an outer block besides those of its live blocks: its sums are
            cleared, finished and written; None as above.
        kernel: kernel of the largest of the problems.
        why: why there are no cycles, else None.
    """

    cycles: float | None
    outer: float | None
    kernel: Kernel | None
    why: str | None

    @property
    def known(self) -> tuple[float, float] | None:
        """Cycles of a live block and of an outer block; None if one is unknown."""
        if self.cycles is None or self.outer is None:
            return None
        return self.cycles, self.outer

    def total(self, blocks: float, outer: float) -> float | None:
        """Cycles of so many live and outer blocks; None if they are unknown."""
        if self.known is None:
            return None
        return blocks * self.known[0] + outer * self.known[1]


def _slope(
    make: Callable[[int, int], tuple[Callable[..., Any], tuple[Any, ...]]],
    blocks: Blocks,
    name: str,
    of: str,
    target: str,
    cache: Path | None,
) -> PerBlock:
    """Cost of a block; see :func:`slopes`.

    ``make(queries, keys)`` returns function and shapes of a problem of that size; only
    kernels whose names start with ``name`` count.
    """
    kernels: list[Kernel] = []
    why = None

    def cycles(queries: int, keys: int) -> int | None:
        nonlocal why
        fn, shapes = make(queries, keys)
        found = study(fn, *shapes, target=target, cache=cache)
        own = [k for k in found.kernels if k.name.startswith(name)]
        kernels.extend(own)
        known = [k.cycles for k in own if k.cycles is not None]
        if own and len(known) == len(own):
            return sum(known)
        why = found.why or "the compiler reported no kernel"
        return None

    block, outer = slopes(blocks, of, cycles)
    kernel = max(kernels, key=lambda k: k.bundles, default=None)
    return PerBlock(block, outer, kernel, why)


def slopes(
    blocks: Blocks,
    of: str,
    measure: Callable[[int, int], float | None],
    length: int = 1024,
) -> tuple[float | None, float | None]:
    """Costs of a live block and of an outer block, from differences of three problems.

    Args:
        blocks: block sizes.
        of: "forward" or "backward".
        measure: returns the cost of a problem with so many queries and keys, in which
            every block is live; None if it is unknown.
        length: length of the smallest problem, if blocks are not longer. The compiler's
            effort for a profile grows with the square of a kernel's output.

    Returns:
        Both costs; None if some problem's is unknown.
    """
    sizes = blocks[:2] if of == "forward" else blocks[1::-1]
    outer, inner = (max(length // n, m) for n, m in zip(sizes, (1, 2), strict=True))
    costs: list[float] = []
    for counts in ((outer, inner), (2 * outer, inner), (outer, 2 * inner)):
        lengths = [n * size for n, size in zip(counts, sizes, strict=True)]
        cost = measure(*(lengths if of == "forward" else reversed(lengths)))
        if cost is None:
            return None, None
        costs.append(cost)
    least, more_outer, more_inner = costs
    block = (more_inner - least) / (outer * inner)
    # Not negative: the compiler may find a better schedule for the larger problem.
    return block, max((more_outer - least) / outer - inner * block, 0.0)


def per_block(
    spec: Spec,
    blocks: Blocks,
    of: str,
    target: str,
    *,
    masked: bool,
    cache: Path | None = None,
) -> PerBlock:
    """Cost of a live block of attnlab's kernel.

    Args:
        spec: the problem; its lengths and heads do not matter.
        blocks: block sizes.
        of: "forward" or "backward".
        target: a name in ``TARGETS``.
        masked: whether the block is partial.
        cache: see ``study``.

    Raises:
        NotImplementedError: if such blocks exceed the memory.
    """
    name = KERNELS[of]
    if of == "forward":
        name += "_bounded" if spec.score in BOUNDED else "_online"

    def make(queries: int, keys: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        small = dataclasses.replace(
            spec, batch=1, heads=1, key_heads=1, length=keys, query_length=queries
        )
        shapes, options = problem(small)
        mask = EveryBlock(options.pop("mask"))

        def run(*arrays: Array) -> PyTree:
            """The kernel by itself: no other variant, nothing around it."""
            args, settings = check(*arrays[:3], **options)
            inputs = prepare(args, settings)
            if masked:
                operands, _ = alone(mask, queries, keys)
                inputs = dataclasses.replace(
                    inputs, mask=skeleton(mask), mask_operands=operands
                )
            if bytes_needed(inputs, blocks, of, limit()) > limit():
                raise NotImplementedError(f"{blocks} need too much vector memory")
            if of == "forward":
                return run_kernel(inputs, blocks, False, spec.score in BOUNDED)
            wanted = inputs.gradients(query=True, key=True, value=True)
            wanted = [on is True for on in wanted]
            output, lse, d_output = arrays[3:]
            made = Backward(inputs, wanted, blocks, limit(), False)
            return made.run(output, lse, d_output, None)

        if of == "forward":
            return run, shapes
        query, _, value = shapes
        output = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), np.float32)
        lse = jax.ShapeDtypeStruct(query.shape[:-1], np.float32)
        return run, (*shapes, output, lse, output)

    return _slope(make, blocks, name, of, target, cache)


def splash_ways(blocks: Blocks, of: str) -> Iterator[tuple[Blocks, bool]]:
    """Variants of JAX's splash attention: block sizes, and if its backward is fused.

    Either as many keys at once as in our block or all; backward in one kernel or two.
    """
    for chunk in dict.fromkeys((blocks.chunk, blocks.k)):
        for fused in (True, False) if of == "backward" else (False,):
            yield blocks._replace(chunk=chunk), fused


def splash_per_block(
    spec: Spec,
    blocks: Blocks,
    of: str,
    target: str,
    *,
    masked: bool,
    fused: bool,
    cache: Path | None = None,
) -> PerBlock:
    """Cost of a block of JAX's splash attention.

    Args:
        spec: the problem; its lengths and heads do not matter.
        blocks: block sizes.
        of: "forward" or "backward".
        target: a name in ``TARGETS``.
        masked: whether the block is partial.
        fused: whether the backward pass is one kernel.
        cache: see ``study``.
    """

    def make(queries: int, keys: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        query, key = (
            jax.ShapeDtypeStruct((1, length, spec.head_size), spec.dtype)
            for length in (queries, keys)
        )
        attend = splash.every_block(
            spec.pattern, (queries, keys), blocks, masked=masked, fused=fused
        )
        return the_pass(attend, of), (query, key, key)

    name = "splash_mha_fwd" if of == "forward" else "splash_mha_d"
    return _slope(make, blocks, name, of, target, cache)
