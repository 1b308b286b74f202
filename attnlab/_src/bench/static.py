"""``attnlab static``: estimates the cost of attention on a TPU, without a device.

Cycles of a block come from the compiler: from the difference of two problems in which
every block is live, so that the constant cost of a call cancels. The number of blocks
comes from the plan. These are estimates, for ratios, not times.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from attnlab import attention, cost
from attnlab._src.bench import splash
from attnlab._src.bench.cases import HIDDEN_SIZE, PAIRWISE, PATTERNS, SCORES, Spec
from attnlab._src.bench.every_block import EveryBlock
from attnlab._src.bench.expression import read_mask
from attnlab._src.bench.targets import TARGETS, Kernel, on, study
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.pallas_tpu import PallasTpu
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, best
from attnlab._src.ops.explain import canonical
from attnlab._src.ops.validate import Options
from attnlab._src.types import Array, PyTree

#: Prefix of the kernels' names for each pass.
KERNELS = {"forward": "attnlab_forward", "backward": "attnlab_backward"}
#: Scores whose logits have a cheap upper bound, so that no running maximum is needed.
BOUNDED = ("scaled_dot", "bilinear", "cosine", "additive", "concat")
#: Blocks along each side of the two problems. The compiler's effort for a profile grows
#: with the square of a kernel's output, which is greatest in the backward pass.
_SIDES = {"forward": (2, 4), "backward": (1, 2)}


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


def problem(spec: Spec) -> tuple[tuple[jax.ShapeDtypeStruct, ...], dict[str, Any]]:
    """Shapes of query, key and value; and mask and score as options of the call.

    The pattern may also be an expression, see ``read_mask``.
    """
    sizes = [(spec.queries, spec.heads), *[(spec.length, spec.key_heads)] * 2]
    shapes = tuple(
        jax.ShapeDtypeStruct((spec.batch, *size, spec.head_size), spec.dtype)
        for size in sizes
    )
    documents = np.arange(spec.length) * 8 // spec.length
    ids = np.broadcast_to(documents.astype(np.int32), (spec.batch, spec.length))
    score = SCORES[spec.score](spec, jax.random.key(spec.seed))
    known = PATTERNS.get(spec.pattern)
    mask = read_mask(spec.pattern) if known is None else known(spec, ids)
    return shapes, {"mask": mask, "score": score}


def projected_size(spec: Spec) -> int:
    """P: size of projected query and key heads."""
    return HIDDEN_SIZE if spec.score in PAIRWISE else spec.head_size


@contextlib.contextmanager
def sized(sizes: Blocks) -> Iterator[PallasTpu]:
    """Registers an implementation with these block sizes, inside the context."""

    class Sized(PallasTpu):
        name = f"pallas_tpu_{'x'.join(map(str, sizes))}"
        blocks = sizes

    IMPLEMENTATIONS[Sized.name] = made = Sized()
    try:
        yield made
    finally:
        del IMPLEMENTATIONS[Sized.name]


def the_pass(attend: Callable[..., Array], of: str) -> Callable[..., PyTree]:
    """The forward pass, or the gradients of query, key and value."""
    if of == "forward":
        return attend

    def loss(*arrays: Array) -> Array:
        return attend(*arrays).astype(np.float32).sum()

    return jax.grad(loss, (0, 1, 2))


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """Cost of one live block.

    Attributes:
        cycles: cycles of a core; None if the compiler reports none.
        kernel: kernel of the larger of the two problems.
        why: why there are no cycles, else None.
    """

    cycles: float | None
    kernel: Kernel | None
    why: str | None


def _slope(
    make: Callable[[int, int], tuple[Callable[..., Any], tuple[Any, ...]]],
    spec: Spec,
    blocks: Blocks,
    name: str,
    of: str,
    target: str,
    cache: Path | None,
) -> PerBlock:
    """Cost of a block, from the difference of two problems.

    ``make(queries, keys)`` returns function and shapes of a problem of that size; only
    kernels whose names start with ``name`` count.
    """
    queries, keys, many = blocks.q, blocks.k, 1
    if spec.pattern == "documents":  # needs as many queries as keys
        each = math.lcm(queries, keys)
        queries, keys, many = each, each, each // queries * (each // keys)
    cycles: list[int] = []
    kernel = None
    for side in _SIDES[of]:
        fn, shapes = make(queries * side, keys * side)
        found = study(fn, *shapes, target=target, cache=cache)
        kernels = [k for k in found.kernels if k.name.startswith(name)]
        if not kernels:
            return PerBlock(None, None, found.why or "the compiler reported no kernel")
        kernel = max(kernels, key=lambda k: k.bundles)
        known = [k.cycles for k in kernels if k.cycles is not None]
        if len(known) < len(kernels):
            return PerBlock(None, kernel, found.why)
        cycles.append(sum(known))
    less, more = _SIDES[of]
    added = (more**2 - less**2) * many
    return PerBlock((cycles[1] - cycles[0]) / added, kernel, None)


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
    """
    name = KERNELS[of]
    if of == "forward":
        name += "_bounded" if spec.score in BOUNDED else "_online"

    def make(queries: int, keys: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        small = dataclasses.replace(
            spec, batch=1, heads=1, key_heads=1, length=keys, query_length=queries
        )
        shapes, options = problem(small)
        options["mask"] = EveryBlock(options["mask"]) if masked else None

        def attend(*arrays: Array) -> Array:
            return attention(*arrays, **options, implementation=ours.name)

        return the_pass(attend, of), shapes

    with sized(blocks) as ours:
        return _slope(make, spec, blocks, name, of, target, cache)


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
) -> float | None:
    """Cycles of a block of JAX's splash attention; None if the compiler reports none.

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
    return _slope(make, spec, blocks, name, of, target, cache).cycles


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
        if blocks is None:
            blocks = best(max(spec.head_size, projected_size(spec)), of)
        with sized(blocks) as ours:
            # Short sequences and small memories reduce the block sizes.
            query, key, value = shapes
            *_, inputs = canonical(query, key, value, Options(**options))
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
    cycles = None
    if all(each is not None for each in known.values()):
        cycles = sum(counts[masked] * (each or 0) for masked, each in known.items())
    peers = []
    if cycles and splash.expresses(spec.pattern, spec.score):
        # Splash attention masks every block of a pattern computed in the kernel.
        masked = spec.pattern != "full"
        peers = [
            splash_per_block(spec, b, of, target, masked=masked, fused=f, cache=cache)
            for b, f in splash_ways(blocks, of)
        ]
    peer = min((x for x in peers if x), default=None)
    live = sum(counts.values())
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
        ratio_to_splash=cycles / (peer * live) if cycles and peer else None,
        why=next((each.why for each in found.values() if each.why), None),
    )
