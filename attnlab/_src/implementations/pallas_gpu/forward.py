"""The forward pass: a block of queries in each thread block, online softmax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab._src.implementations.pallas_gpu.blocks import ROWS, Blocks
from attnlab._src.implementations.pallas_gpu.call import (
    BY_ROW,
    LOG2_E,
    TILE,
    Products,
    Ring,
    along,
    call,
    f32,
    fetch,
    full,
    shared,
    split,
    whole_tiles,
)
from attnlab._src.implementations.pallas_gpu.logits import Rules
from attnlab._src.implementations.pallas_gpu.operands import Place
from attnlab._src.implementations.pallas_gpu.steps import Steps
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.sizes import fit
from attnlab._src.masks.planning import plan_of
from attnlab._src.types import Array, AttentionInputs


def forward(
    inputs: AttentionInputs, blocks: Blocks, interpret: Any
) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, float32."""
    s, dtype = inputs.sizes, inputs.query.dtype
    group, many = s.N // s.K, blocks.warpgroups
    sizes = blocks.rows, blocks.columns
    plan = fit(plan_of(inputs, sizes, cols=False), sizes)
    tiles = Tiles(inputs, plan)
    steps, rules = Steps(plan.rows), Rules(tiles)
    product = Products(dtype, bool(interpret))
    sides = [whole_tiles(x) for x in (inputs.query, inputs.key, inputs.value)]
    width, depth = sides[0].shape[-1], sides[2].shape[-1]

    def kernel(arrays: Any, results: Any, scratch: Any) -> None:
        (q, k, v), walk, given = arrays
        queries, there, outputs, sums, room, ring = scratch
        outputs = outputs or [queries]
        ring = Ring(ring)
        head, row, example = map(lax.axis_index, ("head", "row", "example"))

        def copy() -> None:
            from_head = lax.div(head, jnp.int32(group))
            sources = [x.at[example, :, from_head] for x in (k, v)]
            steps.copy(walk, (example, head, row), ring, sources, jnp.int32(0))

        def compute(own: Array) -> None:
            query, output, found_lse, *mine = (
                x.at[own] for x in (queries, *outputs, sums, *room)
            )
            start = row * blocks.rows + own * ROWS
            span = pl.ds(start, ROWS)
            fetch([q.at[example, span, head]], [query], [there.at[own]])

            def step(block: Array, masked: bool, state: Any) -> Any:
                number, top, total, sums = state
                key = ring.wait(0, number)
                z = product(query, key.transpose((1, 0)))
                ring.release(0, number)
                first = block * blocks.columns
                at = Place(example, head, start, first, (ROWS, blocks.columns))
                z = rules.logits(z, at, given, masked)
                # ``new`` stays finite, so a hidden pair gives exp(-inf) = 0 exactly.
                new = jnp.maximum(top, z.max(1))
                p = jnp.exp2((z - along(new, z.shape, 0)) * rules.to_base_2)
                shrink = jnp.exp2((top - new) * rules.to_base_2)
                total = total * shrink + p.sum(1)
                keep = rules.kept(at, given)
                if keep is not None:
                    p = jnp.where(keep, p, 0.0)
                value = ring.wait(1, number)
                sums = sums * along(shrink, sums.shape, 0)
                sums = product.add(sums, p, value, mine)
                ring.release(1, number)
                return number + 1, new, total, sums

            state = (
                jnp.int32(0),
                full((ROWS,), float(jnp.finfo(f32).min), BY_ROW),
                full((ROWS,), 0, BY_ROW),
                full((ROWS, depth), 0, TILE),
            )
            found = steps.over(walk, (example, head, row), step, state)
            _, top, total, values = found
            alive = total != 0  # True for NaN, which so reaches the output
            safe = jnp.where(alive, total, 1.0)
            factor = jnp.where(alive, 1 / (safe * (1 - inputs.dropout_rate)), 0.0)
            output[...] = (values * along(factor, values.shape, 0)).astype(dtype)
            found_lse[...] = jnp.where(
                alive, top * (rules.to_base_2 / LOG2_E) + jnp.log(safe), -jnp.inf
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(output, results[0].at[example, span, head])
            plgpu.copy_smem_to_gmem(found_lse, results[1].at[example, head, span])
            plgpu.wait_smem_to_gmem(0)

        split(many, compute, copy, product.interpreted)

    memory = functools.partial(shared, many, ROWS, dtype=dtype, lanes=blocks.lanes)
    output, lse = call(
        kernel,
        {"example": s.B, "head": s.N, "row": tiles.nq},
        (sides, steps.arrays, rules.arrays),
        [
            jax.ShapeDtypeStruct((s.B, sides[0].shape[1], s.N, depth), dtype),
            jax.ShapeDtypeStruct((s.B, s.N, tiles.nq * blocks.rows), f32),
        ],
        (
            memory(width),
            plgpu.Barrier(num_barriers=many),
            # Queries have been read when outputs are written.
            [] if depth == width else [memory(depth)],
            plgpu.SMEM((many, ROWS), f32),
            product.room(blocks),
            Ring.scratch(blocks, (width, depth), dtype),
        ),
        warpgroups=many,
        name="attnlab_forward",
        interpret=interpret,
    )
    output = output[:, : s.T, :, : s.D].astype(f32)
    return output, lse[:, :, : s.T].swapaxes(1, 2)
