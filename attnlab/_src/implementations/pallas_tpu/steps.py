"""The plan as a list of steps, one live block each: what the grid of a kernel walks.

A kernel's grid is (example, head, *steps). Where every block is alive, and all of them
full or all of them partial, steps are numbered by arithmetic; else two words a step lie
in scalar memory, fetched before the kernel starts, so that dead blocks are neither
computed nor fetched.

The sums of a kernel belong to its **outer** blocks: of queries in the forward pass, of
keys in the backward pass. Each outer block meets its live **inner** blocks in turn.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from attnlab._src.types import Intervals, Live, Plan

#: Bytes of scalar memory that the words may take; a core has 1 MiB.
MOST_BYTES = 2**19
#: Blocks of one side, at most: the numbers of two share a word.
MOST_BLOCKS = 2**15
#: Query heads that share a key head, at most.
MOST_MEMBERS = 2**8

_FIRST, _LAST, _FRESH, _ACTIVE, _MASKED, _EMPTY = (1 << n for n in range(6))
_MEMBER, _SEGMENT = 8, 16


class Step(NamedTuple):
    """One block of logits. Marks are booleans, of Python where known beforehand.

    Attributes:
        outer: number of the outer block.
        inner: number of the inner block.
        member: which query head of those that share a key head.
        segment: which segment of the inner blocks.
        first: whether the outer block's sums start here.
        last: whether they end here.
        fresh: whether a segment starts here.
        active: whether there is a live block.
        masked: whether it is partial.
        empty: whether the step is there because no block is alive.
    """

    outer: Any
    inner: Any
    member: Any
    segment: Any
    first: Any
    last: Any
    fresh: Any
    active: Any
    masked: Any
    empty: Any


class Steps(NamedTuple):
    """A list of steps for each example and head, or the arithmetic in its place.

    Attributes:
        grid: the axes of the grid that count the steps; by arithmetic (segments, outer
            blocks, members, inner blocks of a segment).
        words: two int32 arrays ``[Bp * Np * count]``; none where arithmetic serves.
        lists: Bp and Np: 1 where all examples, or all heads, have the same list.
        count: the words in a list.
        kinds: whether there may be full blocks, whether partial ones.
    """

    grid: tuple[Any, ...]
    words: tuple[Any, ...]
    lists: tuple[int, int]
    count: int
    kinds: tuple[bool, bool]

    def at(self, ids: tuple[Any, ...], words: tuple[Any, ...]) -> Step:
        """The step at a place in the grid.

        Args:
            ids: the place, ``(example, head, *steps)``.
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

        def marked(bit: int) -> Any:
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


def run_if(condition: Any, body: Any) -> None:
    """Runs ``body()`` where the condition holds: at once where Python knows it."""
    if not isinstance(condition, bool):
        pl.when(condition)(body)
    elif condition:
        body()


def by_query(plan: Plan) -> Steps:
    """One block of queries after another."""
    return _steps(plan.rows, -(-plan.key_length // plan.block_k))


def by_key(plan: Plan, group: int, segment: int) -> Steps:
    """One block of keys after another, with its query heads in turn.

    Args:
        plan: with columns.
        group: query heads that share a key head.
        segment: blocks of queries in a segment; one segment comes after another.
    """
    assert plan.cols is not None
    rows = -(-plan.query_length // plan.block_q)
    return _steps(plan.cols, rows, group, segment)


def _steps(
    live: Live, inners: int, group: int = 1, segment: int | None = None
) -> Steps:
    if live.full.lo.shape[-1] + live.partial.lo.shape[-1] == 0:
        # No pair is visible and there is no interval: use one that is empty.
        none = np.zeros((*live.full.lo.shape[:-1], 1), np.int32)
        live = Live(Intervals(none, none), live.partial)
    outers = live.full.lo.shape[2]
    segment = inners if segment is None else segment
    segments = -(-inners // segment)
    xp: Any = np if isinstance(live.full.lo, np.ndarray) else jnp
    full, partial = (x.per_row() for x in live)
    if xp is np and segments * segment == inners:
        kinds = bool((full == inners).all()), bool((partial == inners).all())
        if any(kinds):
            return Steps((segments, outers, group, segment), (), (1, 1), 0, kinds)

    def owned(x: Any) -> Any:
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
    """The list of the live blocks of each line of ``live [Bp, Np, lines, m]``.

    Lines are numbered by (segment, outer block, member of the group).
    """
    full, partial = live
    xp: Any = np if isinstance(full.lo, np.ndarray) else jnp
    lo = xp.concatenate([full.lo, partial.lo], -1)
    end = xp.concatenate([full.hi, partial.hi], -1) - lo
    end = xp.maximum(end, 0).cumsum(-1, dtype=np.int32)
    total, fulls = end[..., -1], full.per_row()
    # A line that sees nothing has a step, too: its sums start, and end.
    stop = xp.maximum(total, 1).cumsum(-1, dtype=np.int32)
    longest = stop[..., -1].max()
    count = int(longest) if xp is np else lo.shape[2] * segment
    nobody = xp.full((1,), -1, np.int32)

    def one(lo: Any, end: Any, total: Any, fulls: Any, stop: Any) -> tuple[Any, Any]:
        t = xp.arange(count, dtype=np.int32)
        exists = t < stop[-1]
        line = xp.minimum(xp.searchsorted(stop, t, side="right"), len(stop) - 1)
        rank = t - stop[line] + xp.maximum(total[line], 1)
        active = exists & (rank < total[line])
        # Steps that are none stay where they are: nothing is fetched, nothing written.
        rank = xp.minimum(rank, xp.maximum(total[line] - 1, 0))
        which = (end[line] <= rank[:, None]).sum(-1, dtype=np.int32)
        which = xp.minimum(which, lo.shape[1] - 1)
        before = xp.where(which > 0, end[line, xp.maximum(which - 1, 0)], 0)
        owner = line // group
        # An empty line's step is at a block of its own, which is dead.
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
    if xp is np:
        lists = [one(*each) for each in zip(*flat, strict=True)]
        words = tuple(np.stack(x).reshape(-1) for x in zip(*lists, strict=True))
        kinds = bool(fulls.any()), bool((total > fulls).any())
    else:
        words = tuple(x.reshape(-1) for x in jax.vmap(one)(*flat))
        kinds = full.lo.shape[-1] > 0, partial.lo.shape[-1] > 0
        longest = longest.astype(jnp.int32)
    return Steps((longest if xp is jnp else count,), words, lead, count, kinds)
