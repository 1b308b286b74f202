"""The plan as a list of steps for the grid of a kernel, one for each live block.

A kernel's grid is (example, head, *steps). If all blocks are full, or all are partial,
indices of blocks are computed from grid indices; else they are in two words per step in
scalar memory, fetched before the kernel starts, so that dead blocks are neither
computed nor fetched.

The sums of a kernel belong to its **outer** blocks: of queries in the forward pass, of
keys in the backward pass. For each outer block the kernel walks the live **inner**
blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from attnlab._src.types import Array, ArrayLike, Intervals, Live, Plan

#: Greatest memory of the words in bytes; a core has 1 MiB of scalar memory.
MOST_BYTES = 2**19
#: Greatest number of blocks of a side: two block numbers share a word.
MOST_BLOCKS = 2**15
#: Greatest number of query heads that share a key head.
MOST_MEMBERS = 2**8

_FIRST, _LAST, _FRESH, _ACTIVE, _MASKED, _EMPTY = (1 << n for n in range(6))
_MEMBER, _SEGMENT = 8, 16


class Step(NamedTuple):
    """One step of the grid: a block of logits.

    Booleans are Python's if they are known beforehand, else traced.

    Attributes:
        outer: index of the outer block.
        inner: index of the inner block.
        member: index of the query head among those that share a key head.
        segment: index of the segment of inner blocks.
        first: whether the sums of the outer block start here.
        last: whether the sums of the outer block end here.
        fresh: whether a segment starts here.
        active: whether there is a live block.
        masked: whether the block is partial.
        empty: whether this is the step of an outer block without live blocks.
    """

    outer: int | Array
    inner: int | Array
    member: int | Array
    segment: int | Array
    first: bool | Array
    last: bool | Array
    fresh: bool | Array
    active: bool | Array
    masked: bool | Array
    empty: bool | Array


@dataclasses.dataclass(frozen=True)
class Steps:
    """A list of steps for each example and head, or sizes to compute them from.

    Attributes:
        grid: the axes of the grid for steps: number of steps of a list; or, without
            list, (segments, outer blocks, members, inner blocks of a segment).
        make_words: makes ``words``; None if there are no lists.
        lists: Bp and Np; 1 if all examples, or all heads, have the same list.
        count: number of words in a list.
        kinds: whether there may be full blocks, and whether partial ones.
    """

    grid: tuple[int | Array, ...]
    make_words: Callable[[], tuple[ArrayLike, ...]] | None
    lists: tuple[int, int]
    count: int
    kinds: tuple[bool, bool]

    @functools.cached_property
    def words(self) -> tuple[ArrayLike, ...]:
        """Two int32 arrays ``[Bp * Np * count]``; empty if there are no lists."""
        return () if self.make_words is None else self.make_words()

    @property
    def bytes(self) -> int:
        """Bytes of ``words``, which it does not make."""
        return 8 * math.prod(self.lists) * self.count

    def at(self, ids: tuple[Any, ...], words: tuple[Any, ...]) -> Step:
        """The step at an index of the grid.

        Args:
            ids: the index, ``(example, head, *steps)``.
            words: references to ``words`` in scalar memory.
        """
        full, partial = self.kinds
        example, head, *place = ids
        if not words:
            segment, outer, member, inner = place
            _, _, members, inners = self.grid
            first = (inner == 0) & (member == 0)
            last = (inner == inners - 1) & (member == members - 1)
            fresh = first & (outer == 0)
            inner = segment * inners + inner
            return Step(
                outer, inner, member, segment, first, last, fresh, True, partial, False
            )
        start = 0 if self.lists[0] == 1 else example * self.lists[1]
        start = (start if self.lists[1] == 1 else start + head) * self.count
        block, marks = (ref[start + place[0]] for ref in words)

        def marked(bit: int) -> Array:
            return (marks & bit) != 0

        return Step(
            block & 0xFFFF,
            block >> 16,
            (marks >> _MEMBER) & 0xFF,
            marks >> _SEGMENT,
            marked(_FIRST),
            marked(_LAST),
            marked(_FRESH),
            marked(_ACTIVE),
            marked(_MASKED) if full and partial else partial,
            marked(_EMPTY),
        )


def run_if(condition: bool | Array, body: Callable[[], None]) -> None:
    """Runs ``body()`` if the condition holds; without branch if it is Python's bool."""
    if not isinstance(condition, bool):
        pl.when(condition)(body)
    elif condition:
        body()


