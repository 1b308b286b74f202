"""What a call will cost, before it runs: the numbers follow from the plan."""

import dataclasses
import functools
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.bound import structural_bound, unknown
from attnlab._src.masks.liveness import scan_partial
from attnlab._src.masks.planning import normalise_tree, plan_of
from attnlab._src.ops.attention import run_attention
from attnlab._src.ops.choice import as_platform, choose, default_platform
from attnlab._src.ops.explain import canonical, describe
from attnlab._src.ops.prepare import position_kinds_of, positions_of
from attnlab._src.ops.validate import Arguments, Options, Settings, check_names
from attnlab._src.types import Array, ArrayLike, AttentionInputs, Plan, PyTree, Sizes


class Cost(NamedTuple):
    """The result of :func:`cost`; ``str`` of it is readable text.

    Attributes:
        inputs: a line that describes the inputs.
        implementation: the name of the implementation that would run.
        exact: False where only shapes of the mask's data are known: then pairs, blocks
            and everything that follows from them are upper bounds.
        pairs: visible query-key pairs, all heads and examples.
        pairs_executed: pairs that the implementation computes: of live blocks, or of
            the lists of single queries, hidden ones included.
        blocks_full: live blocks that need no mask, all heads and examples.
        blocks_partial: live blocks that need it.
        blocks_total: blocks, dead ones included.
        flops_forward: useful floating-point operations of the forward pass.
        flops_backward: useful operations of the backward pass.
        flops_forward_executed: operations that the forward pass executes.
        flops_backward_executed: operations that the backward pass executes.
        bytes_least: bytes if query, key and value are read once and the output is
            written once.
        bytes_moved: bytes that the forward pass moves: it reads keys and values again
            for each block of queries that sees them, or for each query with a list.
        temporary_forward: peak bytes beside inputs and outputs, as the compiler reports
            them; None if the platform is not the default backend's.
        temporary_backward: the same for forward and backward together.
    """

    inputs: str
    implementation: str
    exact: bool
    pairs: int
    pairs_executed: int
    blocks_full: int
    blocks_partial: int
    blocks_total: int
    flops_forward: int
    flops_backward: int
    flops_forward_executed: int
    flops_backward_executed: int
    bytes_least: int
    bytes_moved: int
    temporary_forward: int | None
    temporary_backward: int | None

    def __str__(self) -> str:
        bound = "" if self.exact else "at most "
        live = self.blocks_full + self.blocks_partial

        def mega(x: int | None) -> str:
            return "unknown here" if x is None else f"{x / 1e6:,.1f} MB"

        return "\n".join([
            self.inputs,
            f"{self.implementation}: {bound}{self.pairs:,} visible pairs, "
            f"{self.pairs_executed:,} executed",
            f"blocks: {bound}{live:,} live of {self.blocks_total:,} "
            f"({self.blocks_full:,} full, {self.blocks_partial:,} partial)",
            f"forward: {bound}{self.flops_forward / 1e9:,.3f} GFLOP useful, "
            f"{self.flops_forward_executed / 1e9:,.3f} executed",
            f"backward: {bound}{self.flops_backward / 1e9:,.3f} GFLOP useful, "
            f"{self.flops_backward_executed / 1e9:,.3f} executed",
            f"bytes: {mega(self.bytes_least)} at least, {mega(self.bytes_moved)} moved",
            f"peak temporaries: forward {mega(self.temporary_forward)}, "
            f"forward and backward {mega(self.temporary_backward)}",
        ])


