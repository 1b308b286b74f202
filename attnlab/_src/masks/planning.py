"""Plans of masks: the blocks that a mask leaves alive; and masks as whole arrays."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.intervals import (
    FAR,
    difference,
    first_run,
    merge,
    namespace,
    numbers,
)
from attnlab._src.masks.rule import Rule, checked_visible, visible_pairs
from attnlab._src.operands import tile_shape
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionInputs,
    Intervals,
    Live,
    Operand,
    Plan,
    PyTree,
    Tile,
    skeleton,
)


def normalise(operand: Operand, batch: tuple[int, ...], name: str) -> Any:
    """Brings an operand to ``[B or 1, N, T, S, *payload]``.

    Args:
        operand: as the score, modifier or mask gave it.
        batch: the batch axes of the call, whose product is B.
        name: its name in an error.

    Raises:
        ValueError: if its batch axes do not broadcast to ``batch``.
    """
    if not isinstance(operand, Operand):
        raise TypeError(
            f"{name}: expected operands of attnlab.extend.Operand, got "
            f"{type(operand).__name__}; write (Operand(array),)"
        )
    array, payload = operand
    core = 3 + payload
    if array.ndim < core:
        array = array.reshape((1,) * (core - array.ndim) + array.shape)
    lead, rest = array.shape[: array.ndim - core], array.shape[array.ndim - core :]
    few = len(lead) <= max(len(batch), 1)
    if few and all(n == 1 for n in lead):
        return array.reshape((1, *rest))
    try:
        if not few or jnp.broadcast_shapes(lead, batch) != batch:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{name}: shape {tuple(array.shape)} does not fit batch axes {batch}"
        ) from None
    array = namespace(array).broadcast_to(array, batch + rest)
    return array.reshape((math.prod(batch), *rest))


def normalise_tree(tree: PyTree, batch: tuple[int, ...], name: str) -> PyTree:
    """``normalise`` for every ``Operand`` of a pytree."""
    return jax.tree.map(
        lambda o: normalise(o, batch, name),
        tree,
        is_leaf=lambda x: isinstance(x, Operand),
    )


def index_blocks(side: str, length: int, size: int, offset: Any = 0) -> Blocks:
    """Blocks of slots whose positions are ``offset + slot``; offset scalar or [B]."""
    xp = namespace(offset)
    offset = xp.asarray(offset, dtype=np.int32).reshape(-1)
    offset = xp.maximum(offset, -FAR)  # -FAR can be negated in int32, -FAR - 1 cannot
    starts = np.arange(0, length, size, dtype=np.int32)
    stops = np.minimum(starts + size, length) - 1
    # Slots with positions below 0 are empty.
    lo, hi = (
        xp.clip(offset[:, None], -1 - ends[None], FAR - ends[None]) + ends[None]
        for ends in (starts, stops)
    )
    return Blocks(side, size, length, lo, hi, offset)


def position_blocks(side: str, positions: ArrayLike, size: int) -> Blocks:
    """Blocks of slots whose positions are given, ``[B or 1, length]``; -1 = empty."""
    length = positions.shape[-1]
    blocks = Blocks(side, size, length, None, None, None)
    known = namespace(positions).where(positions < 0, FAR, positions)
    lo = blocks.reduce(known, 1, "min", FAR)
    hi = blocks.reduce(positions, 1, "max", -1)
    occupied = blocks.reduce(positions >= 0, 1, "all", True)
    return dataclasses.replace(blocks, lo=lo, hi=hi, occupied=occupied)


def blocks_of(
    query_positions: Array,
    key_positions: Array,
    position_kinds: tuple[str, str],
    sizes: tuple[int, int],
) -> tuple[Blocks, Blocks]:
    """The blocks of queries and of keys, of at most the given sizes.

    Args:
        query_positions: ``[B or 1, 1, T, 1]``.
        key_positions: ``[B or 1, 1, 1, S]``.
        position_kinds: see ``AttentionInputs``.
        sizes: queries and keys in a block.
    """
    t, s = query_positions.shape[2], key_positions.shape[3]
    size_q, size_k = max(min(sizes[0], t), 1), max(min(sizes[1], s), 1)
    if position_kinds[0] == "given":
        query = position_blocks("query", query_positions[:, 0, :, 0], size_q)
    else:
        offset = query_positions[:, 0, 0, 0] if position_kinds[0] == "offset" else 0
        query = index_blocks("query", t, size_q, offset)
    if position_kinds[1] == "given":
        key = position_blocks("key", key_positions[:, 0, 0, :], size_k)
    else:
        offset = key_positions[:, 0, 0, 0] if position_kinds[1] == "offset" else 0
        key = index_blocks("key", s, size_k, offset)
    return query, key


def plan_of(inputs: AttentionInputs, sizes: tuple[int, int], cols: bool) -> Plan:
    """The plan of canonical inputs.

    Args:
        inputs: the canonical record.
        sizes: queries and keys in a block, at most.
        cols: whether the transpose is wanted, too.
    """
    query, key = blocks_of(
        inputs.query_positions, inputs.key_positions, inputs.position_kinds, sizes
    )
    return make_plan(inputs.mask, inputs.mask_operands, query, key, cols)


def _live(mask: Rule, rows: Blocks, cols: Blocks, operands: PyTree) -> Live:
    possible, certain = mask.bounds(rows, cols, operands)
    certain = merge(certain)
    certain = _without_empty(certain, rows, cols)
    if rows.side == "key" and rows.length % rows.size:
        # An incomplete last block of keys is never full, be it a column or a row.
        last = numbers(rows.count, certain.lo.ndim - 1)[..., None] == rows.count - 1
        xp = namespace(*certain)
        certain = Intervals(certain.lo, xp.where(last, certain.lo, certain.hi))
    xp = namespace(*possible, *certain)
    arrays = (*possible, *certain)
    lead = jnp.broadcast_shapes((1, 1, rows.count), *(x.shape[:-1] for x in arrays))
    arrays = [xp.broadcast_to(x, lead + x.shape[-1:]).astype(np.int32) for x in arrays]
    possible, certain = Intervals(*arrays[:2]), Intervals(*arrays[2:])
    return Live(certain, difference(possible, certain))


def _without_empty(certain: Intervals, rows: Blocks, cols: Blocks) -> Intervals:
    """Removes blocks with empty slots, which are not full whatever the mask says."""
    if not rows.starts_at_zero:
        whole = rows.rows_lo >= 0
        if rows.offset is None:
            whole = rows.occupied[:, None, :, None]
        xp = namespace(*certain, whole)
        certain = Intervals(certain.lo, xp.where(whole, certain.hi, certain.lo))
    if cols.starts_at_zero:
        return certain
    if cols.offset is None:
        first, last = first_run(cols.occupied[:, None, None])
    else:
        first = namespace(cols.offset).maximum(-(cols.offset // cols.size), 0)
        first, last = first[:, None, None, None], cols.count
    xp = namespace(*certain, first)
    lo, hi = xp.maximum(certain.lo, first), xp.minimum(certain.hi, last)
    return Intervals(lo, xp.maximum(lo, hi))


def make_plan(
    mask: Rule, operands: PyTree, query: Blocks, key: Blocks, cols: bool = True
) -> Plan:
    """The plan of a mask over given blocks.

    Args:
        mask: the mask (or its skeleton).
        operands: its operands, normalised.
        query: the blocks of queries.
        key: the blocks of keys.
        cols: whether the transpose is wanted, too.
    """
    numbered = all(isinstance(b.offset, np.ndarray) for b in (query, key))
    if numbered and key.starts_at_zero and not jax.tree.leaves(operands):
        offset = tuple(query.offset.tolist())
        return _static_plan(
            skeleton(mask),
            query.length,
            key.length,
            query.size,
            key.size,
            offset,
            cols,
        )
    return Plan(
        _live(mask, query, key, operands),
        _live(mask, key, query, operands) if cols else None,
        block_q=query.size,
        block_k=key.size,
        query_length=query.length,
        key_length=key.length,
    )


@functools.lru_cache(maxsize=256)
def _static_plan(
    mask: Rule, t: int, s: int, block_q: int, block_k: int, offset: tuple, cols: bool
) -> Plan:
    operands = mask.operands(t, s)
    query = index_blocks("query", t, block_q, np.asarray(offset, np.int32))
    key = index_blocks("key", s, block_k)
    return Plan(
        _live(mask, query, key, operands),
        _live(mask, key, query, operands) if cols else None,
        block_q=block_q,
        block_k=block_k,
        query_length=t,
        key_length=s,
    )


def alone(mask: Rule, t: int, s: int) -> tuple[PyTree, tuple[int, ...]]:
    """Normalised operands of a mask outside of a call, and their batch axes."""
    operands = mask.operands(t, s)
    leaves = jax.tree.leaves(operands, is_leaf=lambda x: isinstance(x, Operand))
    batch = jnp.broadcast_shapes(
        *(o.array.shape[: max(o.array.ndim - 3 - o.payload, 0)] for o in leaves)
    )
    return normalise_tree(operands, batch, "mask"), batch


def lengths_of(query_length: Any, key_length: Any) -> tuple[int, int]:
    """T and S; S is T if not given.

    Raises:
        TypeError: if one is no int.
        ValueError: if one is negative.
    """
    t = arguments.size("query_length", query_length, 0)
    return t, t if key_length is None else arguments.size("key_length", key_length, 0)


def plan_mask(
    mask: Rule, t: int, s: int | None, block_size: int | tuple[int, int]
) -> Plan:
    """See ``Mask.plan``."""
    t, s = lengths_of(t, s)
    given = block_size if isinstance(block_size, (tuple, list)) else [block_size] * 2
    if len(given) != 2:
        raise ValueError(
            f"block_size: expected an int, or two (for queries, for keys), got "
            f"{block_size}"
        )
    block_q, block_k = (arguments.size("block_size", n) for n in given)
    operands, _ = alone(mask, t, s)
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(operands)):
        operands = jax.tree.map(np.asarray, operands)
    return make_plan(
        mask,
        operands,
        index_blocks("query", t, block_q),
        index_blocks("key", s, block_k),
    )


def visible(inputs: AttentionInputs) -> Array:
    """The whole mask as an array in memory, boolean ``[B or 1, N or 1, T, S]``.

    Args:
        inputs: the canonical record.
    """
    return dense_visible(
        inputs.mask,
        inputs.mask_operands,
        inputs.query_positions,
        inputs.key_positions,
    )


def dense_visible(
    mask: Rule, operands: PyTree, query_positions: Array, key_positions: Array
) -> Array:
    """The whole mask as an array, boolean ``[B or 1, N or 1, T, S]``."""
    leaves = [*jax.tree.leaves(operands), query_positions, key_positions]
    batch = next((x.shape[0] for x in leaves if x.shape[0] != 1), 1)
    heads = max([x.shape[1] for x in leaves] + [mask.head_count])

    def one(operands: PyTree, q: Array, k: Array, head: Array) -> Array:
        tile = Tile(q, k, head)
        shape = (q.shape[0], k.shape[1])
        return jnp.broadcast_to(visible_pairs(mask, tile, operands), shape)

    def each(operands: PyTree, q: Array, k: Array, head: Array) -> Array:
        axes, operands = shared_axes(operands)
        return jax.vmap(one, (axes, None, None, 0), axis_size=heads)(
            operands, q, k, head
        )

    arrays = (operands, query_positions[:, 0], key_positions[:, 0])
    axes, arrays = shared_axes(arrays)
    index = jnp.arange(heads, dtype=jnp.int32)
    run = jax.vmap(lambda a: each(a[0], a[1], a[2], index), (axes,), axis_size=batch)
    return run(arrays)


def shared_axes(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Axes for ``jax.vmap``, and the arrays: a first axis of 1 means shared."""
    axes = jax.tree.map(lambda x: None if x.shape[0] == 1 else 0, tree)
    return axes, jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x, tree)


