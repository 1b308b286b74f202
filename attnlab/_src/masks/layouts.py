"""Masks that list blocks: given layouts, and random ones."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.base import Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import FAR, namespace, numbers, plus
from attnlab._src.masks.rule import Bounds
from attnlab._src.masks.structural import nothing, size_argument
from attnlab._src.prng import as_threefry
from attnlab._src.types import Array, ArrayLike, Operand, PyTree, Tile, pytree, static


@pytree
class BlockLayout(Mask):
    """Each block of queries sees the blocks of keys that are listed for it.

    ``rows [..., n, R]`` lists key blocks for each query block; -1 = none. ``cols [...,
    m, R']`` lists query blocks for each key block; where it is None, a plan finds them.
    """

    rows: ArrayLike
    cols: ArrayLike | None
    block_size: int = static()
    name: str = static()

    @property
    def block_multiple(self) -> int:
        """See :class:`Mask`."""
        return self.block_size

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        count = self.rows.shape[-2]
        if not isinstance(query_length, int) or not isinstance(key_length, int):
            raise NotImplementedError(
                f"{self!r}: built for {count} blocks, and must know the lengths it is "
                f"used with, got symbolic ones: {query_length}, {key_length}"
            )
        drawn = self.name == "random_blocks"
        length = max(query_length, key_length) if drawn else query_length
        if length > count * self.block_size:
            raise ValueError(
                f"{self!r}: built for {count} blocks, {count * self.block_size} "
                f"positions, used with length {length}; it needs "
                f"{-(-length // self.block_size)} blocks"
            )
        return tuple(
            Operand(_lift(a)[..., None, None, :, :], payload=2)
            for a in (self.rows, self.cols)
            if a is not None
        )

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        table = operands[0][0, 0]
        query_block = tile.query_positions[:, 0] // self.block_size
        key_block = tile.key_positions // self.block_size
        known = (query_block >= 0) & (query_block < table.shape[0])
        listed = table[jnp.clip(query_block, 0, table.shape[0] - 1)]
        listed = jnp.where(known[:, None], listed, -1)
        result = jnp.zeros((1, 1), bool)
        for r in range(table.shape[1]):
            entry = listed[:, r : r + 1]
            result = result | ((entry == key_block) & (entry >= 0))
        return result

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        size = self.block_size
        known = rows.side == "query" or len(operands) == 2
        if known:
            listed = operands[0 if rows.side == "query" else 1][:, :, 0, 0]
            exact = namespace(listed).ones_like(listed, bool)
            listed = _Listed(listed, listed, exact)
        else:
            listed = _columns(operands[0][:, :, 0, 0], -(-rows.length // size))
        entries = listed.first.shape[-2]
        xp = namespace(*listed, rows.lo)
        # A block of rows spans this many blocks of the layout; one more if unaligned.
        aligned = rows.size % size == 0 or size % rows.size == 0
        span = -(-rows.size // size) + (not (aligned and rows.starts_at_zero))
        first, last = rows.rows_lo // size, rows.rows_hi // size
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
        most = FAR // size
        there = there & (listed.first >= 0) & (listed.first <= most)
        lo = xp.where(there, listed.first, 0) * size
        hi = plus(xp.minimum(xp.where(there, listed.last, 0), most) * size, size)
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
        if span > 1 or size < cols.size:
            return cols.touched(lo, hi), nothing(lo)
        return cols.touched(lo, hi), cols.covered(lo, xp.where(sure, hi, lo))

    def __repr__(self) -> str:
        rows = arguments.describe(self.rows)
        return f"{self.name}({rows}, block_size={self.block_size})"


def _lift(table: ArrayLike) -> ArrayLike:
    """The layout; one without an axis of heads gets one."""
    return table[None] if table.ndim == 2 else table


def blocks(indices: ArrayLike, block_size: int) -> Mask:
    """Each block of queries sees the key blocks that are listed for it.

    Hugging Face's BigBird draws its random blocks as such a list.

    Args:
        indices: integers ``[n, R]``, ``[N, n, R]`` or ``[*batch, N, n, R]``: the R key
            blocks that each of n query blocks sees; -1 = none.
        block_size: positions in a block.

    Example:
        >>> layout = blocks(np.array([[1], [0]]), block_size=2)
        >>> print(layout.to_dense(4).astype(int)[0, 0])
        [[0 0 1 1]
         [0 0 1 1]
         [1 1 0 0]
         [1 1 0 0]]
    """
    indices = arguments.integers("indices", indices)
    if indices.ndim < 2:
        raise ValueError(
            f"indices: expected [..., query blocks, R], got shape {indices.shape}"
        )
    if indices.shape[-2] == 0:
        raise ValueError(
            f"indices: expected at least one query block, got shape {indices.shape}"
        )
    block_size = size_argument("block_size", block_size, 1)
    if indices.shape[-1] == 0:
        # No block sees any: one entry of -1 means the same.
        nothing_listed = [(0, 0)] * (indices.ndim - 1) + [(0, 1)]
        indices = namespace(indices).pad(indices, nothing_listed, constant_values=-1)
    return BlockLayout(indices, None, block_size, "blocks")


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


def _columns(table: ArrayLike, count: int) -> _Listed:
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


def random_blocks(
    rng: ArrayLike | int, blocks_per_row: int, block_size: int, num_blocks: int
) -> Mask:
    """Each block of queries sees a few blocks of keys, drawn at random.

    The pattern is a pure function of ``rng`` and ``num_blocks``, not of the length in
    use: a longer sequence keeps the blocks of a shorter one. Every block is seen
    equally often: query block i sees key blocks ``b[(a[i] + c_r) mod n]`` for two
    random permutations a, b and ``blocks_per_row`` distinct random shifts c_r.

    Args:
        rng: a JAX PRNG key (a new one does not recompile) or an int.
        blocks_per_row: R, how many key blocks each query block sees.
        block_size: positions in a block.
        num_blocks: n, blocks in the longest sequence; longer arrays are refused, and
            positions beyond it (by an offset, in a cache) see no random block.

    Raises:
        TypeError: if ``rng`` is neither a key nor an int.
        ValueError: if ``blocks_per_row`` exceeds ``num_blocks``, or a seed does not fit
            32 bits.

    References:
        Zaheer et al., "Big Bird", 2020, section 2 (there, blocks of each row are drawn
        independently).
    """
    num_blocks = size_argument("num_blocks", num_blocks, 1)
    blocks_per_row = size_argument("blocks_per_row", blocks_per_row, 1)
    if blocks_per_row > num_blocks:
        raise ValueError(
            f"blocks_per_row: expected at most num_blocks={num_blocks}, "
            f"got {blocks_per_row}"
        )
    key: Any = rng
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        if not -(2**31) <= rng < 2**32:
            raise ValueError(f"rng: expected a seed of 32 bits, got {rng}")
        key = jax.random.key(int(rng))
    arguments.prng_key("rng", key, "; jax.random.key makes one, and an int is a seed")
    block_size = size_argument("block_size", block_size, 1)
    rows, cols = _draw(key, num_blocks, blocks_per_row)
    return BlockLayout(rows, cols, block_size, "random_blocks")


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _draw(rng: Array, num_blocks: int, blocks_per_row: int) -> tuple[Array, Array]:
    """Key blocks of each query block ``[n, R]``, and query blocks of each key block."""
    first, second, third = jax.random.split(as_threefry(rng), 3)
    a = jax.random.permutation(first, num_blocks)
    b = jax.random.permutation(second, num_blocks)
    shifts = jax.random.permutation(third, num_blocks)[:blocks_per_row]
    rows = b[(a[:, None] + shifts[None]) % num_blocks]
    cols = jnp.argsort(a)[(jnp.argsort(b)[:, None] - shifts[None]) % num_blocks]
    return rows.astype(jnp.int32), cols.astype(jnp.int32)
