"""What limits block sizes: the floats of a tile, and the blocks of a mask."""

import dataclasses
import math
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.rule import Rule
from attnlab._src.types import AttentionInputs, Intervals, Live, Plan

#: Greatest number of floats that a score may store for one tile (MLP: P per pair).
TILE_FLOATS = 2**21
#: Least number of queries or keys in a block that follows the blocks of a mask.
LEAST_BLOCK = 16


def fit(plan: Plan, sizes: tuple[int, int]) -> Plan:
    """The plan with the kernel's block sizes, where a short side is one padded block.

    Args:
        plan: the plan, whose block sizes do not exceed T and S.
        sizes: queries and keys in a block of the kernel.
    """
    rows, cols = plan.rows, plan.cols
    if plan.block_k < sizes[1]:
        # The only block of keys is padded, and the padding must be masked: no block is
        # full.
        xp: ModuleType = np if plan.is_static else jnp

        def partial(live: Live) -> Live:
            pairs = zip(live.full, live.partial, strict=True)
            return Live(
                Intervals(*(x[..., :0] for x in live.full)),
                Intervals(*(xp.concatenate(x, -1) for x in pairs)),
            )

        rows, cols = partial(rows), None if cols is None else partial(cols)
    return dataclasses.replace(
        plan, rows=rows, cols=cols, block_q=sizes[0], block_k=sizes[1]
    )


def floats_per_pair(inputs: AttentionInputs) -> int:
    """How many floats the score holds at once for each pair of a tile."""
    if inputs.score.is_inner_product:
        return 1
    told = inputs.score.floats_per_pair
    if told is not None:
        return max(told, 1)
    widths = [x.shape[-1] for x in jax.tree.leaves(inputs.pair_params)]
    return max([inputs.sizes.P, *widths])


def side_of(inputs: AttentionInputs, most: int) -> int:
    """The side of a square tile whose floats keep to :data:`TILE_FLOATS`.

    Args:
        inputs: the canonical record.
        most: the greatest side, a multiple of 8; the least is 8.
    """
    side = int((TILE_FLOATS / floats_per_pair(inputs)) ** 0.5) // 8 * 8
    return min(max(side, 8), most)


def blocks_within(mask: Rule, of_queries: int, of_keys: int) -> tuple[int, int]:
    """Block sizes that divide those of a mask, unless these are small.

    Args:
        mask: any mask; one that is not made of blocks leaves the sizes as they are.
        of_queries: queries in a block, a power of two.
        of_keys: keys in a block, a power of two.
    """
    if mask.block_multiples is None:
        return of_queries, of_keys
    of_rows, of_columns = mask.block_multiples
    within = math.gcd(of_queries, of_rows), math.gcd(of_keys, of_columns)
    return within if min(within) >= LEAST_BLOCK else (of_queries, of_keys)
