"""Masks that list blocks: given layouts, and random ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.base import Mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import namespace
from attnlab._src.masks.lists import bounds_of_lists, listed_in, searchable
from attnlab._src.masks.rule import Bounds
from attnlab._src.masks.structural import size_argument
from attnlab._src.prng import as_threefry
from attnlab._src.types import (
    Array,
    ArrayLike,
    Operand,
    PyTree,
    Tile,
    pytree,
    static,
)


@pytree
class BlockLayout(Mask):
    """Each block of queries sees the blocks of keys that are listed for it.

    ``rows [..., n, R]`` lists key blocks for each query block; -1 = none. ``cols [...,
    m, R']`` lists query blocks for each key block; where it is None, a plan finds them.
    """

    rows: ArrayLike
    cols: ArrayLike | None
    query_block: int = static()
    key_block: int = static()
    name: str = static()

    @property
    def block_multiples(self) -> tuple[int, int]:
        """See :class:`Mask`."""
        return self.query_block, self.key_block

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
        if length > count * self.query_block:
            raise ValueError(
                f"{self!r}: built for {count} blocks, {count * self.query_block} "
                f"positions, used with length {length}; it needs "
                f"{-(-length // self.query_block)} blocks"
            )
        tables = [_lift(x) for x in (self.rows, self.cols) if x is not None]
        tables[0] = searchable(tables[0])
        return tuple(Operand(x[..., None, None, :, :], payload=2) for x in tables)

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`Mask`."""
        table = operands[0][0, 0]
        query_block = tile.query_positions[:, 0] // self.query_block
        key_block = tile.key_positions // self.key_block
        known = (query_block >= 0) & (query_block < table.shape[0])
        listed = table[jnp.clip(query_block, 0, table.shape[0] - 1)]
        return listed_in(jnp.where(known[:, None], listed, -1), key_block)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`Mask`."""
        tables = [operand[:, :, 0, 0] for operand in operands]
        return bounds_of_lists(tables, self.block_multiples, rows, cols)

    def __repr__(self) -> str:
        rows, sizes = arguments.describe(self.rows), (self.query_block, self.key_block)
        if sizes[0] == sizes[1]:
            return f"{self.name}({rows}, block_size={sizes[0]})"
        return f"{self.name}({rows}, query_block={sizes[0]}, key_block={sizes[1]})"


def _lift(table: ArrayLike) -> ArrayLike:
    """The layout; one without an axis of heads gets one."""
    return table[None] if table.ndim == 2 else table


def blocks(
    indices: ArrayLike,
    block_size: int | None = None,
    *,
    query_block: int | None = None,
    key_block: int | None = None,
) -> Mask:
    """Each block of queries sees the key blocks that are listed for it.

    Query blocks are of positions, whatever call they occur in; :func:`selected` is for
    lists that are made for the queries of one call. Indices are data: others of the
    same shape do not recompile.

    Args:
        indices: integers ``[n, R]``, ``[heads, n, R]`` or ``[*batch, heads, n, R]``:
            the R key blocks that each of n query blocks sees; -1 = none. A block may be
            listed twice, in any order; one beyond the keys is an error where its number
            is known, and is not there within ``jit``. ``heads`` is 1, N, or K: then the
            query heads that share a key head share its blocks.
        block_size: positions in a block.
        query_block: queries in a block, if it differs from ``key_block``.
        key_block: keys in a block.

    Raises:
        TypeError: if indices are no integers.
        ValueError: if indices have no axis of query blocks, or sizes are missing.

    Example:
        >>> layout = blocks(np.array([[1], [0]]), block_size=2)
        >>> print(layout.to_dense(4).astype(int)[0, 0])
        [[0 0 1 1]
         [0 0 1 1]
         [1 1 0 0]
         [1 1 0 0]]
        >>> layout = blocks(np.array([[1], [0]]), query_block=1, key_block=2)
        >>> print(layout.to_dense(2, 4).astype(int)[0, 0])
        [[0 0 1 1]
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
    sizes = [query_block, key_block]
    if block_size is not None:
        if sizes != [None, None]:
            raise ValueError(
                "block_size: give it alone, or query_block and key_block, got "
                f"block_size={block_size}, query_block={query_block}, "
                f"key_block={key_block}"
            )
        sizes = [size_argument("block_size", block_size, 1)] * 2
    query_size, key_size = (
        size_argument(name, size, 1)
        for name, size in zip(("query_block", "key_block"), sizes, strict=True)
    )
    if indices.shape[-1] == 0:
        # No block sees any: one entry of -1 means the same.
        nothing_listed = [(0, 0)] * (indices.ndim - 1) + [(0, 1)]
        indices = namespace(indices).pad(indices, nothing_listed, constant_values=-1)
    return BlockLayout(indices, None, query_size, key_size, "blocks")


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
    return BlockLayout(rows, cols, block_size, block_size, "random_blocks")


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