def by_query(plan: Plan) -> Steps:
    """Steps whose outer blocks are blocks of queries, for the forward pass."""
    return _steps(plan.rows, -(-plan.key_length // plan.block_k))


def by_key(plan: Plan, group: int, segment: int) -> Steps:
    """Steps whose outer blocks are blocks of keys, for the backward pass.

    Segments of queries are the outermost loop; then come blocks of keys, query heads of
    a group, and blocks of queries.

    Args:
        plan: the plan, with columns.
        group: number of query heads that share a key head.
        segment: number of blocks of queries in a segment.
    """
    assert plan.cols is not None
    rows = -(-plan.query_length // plan.block_q)
    return _steps(plan.cols, rows, group, segment)


def _steps(
    live: Live, inners: int, group: int = 1, segment: int | None = None
) -> Steps:
    if live.full.lo.shape[-1] + live.partial.lo.shape[-1] == 0:
        # No pair is visible and there is no interval: add an empty one.
        none = np.zeros((*live.full.lo.shape[:-1], 1), np.int32)
        live = Live(Intervals(none, none), live.partial)
    outers = live.full.lo.shape[2]
    segment = inners if segment is None else segment
    segments = -(-inners // segment)
    xp: ModuleType = np if isinstance(live.full.lo, np.ndarray) else jnp
    full, partial = (x.per_row() for x in live)
    if xp is np and segments * segment == inners:
        kinds = bool((full == inners).all()), bool((partial == inners).all())
        if any(kinds):
            return Steps((segments, outers, group, segment), None, (1, 1), 0, kinds)

    def owned(x: ArrayLike) -> ArrayLike:
        """``[Bp, Np, outers, m] -> [Bp, Np, segments, outers, group, m]``."""
        batch, heads, _, many = x.shape
        if heads == 1:
            x = xp.broadcast_to(x[:, :, None], (batch, 1, group, outers, many))
        else:
            x = x.reshape(batch, heads // group, group, outers, many)
        x = xp.moveaxis(x, 2, 3)[:, :, None]
        x = xp.broadcast_to(x, (*x.shape[:2], segments, *x.shape[3:]))
        start = np.arange(0, segments * segment, segment, dtype=np.int32)
        start = start.reshape(1, 1, -1, 1, 1, 1)
        x = xp.clip(x, start, start + segment)
        return x.reshape(*x.shape[:2], segments * outers * group, many)

    lines = Live(*(Intervals(*map(owned, x)) for x in live))
    return _listed(lines, outers, segment, group)


def _listed(live: Live, outers: int, segment: int, group: int) -> Steps:
    """The steps for the live blocks of each line of ``live [Bp, Np, lines, m]``.

    The axis of lines is (segment, outer block, member of the group), flattened.
    """
    full, partial = live
    xp: ModuleType = np if isinstance(full.lo, np.ndarray) else jnp
    lo = xp.concatenate([full.lo, partial.lo], -1)
    end = xp.concatenate([full.hi, partial.hi], -1) - lo
    end = xp.maximum(end, 0).cumsum(-1, dtype=np.int32)
    total, fulls = end[..., -1], full.per_row()
    # A line without live blocks has a step, too, which writes its sums of zero.
    stop = xp.maximum(total, 1).cumsum(-1, dtype=np.int32)
    longest = stop[..., -1].max()
    count = int(longest) if xp is np else lo.shape[2] * segment
    nobody = xp.full((1,), -1, np.int32)

    def one(
        lo: ArrayLike,
        end: ArrayLike,
        total: ArrayLike,
        fulls: ArrayLike,
        stop: ArrayLike,
    ) -> tuple[ArrayLike, ArrayLike]:
        t = xp.arange(count, dtype=np.int32)
        exists = t < stop[-1]
        line = xp.minimum(xp.searchsorted(stop, t, side="right"), len(stop) - 1)
        rank = t - stop[line] + xp.maximum(total[line], 1)
        active = exists & (rank < total[line])
        # Steps beyond the list repeat the last block, so that nothing is fetched.
        rank = xp.minimum(rank, xp.maximum(total[line] - 1, 0))
        which = (end[line] <= rank[:, None]).sum(-1, dtype=np.int32)
        which = xp.minimum(which, lo.shape[1] - 1)
        before = xp.where(which > 0, end[line, xp.maximum(which - 1, 0)], 0)
        owner = line // group
        # The step of an empty line is at a (dead) block of its own segment.
        inner = lo[line, which] + rank - before
        inner = xp.where(total[line] > 0, inner, owner // outers * segment)
        lives = xp.where(exists, owner, -1)
        first = exists & (lives != xp.concatenate([nobody, lives[:-1]]))
        last = exists & (lives != xp.concatenate([lives[1:], nobody]))
        outer = owner % outers
        marks = (
            xp.where(first, _FIRST, 0)
            | xp.where(last, _LAST, 0)
            | xp.where(first & (outer == 0), _FRESH, 0)
            | xp.where(active, _ACTIVE, 0)
            | xp.where(active & (rank >= fulls[line]), _MASKED, 0)
            | xp.where(exists & ~active, _EMPTY, 0)
            | (line % group) << _MEMBER
            | (owner // outers) << _SEGMENT
        )
        return (outer | inner << 16).astype(np.int32), marks.astype(np.int32)

    lead = lo.shape[:2]
    flat = [
        x.reshape(math.prod(lead), *x.shape[2:]) for x in (lo, end, total, fulls, stop)
    ]

    def words() -> tuple[ArrayLike, ...]:
        if xp is jnp:
            return tuple(x.reshape(-1) for x in jax.vmap(one)(*flat))
        lists = [one(*each) for each in zip(*flat, strict=True)]
        return tuple(np.stack(x).reshape(-1) for x in zip(*lists, strict=True))

    if xp is np:
        kinds = bool(fulls.any()), bool((total > fulls).any())
        return Steps((count,), words, lead, count, kinds)
    kinds = full.lo.shape[-1] > 0, partial.lo.shape[-1] > 0
    return Steps((longest.astype(jnp.int32),), words, lead, count, kinds)
