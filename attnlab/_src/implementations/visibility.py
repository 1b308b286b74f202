"""How a kernel evaluates a mask: by its rule if that is elementwise, else by bits.

Other masks reach the kernel as bits, which XLA computes for partial blocks.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.exact import exactly
from attnlab._src.implementations.elementwise import Knows, mask_is_elementwise
from attnlab._src.implementations.schedule import Row, Tiles
from attnlab._src.masks.base import And, Mask, Not, Or
from attnlab._src.masks.rule import checked_visible, visible_pairs
from attnlab._src.types import Array, PyTree, Tile

#: Number of keys whose bits share a word.
WORD = 32


class Readers(Protocol):
    """The arrays of a kernel, which it reads by number."""

    def add(self, x: Array) -> int:
        """Adds an operand ``[B or 1, N or 1, T or 1, S or 1]``; returns its number."""
        ...

    def add_words(self, words: Array) -> int:
        """Adds bits ``[B or 1, N or 1, keys / WORD, queries]``; returns the number."""
        ...


#: ``visible(tile, read) -> bool``, in the orientation of the tile; ``read(number)``
#: reads an operand.
Visible = Callable[[Tile, Callable[[int], Array]], Array]


def visibility(
    mask: Mask,
    operands: PyTree,
    readers: Readers,
    make_bits: Callable[..., Array],
    knows: Knows = mask_is_elementwise,
) -> Visible:
    """A function that evaluates the mask in a kernel.

    Args:
        mask: the mask without its arrays.
        operands: its operands.
        readers: the arrays that it reads are added to these.
        make_bits: ``(mask, operands) -> words``, for a part that it does not know.
        knows: which parts it knows.
    """
    if exactly(mask, And, Or):
        parts = [
            visibility(m, o, readers, make_bits, knows)
            for m, o in zip(mask.parts, operands, strict=True)
        ]
        join = jnp.logical_and if exactly(mask, And) else jnp.logical_or
        return lambda tile, read: functools.reduce(join, [p(tile, read) for p in parts])
    if exactly(mask, Not):
        part = visibility(mask.part, operands, readers, make_bits, knows)
        # JAX 0.12 cannot compile ``~`` of booleans for GPUs.
        return lambda tile, read: part(tile, read) ^ True
    if not knows(mask, operands):
        number = readers.add_words(make_bits(mask, operands))
        return lambda tile, read: read(number)
    numbers = jax.tree.map(readers.add, operands)
    return lambda tile, read: checked_visible(mask, tile, jax.tree.map(read, numbers))


def bits(mask: Mask, operands: PyTree, tiles: Tiles) -> Array:
    """A mask as bits, in words of ``WORD`` keys for each query.

    Args:
        mask: the mask without its arrays.
        operands: its operands.
        tiles: tiles of the inputs, with the plan. Its columns, if it has them, say
            which blocks are partial; its rows may differ.

    Returns:
        int32 ``[B or 1, N or 1, keys / WORD, queries]``, zero outside partial blocks.
    """
    inputs, plan = tiles.inputs, tiles.plan
    by_key = plan.cols is not None
    partial = (plan.cols or plan.rows).partial
    lo, hi = (jnp.asarray(x, jnp.int32) for x in partial)
    operands = jax.tree.map(tiles.pad, operands)
    positions = (
        tiles.pad(inputs.query_positions, -1),
        tiles.pad(inputs.key_positions, -1),
    )
    leaves = [*positions, lo, *jax.tree.leaves(operands)]
    batch = max(x.shape[0] for x in leaves)
    heads = max(mask.head_count, *(x.shape[1] for x in leaves))
    shape = batch, heads, tiles.nk * tiles.bk // WORD, tiles.nq * tiles.bq
    words = jnp.zeros(shape, jnp.int32)
    shift = jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]
    lines, bounds = lo.shape[2:]
    if bounds == 0:
        return words

    def interval(number: Array, words: Array) -> Array:
        """Fills the partial blocks of one interval of a row or column of the plan."""
        line = number // bounds
        example, head = line // (heads * lines), line // lines % heads
        line = line % lines
        at = (example if lo.shape[0] > 1 else 0, head if lo.shape[1] > 1 else 0, line)
        first, stop = lo[at][number % bounds], hi[at][number % bounds]

        def block(other: Array, words: Array) -> Array:
            row, col = (other, line) if by_key else (line, other)
            where = Row(example, head, row)
            t, s, own = jax.tree.map(
                lambda x: tiles.cut(x, where, col[None]), (*positions, operands)
            )
            seen = visible_pairs(mask, Tile(t, s, head), own)
            seen = jnp.broadcast_to(seen, (tiles.bq, tiles.bk)).T
            seen = seen.reshape(-1, WORD, tiles.bq).astype(jnp.uint32)
            found = (seen << shift).sum(1, dtype=jnp.uint32)
            found = lax.bitcast_convert_type(found, jnp.int32)[None, None]
            start = example, head, col * (tiles.bk // WORD), row * tiles.bq
            start = [jnp.asarray(n, jnp.int32) for n in start]
            return lax.dynamic_update_slice(words, found, start)

        return lax.fori_loop(first, stop, block, words)

    count = batch * heads * lines * bounds
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), interval, words)
