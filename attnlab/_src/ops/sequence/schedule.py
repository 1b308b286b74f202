"""Which keys devices send to each other so that each has those that it needs."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from attnlab._src.masks.base import Mask
from attnlab._src.ops.sequence.needs import Lengths, Needs, needs_of


class Table(NamedTuple):
    """Keys that are sent by lists.

    Attributes:
        local: ``[count, size]`` int32, for each sender the slots within its shard; -1:
            not its own.
        slots: ``[count, size]`` int32, for each receiver which slots of the whole
            sequence arrive; -1: one that it does not need.
    """

    local: np.ndarray
    slots: np.ndarray

    @property
    def size(self) -> int:
        """Keys in a list."""
        return self.local.shape[1]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What devices exchange.

    Attributes:
        left: keys before its own shard that each device gets.
        right: keys after its own shard that each device gets.
        everyone: keys that all devices get, from whichever device holds them.
        hops: pairs of a distance and what devices send to the device that far behind
            them in the sequence (modulo their count).
        wide: queries that go to all keys, instead of all keys to them.
        keys: keys in a shard.
        count: shards.
    """

    left: int
    right: int
    everyone: Table
    hops: tuple[tuple[int, Table], ...]
    wide: Table
    keys: int
    count: int

    @property
    def lists_come_first(self) -> bool:
        """Whether what comes by lists lies before all other keys of each device."""
        first = np.arange(self.count)[:, None] * self.keys - self.left
        tables = self.everyone, *(table for _, table in self.hops)
        return all(
            bool((table.slots < first)[table.slots >= 0].all()) for table in tables
        )

    @property
    def received(self) -> float:
        """Keys that a device receives; a sum over devices moves each key twice."""
        shared = 2 * self.everyone.size * (self.count - 1) / self.count
        return self.left + self.right + shared + sum(t.size for _, t in self.hops)

    @property
    def held(self) -> int:
        """Keys that a device attends to at once."""
        lists = self.everyone.size + sum(table.size for _, table in self.hops)
        return self.keys + self.left + self.right + lists


