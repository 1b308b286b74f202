"""Masks that list blocks: given layouts, and random ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.arguments import integers
from attnlab.masks.base import Bounds, Mask
from attnlab.masks.data import describe
from attnlab.masks.geometry import Blocks
from attnlab.masks.intervals import FAR, namespace, numbers, plus
from attnlab.masks.structural import nothing, size_argument
from attnlab.prng import as_threefry
from attnlab.types import Array, Operand, PyTree, Tile, pytree, static


@pytree
class BlockLayout(Mask):
    """Each block of queries sees the blocks of keys that are listed for it.

    ``rows [..., n, R]`` lists key blocks for each query block, ``cols [..., m, R']``
    query blocks for each key block; -1 = none. Where ``rows`` is traced, ``cols`` are
    made for the length in use, and may say nothing of key blocks beyond.
    """

    rows: Any
    cols: Any
    block_size: int = static()
    name: str = static()
    traced: bool = static(default=False)

    @property
    def grain(self) -> int:
        """See :class:`Mask`."""
        return self.block_size

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`Mask`."""
        count = self.rows.shape[-2]
        drawn = self.name == "random_blocks"
        length = max(query_length, key_length) if drawn else query_length
        if length > count * self.block_size:
            raise ValueError(
                f"{self!r}: built for {count} blocks, {count * self.block_size} "
                f"positions, used with length {length}; it needs "
                f"{-(-length // self.block_size)} blocks"
            )
        cols = self.cols
        if self.traced:
            cols = _traced_columns(self.rows, -(-key_length // self.block_size))
        return tuple(
            Operand(_lift(a)[..., None, None, :, :], payload=2)
            for a in (self.rows, cols)
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
        table = operands[0 if rows.side == "query" else 1][:, :, 0, 0]
        size, entries = self.block_size, table.shape[-2]
        xp = namespace(table, rows.lo)
        # A block of rows spans this many blocks of the layout, or one more if askew.
        aligned = rows.size % size == 0 or size % rows.size == 0
        span = -(-rows.size // size) + (not (aligned and rows.starts_at_zero))
        first, last = rows.rows_lo // size, rows.rows_hi // size
        wanted = first + numbers(span, first.ndim)
        known = (wanted >= 0) & (wanted <= last) & (wanted < entries)
        index = xp.clip(wanted, 0, entries - 1)
        lead = np.broadcast_shapes(table.shape[:2], index.shape[:2])
        index = xp.broadcast_to(index, lead + index.shape[2:])
        table = xp.broadcast_to(table, lead + table.shape[2:])
        flat = index.reshape(lead + (-1, 1))
        listed = xp.take_along_axis(table, flat, axis=2)
        listed = listed.reshape(index.shape + table.shape[-1:])
        listed = xp.where(known[..., None], listed, -1)
        listed = listed.reshape(lead + (rows.count, -1))
        lo = listed * size
        hi = plus(lo, size)
        hi = xp.where(listed < 0, lo, hi)
        if rows.offset is None:
            # Positions given one by one may lie farther apart: any block may be seen.
            far = last - first >= span
            lo, hi = xp.where(far, 0, lo), xp.where(far, FAR, hi)
        beyond = last >= entries
        if self.traced and rows.side == "key":
            # Whoever lists it, unknown.
            lo, hi = xp.where(beyond, 0, lo), xp.where(beyond, FAR, hi)
            last = xp.where(beyond, first + 1, last)
        if span > 1 or size < cols.size:
            return cols.touched(lo, hi), nothing(lo)
        sure = xp.where(first == last, hi, lo)
        return cols.touched(lo, hi), cols.covered(lo, sure)

    def __repr__(self) -> str:
        return f"{self.name}({describe(self.rows)}, block_size={self.block_size})"


def _lift(table: Any) -> Any:
    """A layout without a head axis gets one."""
    return table[None] if table.ndim == 2 else table


def blocks(indices: Any, block_size: int) -> Mask:
    """A given block layout, as Hugging Face BigBird draws one.

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
    indices = integers("indices", indices)
    if indices.ndim < 2:
        raise ValueError(
            f"indices: expected [..., query blocks, R], got shape {indices.shape}"
        )
    block_size = size_argument("block_size", block_size, 1)
    if isinstance(indices, jax.core.Tracer):
        return BlockLayout(indices, None, block_size, "blocks", traced=True)
    return BlockLayout(indices, _columns(np.asarray(indices)), block_size, "blocks")


def _traced_columns(indices: Array, count: int) -> Array:
    """Query blocks for each of the first key blocks, padded: any may list any."""
    listed = indices[..., None] == numbers(count, indices.ndim + 1)
    listed = listed.any(-2).swapaxes(-1, -2)
    return jnp.where(listed, numbers(listed.shape[-1], listed.ndim), -1)


def _columns(indices: np.ndarray) -> np.ndarray:
    """Query blocks for each key block, ``[..., max(indices) + 1, most]``, padded."""
    count = max(int(indices.max(initial=-1)) + 1, 1)
    listed = np.stack([(indices == j).any(-1) for j in range(count)], -2)
    most = max(int(listed.sum(-1).max(initial=0)), 1)
    order = np.argsort(~listed, axis=-1, kind="stable")[..., :most]
    found = np.take_along_axis(listed, order, -1)
    return np.where(found, order, -1).astype(np.int32)


def random_blocks(
    rng: Any, blocks_per_row: int, block_size: int, num_blocks: int
) -> Mask:
    """Each block of queries sees a few blocks of keys, drawn at random.

    The pattern is a pure function of ``rng`` and ``num_blocks``, not of the length in
    use, so a prefix stays a prefix. Every block is seen equally often: query block i
    sees key blocks ``b[(a[i] + c_r) mod n]`` for two random permutations a, b and
    ``blocks_per_row`` distinct random shifts c_r.

    Args:
        rng: a JAX PRNG key (traced or not: another one does not recompile) or an int.
        blocks_per_row: R, key blocks for each query block.
        block_size: positions in a block.
        num_blocks: n, blocks in the longest sequence; longer arrays are refused, and
            positions beyond it (by an offset, in a cache) see no random block.

    Raises:
        ValueError: if ``blocks_per_row`` exceeds ``num_blocks``.

    References:
        Zaheer et al., "Big Bird", 2020, section 2 (there drawn independently a row).
    """
    num_blocks = size_argument("num_blocks", num_blocks, 1)
    blocks_per_row = size_argument("blocks_per_row", blocks_per_row, 1)
    if blocks_per_row > num_blocks:
        raise ValueError(
            f"blocks_per_row: expected at most num_blocks={num_blocks}, "
            f"got {blocks_per_row}"
        )
    rng = as_threefry(jax.random.key(rng) if isinstance(rng, int) else rng)
    first, second, third = jax.random.split(rng, 3)
    a = jax.random.permutation(first, num_blocks)
    b = jax.random.permutation(second, num_blocks)
    shifts = jax.random.permutation(third, num_blocks)[:blocks_per_row]
    rows = b[(a[:, None] + shifts[None]) % num_blocks]
    cols = jnp.argsort(a)[(jnp.argsort(b)[:, None] - shifts[None]) % num_blocks]
    return BlockLayout(
        rows.astype(jnp.int32),
        cols.astype(jnp.int32),
        size_argument("block_size", block_size, 1),
        "random_blocks",
    )