def cost(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    *,
    platform: str | None = None,
    **options: Unpack[Options],
) -> Cost:
    """What :func:`attnlab.attention` would cost with these arguments.

    Args:
        query: array or ``jax.ShapeDtypeStruct``, ``[*batch, T, N, H]``.
        key: ``[*batch, S, K, H]``.
        value: ``[*batch, S, K, D]``.
        platform: the default backend's if not given; temporaries are known for that
            one only, because its compiler reports them.
        **options: every keyword argument of :func:`attnlab.attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import cost, masks
        >>> x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
        >>> c = cost(x, x, x, mask=masks.causal())
        >>> c.pairs == 8 * 4096 * 4097 // 2, c.exact
        (True, True)
    """
    check_names("cost", options)
    args, settings, inputs = canonical(query, key, value, options)
    here, platform = default_platform(), as_platform(platform)
    chosen = choose(inputs, settings.implementation, platform)
    sizes, exact = inputs.sizes, True
    known = args
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(_data(args))):
        exact = False
        bound = structural_bound(inputs.mask, inputs.mask_operands)
        known = args._replace(mask=bound)
        known = known._replace(
            query_offset=None, query_positions=None, key_positions=None
        )
        if not inputs.index_positions:
            known = known._replace(mask=unknown())
    asked = Options(mask=known.mask, score=args.score)
    shapes = canonical(query, key, value, asked)[2]
    blocks = chosen.block_sizes(inputs)
    plan, pairs = _count(known, shapes, blocks, exact)
    full, partial = (_total(x.per_row(), sizes) for x in plan.rows)
    nq, nk = -(-sizes.T // plan.block_q), -(-sizes.S // plan.block_k)
    keys_read = _total(chosen.blocks_executed(plan), sizes) * plan.block_k
    executed = keys_read * plan.block_q
    listed = chosen.keys_listed(inputs)
    if listed is not None:
        keys_read = executed = sizes.B * sizes.N * sizes.T * listed
    if not exact:
        pairs = min(executed, sizes.B * sizes.N * sizes.T * sizes.S)
    forward, backward = _flops_per_pair(args, inputs)
    projections = sizes.B * (
        sizes.T * sizes.N * args.score.flops_per_query(args.query.shape[-1])
        + sizes.S * sizes.K * args.score.flops_per_key(args.key.shape[-1])
    )
    item = np.dtype(inputs.query.dtype).itemsize
    queries = sizes.B * sizes.T * sizes.N * (sizes.P + sizes.D)
    keys = sizes.B * sizes.S * sizes.K * (sizes.P + sizes.D)
    moved = keys_read * (sizes.P + sizes.D)
    return Cost(
        describe(args, inputs),
        chosen.name,
        exact,
        pairs,
        executed,
        full,
        partial,
        sizes.B * sizes.N * nq * nk,
        pairs * forward + projections,
        pairs * backward + 2 * projections,
        executed * forward + projections,
        executed * backward + 2 * projections,
        (queries + keys) * item,
        (queries + moved) * item,
        _temporary(args, settings, False) if platform == here else None,
        _temporary(args, settings, True) if platform == here else None,
    )


def _data(args: Arguments) -> PyTree:
    """The data that decide which keys a query sees."""
    return args.mask, args.query_offset, args.query_positions, args.key_positions


def _count(
    args: Arguments, shapes: AttentionInputs, blocks: tuple[int, int], exact: bool
) -> tuple[Plan, int]:
    """The plan, as NumPy, and the visible pairs (where the data are known)."""

    def work(args: Arguments) -> tuple[Plan, Array]:
        batch = args.query.shape[:-3]
        query, key = positions_of(args, batch, shapes.sizes.T, shapes.sizes.S)
        heads = shapes.query_positions.shape[1]
        query = jnp.broadcast_to(query, (query.shape[0], heads, *query.shape[2:]))
        operands = shapes.mask_operands
        if jax.tree.leaves(operands):
            operands = normalise_tree(
                args.mask.operands(shapes.sizes.T, shapes.sizes.S), batch, "mask"
            )
        placed = dataclasses.replace(
            shapes,
            query_positions=query,
            key_positions=key,
            mask_operands=operands,
            position_kinds=position_kinds_of(args),
        )
        plan = plan_of(placed, blocks, cols=False)
        if not exact:
            return plan, jnp.zeros((1, 1, 1))
        return plan, scan_partial(args.mask, operands, query, key, plan)[0]

    # A function of the mask's data and positions: query, key and value may be shapes.
    def from_data(data: PyTree) -> tuple[Plan, Array]:
        names = ("mask", "query_offset", "query_positions", "key_positions")
        return work(args._replace(**dict(zip(names, data, strict=True))))

    plan, by_query = jax.jit(from_data)(_data(args))
    plan = jax.tree.map(np.asarray, plan)
    return plan, _total(np.asarray(by_query), shapes.sizes)


def _total(counts: np.ndarray, sizes: Sizes) -> int:
    """The sum of ``[Bp, Np, ...]`` over all heads and examples."""
    counts = np.asarray(counts, np.int64)
    shared = sizes.B // counts.shape[0] * (sizes.N // counts.shape[1])
    return int(counts.sum() * shared)


def _flops_per_pair(args: Arguments, inputs: AttentionInputs) -> tuple[int, int]:
    """Forward and backward operations for each pair, softmax not counted."""
    s = inputs.sizes
    score = args.score.flops_per_pair(s.P)
    modifiers = sum(m.flops_per_pair for m in args.modifiers)
    forward = score + modifiers + 2 * s.D
    # Backward: the logits once more, their gradient to both sides, and two products
    # with the value's size (for the value itself and for the weights).
    return forward, 3 * score + 2 * modifiers + 4 * s.D


def _temporary(args: Arguments, settings: Settings, backward: bool) -> int:
    """Peak temporary bytes, as the compiler of the default backend reports them."""
    call = functools.partial(run_attention, settings=settings)

    def loss(arrays: tuple[Array, ...], args: Arguments) -> Array:
        args = args._replace(query=arrays[0], key=arrays[1], value=arrays[2])
        return call(args).output.astype(jnp.float32).sum()

    arrays = (args.query, args.key, args.value)
    if backward:
        lowered = jax.jit(jax.grad(loss)).lower(arrays, args)
    else:
        lowered = jax.jit(call).lower(args)
    analysis: Any = lowered.compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)
