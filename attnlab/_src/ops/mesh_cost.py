"""What a call costs on a mesh: each device's part, and what devices send."""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from attnlab._src import arguments
from attnlab._src.masks.bound import known_bound
from attnlab._src.ops.attention import bound_of
from attnlab._src.ops.sequence.costs import (
    Pairs,
    StrategyCost,
    best_of,
    costs_of,
    divided,
    pairs_at,
)
from attnlab._src.ops.sequence.needs import Lengths
from attnlab._src.ops.shares import factors_of
from attnlab._src.ops.validate import Arguments
from attnlab._src.placement import names_of, shards_of
from attnlab._src.types import AttentionInputs


class MeshCost(NamedTuple):
    """What a call costs on a mesh; ``str`` of it is readable text.

    Attributes:
        devices: of the mesh.
        parts: into how many parts B, T, N and K are divided.
        undivided: why an axis that the mesh should divide is not.
        bytes_summed: bytes that a device receives because gradients of query, key and
            value are summed over devices that have the same part of one.
        strategy: the strategy that the automatic choice takes for a sharded sequence;
            None if it is not sharded.
        strategies: the cost of each strategy, by its name.
    """

    devices: int
    parts: dict[str, int]
    undivided: tuple[str, ...]
    bytes_summed: int
    strategy: str | None
    strategies: dict[str, StrategyCost]

    def __str__(self) -> str:
        parts = ", ".join(f"{letter} by {n}" for letter, n in self.parts.items())
        lines = [f"{self.devices} devices divide {parts}", *self.undivided]
        if self.bytes_summed:
            lines.append(f"gradients are summed: {self.bytes_summed:,} bytes backward")
        if self.strategy is None:
            lines.append("nothing else is sent")
        else:
            lines.append(f"keys reach queries by {self.strategy}")
        lines += [f"  {name}: {cost}" for name, cost in self.strategies.items()]
        return "\n".join(lines)


def mesh_cost(
    args: Arguments, inputs: AttentionInputs, place: NamedSharding
) -> MeshCost:
    """The cost of a call whose queries are sharded as ``place`` says, ``[B, T, N]``."""
    _, share = divided(inputs, place)
    # Shorter sequences are computed as if they were not sharded.
    is_cut = min(inputs.sizes.T, inputs.sizes.S) >= shards_of(place) > 1
    if not is_cut:
        share = dataclasses.replace(share, axes=share.axes | {"t": (), "s": ()})
    shape = place.mesh.shape

    def count(axes: tuple[str, ...]) -> int:
        return math.prod(shape[axis] for axis in axes)

    parts = {letter: count(share.axes[letter.lower()]) for letter in "BTNK"}
    asked = dict(zip("BTN", map(names_of, place.spec), strict=True))
    undivided = tuple(
        f"{letter}={getattr(inputs.sizes, letter)} is not divided by "
        f"{', '.join(axes)}: each device computes all of it"
        for letter, axes in asked.items()
        if axes and parts[letter] < count(axes)
    )
    every = {axis for letter in "btn" for axis in share.axes[letter]}
    named, summed = factors_of(inputs), 0.0
    for name in ("query", "key", "value"):
        factors, x = getattr(named, name), getattr(inputs, name)
        own = {axis for f in factors for axis in share.axes.get(f or "", ())}
        others = count(tuple(every - own))
        here = x.size // count(tuple(own)) * np.dtype(x.dtype).itemsize
        summed += 2 * here * (others - 1) / others
    strategy, strategies = None, {}
    if is_cut:
        bound = bound_of(args, data_are_known=True)
        strategies = costs_of(inputs, place, bound, _pairs_given(args, place))
        strategy = best_of(strategies)
    return MeshCost(
        count(tuple(shape)), parts, undivided, round(summed), strategy, strategies
    )


def _pairs_given(args: Arguments, place: NamedSharding) -> Pairs | None:
    """Pairs of each shard where positions are given and known; else None."""
    query, key = map(arguments.values, (args.query_positions, args.key_positions))
    bound = known_bound(args.mask)
    if query is None or key is None or query.ndim + key.ndim > 2:
        return None
    if jax.tree.leaves(bound):
        return None
    lengths = Lengths(shards_of(place), args.query.shape[-3], args.key.shape[-3])
    return pairs_at(bound, lengths, query, key)
