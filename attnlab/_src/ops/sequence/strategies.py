"""How keys reach the queries: what a device does with its shards."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from attnlab._src.ops.derivative import run
from attnlab._src.ops.sequence.partial import Result, merged, merged_over
from attnlab._src.ops.sequence.schedule import Schedule, Table
from attnlab._src.ops.sequence.shards import Keys, Shards
from attnlab._src.types import Array, AttentionInputs


def exchange(
    inputs: AttentionInputs, shards: Shards, schedule: Schedule, name: str | None
) -> Result:
    """Each device gets the keys that its plan names, and no others.

    Args:
        inputs: the record of this device.
        shards: of the sequence.
        schedule: what is sent.
        name: the implementation asked for.
    """
    own = shards.keys(inputs)
    main = _with_neighbours(own, shards, schedule)
    first = shards.index * schedule.keys - schedule.left
    width = schedule.left + schedule.keys + schedule.right
    slots = first + jnp.arange(width, dtype=jnp.int32)
    beyond = schedule.right > 0
    lists = _listed(own, shards, schedule)
    if lists and schedule.lists_come_first:
        # One pass. Not for keys from both sides of the shard: a block of them spans the
        # whole shard, and queries would compute keys that they do not see.
        keys, where = lists
        main = shards.joined([keys, main])
        slots = jnp.concatenate([where, slots])
        parts = [shards.with_keys(inputs, main, slots, in_order=False)]
    else:
        parts = [shards.with_keys(inputs, main, slots, in_order=True, beyond=beyond)]
        if lists:
            parts.append(shards.with_keys(inputs, *lists, in_order=False))
    output, lse = merged([run(part, name) for part in parts])
    if not schedule.wide.size:
        return output, lse
    # Queries that see most keys went to all devices.
    wide, wide_lse = _of_wide(inputs, own, shards, schedule, name)
    local = jnp.asarray(schedule.wide.local)[shards.index]
    rows = jnp.where(local < 0, output.shape[1], local)
    return (
        output.at[:, rows].set(wide, mode="drop"),
        lse.at[:, rows].set(wide_lse, mode="drop"),
    )


def _of_wide(
    inputs: AttentionInputs,
    own: Keys,
    shards: Shards,
    schedule: Schedule,
    name: str | None,
) -> Result:
    """Wide queries attend to the keys of each device; the results are merged."""

    def everywhere(x: Array, axis: int) -> Array:
        return _sum(_pick(x, axis, schedule.wide, shards), shards.axes)

    queries = shards.with_queries(inputs, everywhere)
    first = shards.index * schedule.keys
    slots = first + jnp.arange(schedule.keys, dtype=jnp.int32)
    part = shards.with_keys(queries, own, slots, in_order=True)
    return merged_over(run(part, name), shards.axes)


def _with_neighbours(own: Keys, shards: Shards, schedule: Schedule) -> Keys:
    """This device's keys between those of its neighbours."""
    size = schedule.keys

    def end(x: Array, axis: int, width: int) -> Array:
        return lax.slice_in_dim(x, size - width, size, axis=axis)

    def start(x: Array, axis: int, width: int) -> Array:
        return lax.slice_in_dim(x, 0, width, axis=axis)

    before, after = [], []
    for reach, side, parts, sign in (
        (schedule.left, end, before, 1),
        (schedule.right, start, after, -1),
    ):
        for hop in range(1, -(-reach // size) + 1):
            width = min(size, reach - (hop - 1) * size)
            cut = shards.each(functools.partial(side, width=width), own)
            parts.append(shards.sent(cut, sign * hop, wrap=False))
    return shards.joined([*reversed(before), own, *after])


def _listed(own: Keys, shards: Shards, schedule: Schedule) -> tuple[Keys, Array] | None:
    """Keys that are sent by lists, and their slots; None if there are none."""
    parts, slots = [], []
    if schedule.everyone.size:
        picked = _picked(own, shards, schedule.everyone)
        parts.append([_sum(x, shards.axes) for x in picked])
        slots.append(schedule.everyone.slots)
    for hop, table in schedule.hops:
        parts.append(shards.sent(_picked(own, shards, table), hop))
        slots.append(table.slots)
    if not parts:
        return None
    where = jnp.concatenate([jnp.asarray(x)[shards.index] for x in slots])
    return shards.joined(parts), where


def _picked(own: Keys, shards: Shards, table: Table) -> Keys:
    """The keys that a list names, 0 where they are another device's."""
    return shards.each(lambda x, axis: _pick(x, axis, table, shards), own)


def _pick(x: Array, axis: int, table: Table, shards: Shards) -> Array:
    local = jnp.asarray(table.local)[shards.index]
    found = jnp.take(x, local.clip(0), axis)
    here = (local >= 0).reshape(-1, *[1] * (x.ndim - axis - 1))
    return jnp.where(here, found, jnp.zeros((), x.dtype))


def _sum(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over devices, of which one has what is not 0."""
    if x.dtype == jnp.bool_:
        return lax.psum(x.astype(jnp.int32), axes) > 0
    return lax.psum(x, axes)


def gather(inputs: AttentionInputs, shards: Shards, name: str | None) -> Result:
    """Each device gets all keys."""
    keys = shards.each(
        lambda x, axis: lax.all_gather(x, shards.axes, axis=axis, tiled=True),
        shards.keys(inputs),
    )
    total = shards.lengths.count * shards.lengths.keys
    slots = jnp.arange(total, dtype=jnp.int32)
    return run(shards.with_keys(inputs, keys, slots, in_order=True), name)


def by_heads(inputs: AttentionInputs, shards: Shards, name: str | None) -> Result:
    """Each device gets all queries and keys of some heads, and returns its results.

    References:
        Jacobs et al., "DeepSpeed Ulysses", 2023, section 3.
    """

    def turned(x: Array) -> Array:
        return lax.all_to_all(x, shards.axes, 2, 1, tiled=True)

    local = dataclasses.replace(
        inputs,
        query=turned(inputs.query),
        key=turned(inputs.key),
        value=turned(inputs.value),
    )
    if inputs.position_kinds[1] == "index":
        local = shards.within_length(local)
    output, lse = run(local, name)

    def back(x: Array) -> Array:
        return lax.all_to_all(x, shards.axes, 1, 2, tiled=True)

    return back(output), back(lse)
