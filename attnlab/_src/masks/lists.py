"""Which blocks of a plan are live, from lists of the blocks that each block sees."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import FAR, namespace, numbers, plus, runs
from attnlab._src.masks.rule import Bounds
from attnlab._src.masks.structural import nothing
from attnlab._src.types import Array, ArrayLike, Intervals

#: Longer lists are sorted and searched, shorter ones are compared entry by entry.
_LONGEST_COMPARED = 64


def searchable(table: ArrayLike) -> ArrayLike:
    """Lists in the last axis as :func:`listed_in` takes them: long ones are sorted."""
    if table.shape[-1] <= _LONGEST_COMPARED:
        return table
    return namespace(table).sort(table, axis=-1)


def listed_in(lists: Array, blocks: Array) -> Array:
    """Which blocks a row lists: ``[q, R], [1, k] -> bool [q, k]``; -1 lists nothing."""
    # Below the block of an empty slot: neither is equal to any.
    lists = jnp.where(lists >= 0, lists, -2)
    if lists.shape[1] <= _LONGEST_COMPARED:
        return (lists[:, :, None] == blocks[:, None, :]).any(1)

    def search(row: Array) -> Array:
        place = jnp.searchsorted(row, blocks[0], method="scan_unrolled")
        return row[jnp.minimum(place, len(row) - 1)] == blocks[0]

    return jax.vmap(search)(lists)


def bounds_of_lists(
    tables: Sequence[ArrayLike],
    sizes: tuple[int, int],
    rows: Blocks,
    cols: Blocks,
    *,
    exact: bool = True,
) -> Bounds:
    """The bounds of a mask that lists blocks; see ``Rule.bounds``.

    Args:
        tables: ``[B, N, n, R]``, the blocks of keys for each block of queries, -1 =
            none; and ``[B, N, m, R']``, the transpose, if it is known.
        sizes: queries and keys in a block of the lists.
        rows: the blocks of one side of the plan.
        cols: the blocks of the other.
        exact: whether each query of a block sees all that is listed for the block.
    """
    found = _cells(tables[0], sizes, rows, cols)
    if found is not None:
        return found, nothing(found.lo)
    known = rows.side == "query" or len(tables) == 2
    own, other = sizes if rows.side == "query" else sizes[::-1]
    if known:
        listed = tables[0 if rows.side == "query" else 1]
        all_of_it = namespace(listed).full(listed.shape, exact)
        listed = _Listed(listed, listed, all_of_it)
    else:
        listed = _transposed(tables[0], -(-rows.length // own))
    entries = listed.first.shape[-2]
    xp = namespace(*listed, rows.lo)
    # A block of rows spans this many blocks of the lists; one more if unaligned.
    aligned = rows.size % own == 0 or own % rows.size == 0
    span = -(-rows.size // own) + (not (aligned and rows.starts_at_zero))
    first, last = rows.rows_lo // own, rows.rows_hi // own
    wanted = first + numbers(span, first.ndim)
    there = (wanted >= 0) & (wanted <= last) & (wanted < entries)
    index = xp.clip(wanted, 0, entries - 1)
    lead = jnp.broadcast_shapes(listed.first.shape[:2], index.shape[:2])
    flat = xp.broadcast_to(index, lead + index.shape[2:]).reshape(
        lead + (rows.count * span, 1)
    )

    def of_rows(table: ArrayLike) -> ArrayLike:
        """``[..., entries, m]`` as ``[..., rows.count, span * m]``."""
        table = xp.broadcast_to(table, lead + table.shape[2:])
        return xp.take_along_axis(table, flat, axis=2).reshape(
            lead + (rows.count, span * table.shape[-1])
        )

    listed = _Listed(*map(of_rows, listed))
    there = xp.repeat(there, listed.first.shape[-1] // span, axis=-1)
    # The last block that begins within the positions of int32.
    most = FAR // other
    there = there & (listed.first >= 0) & (listed.first <= most)
    lo = xp.where(there, listed.first, 0) * other
    hi = plus(xp.minimum(xp.where(there, listed.last, 0), most) * other, other)
    hi = xp.where(there, hi, lo)
    if rows.offset is None:
        # Positions given one by one may lie farther apart: any block may be seen.
        far = last - first >= span
        lo, hi = xp.where(far, 0, lo), xp.where(far, FAR, hi)
    sure = listed.exact & (first == last)
    if not known:
        # Blocks beyond the length are not in ``listed``: any block may be seen.
        beyond = last >= entries
        lo, hi = xp.where(beyond, 0, lo), xp.where(beyond, FAR, hi)
        sure = sure & ~beyond
    if span > 1 or other < cols.size or not exact:
        return cols.touched(lo, hi), nothing(lo)
    return cols.touched(lo, hi), cols.covered(lo, xp.where(sure, hi, lo))


def _cells(
    table: ArrayLike, sizes: tuple[int, int], rows: Blocks, cols: Blocks
) -> Intervals | None:
    """Live blocks of a plan that is coarser than the lists, from single cells.

    None where lists are shorter than a row of the plan, or blocks do not fit.
    """
    query, key = (rows, cols) if rows.side == "query" else (cols, rows)
    span, rest = divmod(query.size, sizes[0])
    fits = rest == 0 == key.size % sizes[1]
    if not (fits and query.starts_at_zero and key.starts_at_zero):
        return None
    listed = span * table.shape[-1]
    if listed <= key.count:
        return None
    xp = namespace(table)
    short = query.count * span - table.shape[-2]
    if short > 0:
        padding = [(0, 0)] * (table.ndim - 2) + [(0, short), (0, 0)]
        table = xp.pad(table, padding, constant_values=-1)
    table = table[..., : query.count * span, :]
    cells = table.reshape(*table.shape[:-2], query.count, listed)
    # One more column, for what is not there.
    cells = xp.where(cells < 0, key.count, cells // (key.size // sizes[1]))
    cells = xp.minimum(cells, key.count)
    if xp is np:
        live = np.zeros((*cells.shape[:-1], key.count + 1), bool)
        np.put_along_axis(live, cells, True, -1)
        live = live[..., :-1]
    else:
        live = (cells[..., None] == numbers(key.count, cells.ndim + 1)).any(-2)
    return runs(live if rows is query else live.swapaxes(-1, -2))


class _Listed(NamedTuple):
    """Runs of blocks that are listed for each block, ``[..., blocks, m]``.

    Attributes:
        first: first block of each run, -1 if there is none.
        last: its last block.
        exact: whether every block between is listed, too.
    """

    first: ArrayLike
    last: ArrayLike
    exact: ArrayLike


def _transposed(table: ArrayLike, count: int) -> _Listed:
    """Query blocks for each of the first key blocks: the transpose of a table.

    Args:
        table: ``[B, N, n, R]``, key blocks for each query block; -1 = none.
        count: how many key blocks.

    Returns:
        A fixed number of runs for each key block, whatever the table holds: several
        times the average. Further runs are merged into the last one.
    """
    xp = namespace(table)
    n, each = table.shape[2:]
    most, length = min(n, 4 * each + 4), n * each
    query_blocks = np.repeat(np.arange(n, dtype=np.int32), each)
    places = np.arange(length, dtype=np.int32)

    def one(table: ArrayLike) -> tuple[ArrayLike, ...]:
        key_block = table.reshape(-1)
        inside = (key_block >= 0) & (key_block < count)
        key_block = xp.where(inside, key_block, count)
        order = xp.argsort(key_block, stable=True)
        key_block, query_block = key_block[order], xp.asarray(query_blocks)[order]
        same = key_block[1:] == key_block[:-1]
        follows = same & (query_block[1:] <= query_block[:-1] + 1)
        edge = xp.ones(1, bool)
        # The k-th place at which a run starts, and at which it ends.
        starts, ends = (
            xp.argsort(~xp.concatenate(parts), stable=True)
            for parts in ((edge, ~follows), (~follows, edge))
        )
        runs = xp.where(places <= (~follows).sum(), key_block[starts], count)
        wanted = np.arange(count, dtype=np.int32)
        begin, stop = (
            xp.searchsorted(runs, wanted, side) for side in ("left", "right")
        )
        run = begin[:, None] + numbers(most, 2)
        exists, last = run < stop[:, None], stop[:, None] - 1
        final = xp.where(numbers(most, 2) == most - 1, last, run)
        run, final = (xp.clip(x, 0, length - 1) for x in (run, final))
        return (
            xp.where(exists, query_block[starts[run]], -1).astype(np.int32),
            xp.where(exists, query_block[ends[final]], -1).astype(np.int32),
            run == final,
        )

    lead = table.shape[:2]
    flat = table.reshape((math.prod(lead), n, each))
    if xp is np:
        # A batch of 0 has shapes, too.
        some = flat if len(flat) else np.full((1, n, each), -1, flat.dtype)
        found = [np.stack(x)[: len(flat)] for x in zip(*map(one, some), strict=True)]
    else:
        found = jax.vmap(one)(flat)
    return _Listed(*(x.reshape(lead + x.shape[1:]) for x in found))
