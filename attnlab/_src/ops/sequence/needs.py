"""Which keys each device needs: from the plan whose rows are the shards of queries."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from attnlab._src.masks.base import Mask
from attnlab._src.masks.intervals import merge
from attnlab._src.masks.planning import alone, index_blocks, make_plan
from attnlab._src.types import Intervals, Plan, PyTree

#: Pairs of shards and blocks of keys that are looked at.
_MOST_PAIRS = 2**24


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How a sequence is cut into shards of one size.

    Attributes:
        count: shards.
        query_length: T, before padding.
        key_length: S, before padding.
    """

    count: int
    query_length: int
    key_length: int

    @property
    def queries(self) -> int:
        """Queries in a shard."""
        return -(-self.query_length // self.count)

    @property
    def keys(self) -> int:
        """Keys in a shard."""
        return -(-self.key_length // self.count)


@dataclasses.dataclass(frozen=True)
class Needs:
    """The key slots that the queries of each shard may see.

    The slots are cut into ranges such that all slots of a range lie in one shard, and
    are needed by the same shards.

    Attributes:
        starts: ``[E]``, first slot of each range, ascending.
        sizes: ``[E]``, slots in each range.
        owners: ``[E]``, the shard that holds it.
        by: ``[count, E]`` boolean, whether a shard needs it.
        wide: slots of queries that see most keys (anchors that see all), for which
            nothing is needed here: such queries go to the keys.
    """

    starts: np.ndarray
    sizes: np.ndarray
    owners: np.ndarray
    by: np.ndarray
    wide: np.ndarray

    def cut_at(self, edges: Sequence[int]) -> "Needs":
        """The same needs, with further edges between ranges."""
        ends = self.starts + self.sizes
        inside = [x for x in edges if 0 < x < ends[-1]]
        starts = np.unique(np.concatenate([self.starts, np.asarray(inside, int)]))
        whole = np.searchsorted(self.starts, starts, "right") - 1
        sizes = np.diff(np.append(starts, ends[-1]))
        by = self.by[:, whole]
        return Needs(starts, sizes, self.owners[whole], by, self.wide)


@functools.lru_cache(maxsize=256)
def needs_of(mask: Mask | None, lengths: Lengths, queries_move: bool = False) -> Needs:
    """What each shard needs.

    Args:
        mask: its arrays, if any, are NumPy's; None: any query may see any key.
        lengths: of the shards.
        queries_move: whether queries may be wide.
    """
    count, total = lengths.count, lengths.key_length
    edges = np.minimum(np.arange(count + 1) * lengths.keys, total)
    wide = np.zeros(0, int)
    if mask is None:
        intervals = [np.array([[0, total]])] * count
    else:
        intervals = _of_plan(mask, lengths)
        if queries_move:
            intervals, wide = _without_wide(mask, lengths, intervals)
    starts = np.unique(np.concatenate([edges, *(x.ravel() for x in intervals)]))
    sizes = np.diff(starts)
    starts = starts[:-1]
    by = np.zeros((count, len(starts)), bool)
    for shard, spans in enumerate(intervals):
        for first, last in spans:
            by[shard, (starts >= first) & (starts < last)] = True
    return Needs(starts, sizes, starts // lengths.keys, by, wide)


def _without_wide(
    mask: Mask, lengths: Lengths, intervals: list[np.ndarray]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Takes wide queries out of shards, if a few shards need much more than others."""
    count, t, s = lengths.count, lengths.query_length, lengths.key_length
    operands = operands_of(mask, t, s)
    if count < 3 or any(x.shape[2] > 1 for x in jax.tree.leaves(operands)):
        return intervals, np.zeros(0, int)
    sums = np.array([(x[:, 1] - x[:, 0]).sum() for x in intervals])
    unusual = np.flatnonzero(sums > s // 2)
    if len(unusual) > max(2, count // 8):
        return intervals, np.zeros(0, int)
    kept, wide = [*intervals], []
    for shard in unusual:
        first = int(shard) * lengths.queries
        stop = min(first + lengths.queries, t)
        rows = index_blocks("query", stop - first, 1, np.int32(first))
        key = index_blocks("key", s, 1)
        keys = _rows(make_plan(mask, operands, rows, key, cols=False))
        few = [int((x[:, 1] - x[:, 0]).sum()) <= s // 2 for x in keys]
        spans = [x for x, keep in zip(keys, few, strict=True) if keep]
        joined = np.concatenate([np.zeros((0, 2), int), *spans])
        kept[shard] = np.stack(merge(Intervals(*joined.T)), -1)
        wide.append(first + np.flatnonzero(np.logical_not(few)))
    slots = np.concatenate([np.zeros(0, int), *wide])
    if len(slots) > lengths.queries // 2:
        return intervals, np.zeros(0, int)
    return kept, slots


def _rows(plan: Plan) -> list[np.ndarray]:
    """For each row of a plan the blocks ``[m, 2]`` that some example and head needs."""
    spans = [np.stack([np.asarray(x.lo), np.asarray(x.hi)], -1) for x in plan.rows]
    count = spans[0].shape[2]
    flat = np.concatenate(
        [np.moveaxis(x, 2, 0).reshape(count, -1, 2) for x in spans], 1
    )
    return [row[row[:, 1] > row[:, 0]].astype(int) for row in flat]


def operands_of(mask: Mask, t: int, s: int) -> PyTree:
    """The operands of a mask whose data are known, as NumPy arrays."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, alone(mask, t, s)[0])


def _of_plan(mask: Mask, lengths: Lengths) -> list[np.ndarray]:
    """For each shard of queries intervals ``[m, 2]`` of key slots."""
    t, s = lengths.query_length, lengths.key_length
    operands = operands_of(mask, t, s)
    size = 1
    if jax.tree.leaves(operands):
        # Data are looked at key by key: fewer, larger blocks where there are many.
        fewest = lengths.count * s // _MOST_PAIRS
        size = next(n for n in range(fewest + 1, s + 2) if lengths.keys % n == 0)
    plan = make_plan(
        mask,
        operands,
        index_blocks("query", t, lengths.queries),
        index_blocks("key", s, size),
        cols=False,
    )
    rows = [np.minimum(row * size, s) for row in _rows(plan)]
    # Shards behind the end have no queries.
    return rows + [np.zeros((0, 2), int)] * (lengths.count - len(rows))
