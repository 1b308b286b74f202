"""What each strategy sends and computes: from the plan, before anything runs."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from attnlab._src.masks.base import Full, Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.planning import index_blocks, make_plan, position_blocks
from attnlab._src.ops.sequence.needs import Lengths, operands_of
from attnlab._src.ops.sequence.schedule import ring_hops, schedule_of
from attnlab._src.ops.sequence.shards import Shards, without_slots
from attnlab._src.ops.shares import Factors, Share, factors_of, reads_head, share_of
from attnlab._src.placement import names_of, shards_of
from attnlab._src.types import AttentionInputs, accumulation_dtype

#: Queries and keys in the blocks by which work is counted.
_BLOCK = 128


class StrategyCost(NamedTuple):
    """What a strategy costs, for the device that has most of it.

    Attributes:
        refused: why it cannot be taken; empty if it can.
        bytes_forward: bytes that a device receives in the forward pass.
        bytes_backward: in the backward pass, for gradients of query, key and value.
        keys_held: keys that a device attends to at once.
        pairs: for each shard of the sequence the query-key pairs of one head and
            example in live blocks; an upper bound where the mask has data.
    """

    refused: tuple[str, ...]
    bytes_forward: int
    bytes_backward: int
    keys_held: int
    pairs: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """The most pairs of a device, relative to the mean."""
        total = sum(self.pairs)
        return max(self.pairs) * len(self.pairs) / total if total else 1.0

    def __str__(self) -> str:
        if self.refused:
            return "not possible: " + "; ".join(self.refused)
        return (
            f"{self.bytes_forward:,} bytes forward, {self.bytes_backward:,} backward; "
            f"{self.keys_held:,} keys at once; most work {self.imbalance:.2f} x mean"
        )


def costs_of(
    inputs: AttentionInputs,
    place: NamedSharding,
    bound: Mask | None,
    pairs: "Pairs | None" = None,
) -> dict[str, StrategyCost]:
    """The cost of each strategy.

    Args:
        inputs: the whole record; arrays may be shapes.
        place: of queries and keys, ``[B, T, N]``.
        bound: what is known of the mask; None: any query may see any key.
        pairs: of each shard of queries, if they do not follow from ``bound``.
    """
    shards, share = divided(inputs, place)
    mesh, lengths = place.mesh, shards.lengths
    count, size = lengths.count, lengths.keys
    sizes = _Bytes(inputs, shards, share, mesh)
    whole, ring = pairs or [pairs_of(bound, lengths)] * 2
    even = (math.ceil(sum(whole) / count),) * count
    schedule = schedule_of(bound, lengths, shards.queries_move)
    hops = ring_hops(bound, lengths)
    wide = 2 * schedule.wide.size * (count - 1) / count
    shared = 2 * schedule.everyone.size * (count - 1) / count
    sent = schedule.received - shared
    turned = sizes.turned * (count - 1) // count
    ring_back = (sizes.key * hops + sizes.gradient * (hops + (hops > 0))) * size
    return {
        "exchange": StrategyCost(
            (),
            int(sent * sizes.key + shared * sizes.summed + wide * sizes.query),
            int((sent + shared) * sizes.gradient + wide * sizes.wide_gradient),
            schedule.held,
            whole,
        ),
        "all_to_all": StrategyCost(
            _turning_refused(inputs, share, mesh, count),
            turned,
            turned,
            count * size,
            even,
        ),
        "ring": StrategyCost(
            (), hops * size * sizes.key, ring_back, size * min(2, hops + 1), ring
        ),
        "all_gather": StrategyCost(
            (),
            (count - 1) * size * sizes.key,
            (count - 1) * size * sizes.gradient,
            count * size,
            whole,
        ),
    }


def best_of(costs: dict[str, StrategyCost]) -> str:
    """The possible strategy of least bytes times imbalance, then of fewest keys."""
    possible = {name: cost for name, cost in costs.items() if not cost.refused}

    def price(name: str) -> tuple[float, int]:
        cost = possible[name]
        return cost.bytes_forward * cost.imbalance, cost.keys_held

    return min(possible, key=price)


def divided(inputs: AttentionInputs, place: NamedSharding) -> tuple[Shards, Share]:
    """How a record is divided, given the sharding of queries and keys ``[B, T, N]``."""
    batch, axes, heads = map(names_of, place.spec)
    whole = reads_head(inputs)
    share = share_of(place.mesh, (batch, (), heads), inputs.sizes, whole)
    share = dataclasses.replace(share, axes=share.axes | {"t": axes, "s": axes})
    return Shards.of(inputs, axes, shards_of(place)), share


class _Bytes:
    """Bytes that a device has for each of its keys, or of its arrays.

    Attributes:
        key: of all that is sent with a key.
        summed: the same where it is sent by a sum: flags are summed as int32.
        gradient: of the gradients of a key and its value.
        query: of all that is sent of a wide query, and of its results.
        wide_gradient: of the gradients of a wide query and of its output.
        turned: of queries, keys, values and outputs of a shard.
    """

    def __init__(
        self, inputs: AttentionInputs, shards: Shards, share: Share, mesh: Any
    ):
        """Counts them."""

        def here(x: Any, factors: Factors) -> int:
            parts = (
                math.prod(mesh.shape[axis] for axis in share.axes.get(f or "", ()))
                for f in factors
            )
            axes = zip(x.shape, parts, strict=True)
            return math.prod(-(-n // part) for n, part in axes)

        leaves = jax.tree.leaves(without_slots(inputs))
        marked = zip(leaves, shards.factors, strict=True)
        sides: dict[str, list[tuple[int, int]]] = {"s": [], "t": []}
        for x, factors in marked:
            for side, slots in (
                ("s", shards.lengths.keys),
                ("t", shards.lengths.queries),
            ):
                if side in factors and not {"s", "t"} <= {*factors}:
                    each = here(x, factors) // slots
                    sides[side].append((each, np.dtype(x.dtype).itemsize))

        def summed(side: str) -> int:
            return sum(n * (4 if width == 1 else width) for n, width in sides[side])

        self.key = sum(n * width for n, width in sides["s"])
        self.summed = summed("s")
        named = factors_of(inputs)
        query, key, value = (
            here(getattr(inputs, n), getattr(named, n))
            for n in ("query", "key", "value")
        )
        width = np.dtype(inputs.key.dtype).itemsize
        narrow = np.dtype(inputs.value.dtype).itemsize
        self.gradient = (key * width + value * narrow) // shards.lengths.keys
        output = query // inputs.sizes.P * inputs.sizes.D
        wide = np.dtype(accumulation_dtype(inputs.query.dtype)).itemsize
        heads = query // inputs.sizes.P // shards.lengths.queries
        # The output, its share, and the greatest log-sum-exp.
        results = heads * (inputs.sizes.D + 2) * wide
        self.query = summed("t") + results
        of_query = query // shards.lengths.queries
        self.wide_gradient = (
            of_query * np.dtype(inputs.query.dtype).itemsize
            + heads * inputs.sizes.D * wide
        )
        self.turned = (
            query * np.dtype(inputs.query.dtype).itemsize
            + key * width
            + value * narrow
            + output * wide
        )


def _turning_refused(
    inputs: AttentionInputs, share: Share, mesh: Any, count: int
) -> tuple[str, ...]:
    """Why heads cannot be divided among the devices instead of the sequence."""
    reasons = []
    if reads_head(inputs):
        reasons.append("the mask or a modifier reads the number of the head")
    for name, letter, axis in (("query", "N", "n"), ("key", "K", "k")):
        parts = math.prod(mesh.shape[a] for a in share.axes[axis])
        heads = getattr(inputs.sizes, letter) // parts
        if letter == "K" and share.within:
            heads = 1
        if heads % count:
            reasons.append(f"{heads} {name} heads do not divide by {count} shards")
    return tuple(reasons)


@functools.lru_cache(maxsize=256)
def pairs_of(bound: Mask | None, lengths: Lengths) -> tuple[int, ...]:
    """Query-key pairs in live blocks, for each shard of queries."""
    block = _block_of(lengths)
    query = index_blocks("query", lengths.query_length, block)
    key = index_blocks("key", lengths.key_length, block)
    return _pairs(Full() if bound is None else bound, lengths, query, key)


#: Pairs of each shard of queries, with all keys at once, and shard after shard.
Pairs = tuple[tuple[int, ...], tuple[int, ...]]


def pairs_at(
    bound: Mask, lengths: Lengths, queries: np.ndarray, keys: np.ndarray
) -> Pairs:
    """Pairs in live blocks, for slots at given positions ``[T]`` and ``[S]``.

    A row of a plan whose positions are given is one interval of blocks. Keys in an
    order of several pieces so have more live blocks at once than shard after shard.
    """
    block = _block_of(lengths)
    query = position_blocks("query", queries[None], block)
    each = [
        _pairs(bound, lengths, query, position_blocks("key", part[None], block))
        for part in (
            keys,
            *np.split(keys, range(lengths.keys, len(keys), lengths.keys)),
        )
    ]
    return each[0], tuple(map(sum, zip(*each[1:], strict=True)))


def _block_of(lengths: Lengths) -> int:
    queries = lengths.queries
    return next(n for n in range(min(_BLOCK, queries), 0, -1) if queries % n == 0)


def _pairs(mask: Mask, lengths: Lengths, query: Blocks, key: Blocks) -> tuple[int, ...]:
    operands = operands_of(mask, lengths.query_length, lengths.key_length)
    rows = make_plan(mask, operands, query, key, cols=False).rows
    full, partial = (np.asarray(x.per_row()).mean((0, 1)) for x in rows)
    each = np.zeros(lengths.count * (lengths.queries // query.size))
    each[: query.count] = full + partial
    shards = each.reshape(lengths.count, -1).sum(1) * query.size * key.size
    return tuple(int(n) for n in shards)