def reads_head(mask: Rule, operands: PyTree) -> bool:
    """Whether a mask's ``visible`` reads the head, as a user's own may.

    It traces a small tile and computes nothing, whatever implementation will run.

    Args:
        mask: the mask.
        operands: its operands, normalised.

    Raises:
        TypeError, ValueError: if ``visible`` fails, yields what is not boolean or of
            another shape, or reads a traced array that is no operand.
    """
    mask = skeleton(mask)

    def visible(tile: Tile, operands: PyTree) -> Array:
        return checked_visible(mask, tile, operands)

    shapes = (2, 1), (1, 3), ()
    tile = Tile(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes))
    tiles = jax.tree.map(lambda x: tile_shape(x, (2, 3)), operands)
    traced = jax.make_jaxpr(visible)(tile, tiles)
    if any(isinstance(x, jax.core.Tracer) for x in traced.consts):
        raise TypeError(
            f"mask: {mask!r} reads a traced array that is none of its operands; give "
            "it as one: predicate(fn, array) passes its tile to fn"
        )
    head = traced.jaxpr.invars[2]
    steps = traced.jaxpr.eqns
    read = [*traced.jaxpr.outvars, *(x for step in steps for x in step.invars)]
    return any(x is head for x in read)


def slot_operand(length: int, axis: int) -> Array:
    """Slot numbers along axis 2 or 3 of an operand."""
    slots = jnp.arange(length, dtype=jnp.int32)
    return slots[None, None, :, None] if axis == 2 else slots[None, None, None, :]


def dense_mask(mask: Rule, t: int, s: int | None) -> Array:
    """See ``Mask.to_dense``."""
    t, s = lengths_of(t, s)
    operands, _ = alone(mask, t, s)
    result = dense_visible(mask, operands, slot_operand(t, 2), slot_operand(s, 3))
    plain = not jax.tree.leaves(operands) and result.shape[:2] == (1, 1)
    return result[0, 0] if plain else result