@functools.lru_cache(maxsize=256)
def schedule_of(
    mask: Mask | None, lengths: Lengths, queries_move: bool = False
) -> Schedule:
    """The schedule that moves the fewest keys, of a few candidates.

    What lies next to a shard comes from its neighbours (the same number of keys for
    each), what several shards need goes to all, the rest is sent from device to device.

    Args:
        mask: as of :func:`needs_of`.
        lengths: of the shards.
        queries_move: whether queries may be wide.
    """
    needs = needs_of(mask, lengths, queries_move)
    candidates = itertools.product(
        _reaches(needs, lengths, before=True),
        _reaches(needs, lengths, before=False),
        sorted({2, lengths.count // 2, lengths.count - 1, lengths.count}),
    )
    best = min(candidates, key=lambda each: _price(_Far.of(needs, lengths, *each)))
    return _made(_Far.of(needs, lengths, *best))


def ring_hops(mask: Mask | None, lengths: Lengths) -> int:
    """How often keys are passed on to the next device until nobody needs them."""
    needs = needs_of(mask, lengths)
    shards, ranges = np.nonzero(needs.by)
    return int(((shards - needs.owners[ranges]) % lengths.count).max(initial=0))


def _reaches(needs: Needs, lengths: Lengths, before: bool) -> Iterator[int]:
    """Candidates for the number of neighbouring keys that all shards get."""
    found = [_reach(needs, lengths, shard, before) for shard in range(lengths.count)]
    values, times = np.unique(found, return_counts=True)
    often = values[np.argsort(-times, kind="stable")][:2]
    yield from sorted({0, int(values[-1]), *map(int, often)})


def _reach(needs: Needs, lengths: Lengths, shard: int, before: bool) -> int:
    """How many keys next to its own a shard needs without a gap."""
    if before:
        edge = shard * lengths.keys
        there = np.flatnonzero(needs.starts < edge)[::-1]
    else:
        edge = (shard + 1) * lengths.keys
        there = np.flatnonzero(needs.starts >= edge)
    needed = needs.by[shard, there]
    stop = len(needed) if needed.all() else int(np.argmin(needed))
    return int(needs.sizes[there[:stop]].sum())


@dataclasses.dataclass(frozen=True)
class _Far:
    """What does not come from the neighbours.

    Attributes:
        needs: with edges where neighbouring keys end.
        lengths: of the shards.
        left: neighbouring keys before each shard.
        right: neighbouring keys after it.
        wanted: ``[count, E]`` boolean, the ranges that each shard needs.
        shared: ``[E]`` boolean, the ranges that all devices get.
    """

    needs: Needs
    lengths: Lengths
    left: int
    right: int
    wanted: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(
        cls, needs: Needs, lengths: Lengths, left: int, right: int, least: int
    ) -> "_Far":
        """With given neighbours; a range that ``least`` shards need goes to all."""
        firsts = np.arange(lengths.count) * lengths.keys
        before, after = firsts - left, firsts + lengths.keys + right
        needs = needs.cut_at([*before, *after])
        near = (needs.starts >= before[:, None]) & (needs.starts < after[:, None])
        wanted = needs.by & ~near
        return cls(needs, lengths, left, right, wanted, wanted.sum(0) >= least)

    def hop_sizes(self) -> np.ndarray:
        """``[count]``, how many keys go to the device that far behind."""
        needs, count = self.needs, self.lengths.count
        each = (self.wanted & ~self.shared) * needs.sizes
        # Of floats, for which NumPy has fast products.
        pairs = each.astype(float) @ np.equal.outer(needs.owners, np.arange(count))
        shards = np.arange(count)
        hops = [pairs[shards, (shards - hop) % count].max() for hop in range(count)]
        return np.array(hops, int)


#: Lists of more numbers than this are not made: they are part of the program.
_LONGEST_LISTS = 2**22


def _price(far: _Far) -> tuple[bool, float, float]:
    """Of several schedules the least is taken: whether lists are long, keys moved."""
    count, hops = far.lengths.count, far.hop_sizes().sum()
    shared = far.needs.sizes[far.shared].sum()
    moved = far.left + far.right + 2 * shared * (count - 1) / count + hops
    return count * (shared + hops) > _LONGEST_LISTS, moved, shared + hops


def _made(far: _Far) -> Schedule:
    needs, lengths, count = far.needs, far.lengths, far.lengths.count
    everyone = _table(needs, lengths, far.wanted, np.flatnonzero(far.shared))
    hops = []
    for hop in np.flatnonzero(far.hop_sizes()):
        sender = (np.arange(count) - hop) % count
        own = far.wanted & ~far.shared & (needs.owners == sender[:, None])
        hops.append((int(hop), _hop_table(needs, lengths, own, sender)))
    own = needs.wide // lengths.queries == np.arange(count)[:, None]
    wide = Table(
        np.where(own, needs.wide % lengths.queries, -1).astype(np.int32),
        np.broadcast_to(needs.wide, own.shape).astype(np.int32),
    )
    return Schedule(
        far.left, far.right, everyone, tuple(hops), wide, lengths.keys, count
    )


def _table(
    needs: Needs, lengths: Lengths, wanted: np.ndarray, ranges: np.ndarray
) -> Table:
    """Ranges that all devices get; ``wanted [count, E]`` says who needs which."""
    slots = _slots(needs, ranges)
    which = np.repeat(ranges, needs.sizes[ranges])
    own = needs.owners[which] == np.arange(lengths.count)[:, None]
    local = np.where(own, slots % lengths.keys, -1)
    return Table(
        local.astype(np.int32), np.where(wanted[:, which], slots, -1).astype(np.int32)
    )


def _hop_table(
    needs: Needs, lengths: Lengths, wanted: np.ndarray, sender: np.ndarray
) -> Table:
    """What each device gets from its sender; ``wanted [count, E]``."""
    each = [_slots(needs, np.flatnonzero(row)) for row in wanted]
    size = max(map(len, each))
    slots = np.full((lengths.count, size), -1, np.int32)
    local = np.full((lengths.count, size), -1, np.int32)
    for receiver, found in enumerate(each):
        slots[receiver, : len(found)] = found
        local[sender[receiver], : len(found)] = found % lengths.keys
    return Table(local, slots)


def _slots(needs: Needs, ranges: np.ndarray) -> np.ndarray:
    """All slots of some ranges."""
    spans = [needs.starts[e] + np.arange(needs.sizes[e]) for e in ranges]
    return np.concatenate([np.zeros(0, int), *spans])
