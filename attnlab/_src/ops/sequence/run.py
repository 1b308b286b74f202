"""Attention whose sequence is sharded: from the whole record to each device's."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src.masks.base import Mask
from attnlab._src.ops.sequence import strategies
from attnlab._src.ops.sequence.costs import best_of, costs_of, divided
from attnlab._src.ops.sequence.ring import ring
from attnlab._src.ops.sequence.schedule import ring_hops, schedule_of
from attnlab._src.ops.shares import Factors, Share, factors_of
from attnlab._src.placement import AUTOMATIC
from attnlab._src.types import Array, AttentionInputs


def run_sharded(
    inputs: AttentionInputs,
    name: str | None,
    place: NamedSharding,
    strategy: str,
    bound: Mask | None,
) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, differentiable.

    Args:
        inputs: the whole record.
        name: the implementation asked for; None: the automatic choice.
        place: of queries and keys, ``[B, T, N]``.
        strategy: how keys reach the queries, or :data:`AUTOMATIC`.
        bound: what is known of the mask; None: any query may see any key.

    Raises:
        NotImplementedError: if the strategy cannot take the inputs.
    """
    shards, share = divided(inputs, place)
    costs = costs_of(inputs, place, bound)
    if strategy == AUTOMATIC:
        strategy = best_of(costs)
    elif refused := costs[strategy].refused:
        raise NotImplementedError(
            f"strategy={strategy!r} cannot take these inputs: " + "; ".join(refused)
        )
    t = inputs.sizes.T
    inputs = shards.padded(inputs)
    leaves, structure = jax.tree.flatten(inputs)
    attend: Any = {
        "exchange": lambda x: strategies.exchange(
            x, shards, schedule_of(bound, shards.lengths, shards.queries_move), name
        ),
        "ring": lambda x: ring(x, shards, ring_hops(bound, shards.lengths), name),
        "all_gather": lambda x: strategies.gather(x, shards, name),
        "all_to_all": lambda x: strategies.by_heads(x, shards, name),
    }[strategy]

    named = jax.tree.leaves(factors_of(inputs))

    def local(*leaves: Array) -> tuple[Array, Array]:
        picked = map(share.picked, leaves, named)
        return attend(jax.tree.unflatten(structure, picked))

    on_shards = jax.shard_map(
        local,
        mesh=place.mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=tuple(_specs(inputs, share, strategy)),
        out_specs=(share.spec(Factors("btn")), share.spec(Factors("btn"))),
    )
    output, lse = on_shards(*leaves)
    return output[:, :t], lse[:, :t]


def _specs(inputs: AttentionInputs, share: Share, strategy: str) -> list[PartitionSpec]:
    """The sharding of each leaf of the record."""
    named = factors_of(inputs)
    whole = share
    if strategy == "all_to_all":
        axes = share.axes
        heads = {n: (*axes[n], *axes["t"]) for n in ("n", "k")}
        whole = Share(axes | heads | {"t": (), "s": ()})

    def spec(factors: Factors) -> PartitionSpec:
        # All keys of a query lie on its device.
        if "t" in factors:
            factors = Factors(None if f == "s" else f for f in factors)
        return whole.spec(factors)

    keys = {n: share.spec(getattr(named, n)) for n in ("query", "key", "value")}
    return jax.tree.leaves(dataclasses.replace(jax.tree.map(spec, named), **keys))
