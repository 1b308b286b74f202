"""From validated arguments to the canonical record that implementations take."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab._src import arguments, placement
from attnlab._src.implementations.deferred import zero_dead
from attnlab._src.implementations.tile import check_tile, precision_of
from attnlab._src.masks.intervals import FAR
from attnlab._src.masks.liveness import alive, alive_by_pairs
from attnlab._src.masks.planning import (
    blocks_of,
    normalise,
    normalise_tree,
    reads_head,
)
from attnlab._src.ops.validate import (
    Arguments,
    Settings,
    check_operand_shapes,
    is_wide_float,
)
from attnlab._src.prng import as_threefry
from attnlab._src.scores.projected import unwrapped
from attnlab._src.types import (
    Array,
    AttentionInputs,
    Operand,
    PyTree,
    Score,
    accumulation_dtype,
    skeleton,
)

#: Slots in the blocks by which liveness is decided.
_ALIVE_BLOCK = 512
#: The least size of those that divide a mask's ``block_multiples``: smaller blocks
#: would make a plan too large.
_FINEST_ALIVE_BLOCK = 32


def prepare(args: Arguments, settings: Settings) -> AttentionInputs:
    """Canonical form: 4-D projected arrays, normalised operands, dead slots marked."""
    precision, dropout_rate = settings.precision, settings.dropout_rate
    batch = args.query.shape[:-3]
    query, key, value = (
        x.reshape((math.prod(batch), *x.shape[-3:]))
        for x in (args.query, args.key, args.value)
    )
    t, heads = query.shape[1:3]
    s, key_heads = key.shape[1:3]
    seen = what_is_seen(args, batch, heads, t, s)
    modifier_operands = tuple(
        normalise_tree(m.operands(), batch, f"modifiers: {type(m).__name__}")
        for m in args.modifiers
    )
    modifier_operands = _of_own_heads(modifier_operands, heads)
    check_operand_shapes(modifier_operands, (heads, t, s), "modifiers")
    query_positions, key_positions = seen.query_positions, seen.key_positions
    query_alive, key_alive = seen.query_alive, seen.key_alive
    if key_alive is not None and key_alive.shape[1] > key_heads:
        # Query heads of one group share a key head.
        grouped = key_alive.reshape(key_alive.shape[0], key_heads, -1, s)
        key_alive = grouped.any(2)
    score, logit_scale, head_scale = _without_scale(args.score, query)
    # Kernels skip dead slots when they read; a projection needs zeros there.
    name = type(args.score).__name__
    projected = _project(score, query, key, name, precision)
    has_dead = query_alive is not None or key_alive is not None
    if has_dead and not (projected[0] is query and projected[1] is key):
        clean = zero_dead(query, query_alive), zero_dead(key, key_alive)
        projected = _project(score, *clean, name, precision)
        query_alive = None
    query, key = projected

    words = None
    if dropout_rate > 0:
        cells, first = (1, 1), (0, 0)
        if not settings.shared_dropout:
            cells = query.shape[0], heads
            first = tuple(map(placement.first_of_shard, ("batch", "heads"), cells))
        words = _dropout_words(
            args.dropout_rng, *cells, query_positions, key_positions, *first
        )
    inputs = AttentionInputs(
        query,
        key,
        value,
        jax.tree.map(lambda x: _pair_operand(x, heads), args.score.pair_params()),
        modifier_operands,
        seen.operands,
        query_positions,
        key_positions,
        words,
        (query_alive, key_alive),
        head_scale,
        score=skeleton(args.score),
        modifiers=skeleton(args.modifiers),
        mask=skeleton(args.mask),
        dropout_rate=dropout_rate,
        precision=precision,
        needs_lse=settings.stats or args.sinks is not None,
        position_kinds=position_kinds_of(args),
        logit_scale=logit_scale,
    )
    if inputs.modifiers or not inputs.score.is_inner_product:
        check_tile(inputs)
    return inputs


def _of_own_heads(operands: PyTree, heads: int) -> PyTree:
    """Normalised operands, of this device's heads alone inside a ``shard_map``."""
    return jax.tree.map(lambda x: placement.of_own_heads(x, heads, 1), operands)


class Seen(NamedTuple):
    """Which slots a mask leaves alive.

    Attributes:
        operands: operands of the mask, normalised.
        query_positions: ``[B or 1, N or 1, T, 1]``.
        key_positions: ``[B or 1, 1, 1, S]``.
        query_alive: ``[B or 1, N or 1, T]``; None: every query sees something.
        key_alive: ``[B or 1, N or 1, S]``; None: every key is seen.
    """

    operands: Any
    query_positions: Array
    key_positions: Array
    query_alive: Array | None
    key_alive: Array | None


def what_is_seen(
    args: Arguments, batch: tuple[int, ...], heads: int, t: int, s: int
) -> Seen:
    """Which slots are alive; of ``args``, only mask and positions are read."""
    operands = normalise_tree(args.mask.operands(t, s), batch, "mask")
    operands = _of_own_heads(operands, heads)
    check_operand_shapes(operands, (heads, t, s), "mask")
    args.mask.check_heads(heads)
    operands = jax.lax.stop_gradient(operands)
    query, key = positions_of(args, batch, t, s)
    if reads_head(args.mask, operands) and args.mask.head_count == 1:
        # With positions that run along the heads, plans evaluate each head.
        query = jnp.broadcast_to(query, (query.shape[0], heads, t, 1))
    positions = query, key
    if not isinstance(t, int) or not isinstance(s, int):
        # Without known lengths there is no plan, and only dense implementations run.
        living = alive_by_pairs(args.mask, operands, *positions)
        return Seen(operands, *positions, *living)
    fine = (
        math.gcd(size, _ALIVE_BLOCK)
        for size in args.mask.block_multiples or (_ALIVE_BLOCK, _ALIVE_BLOCK)
    )
    size_q, size_k = (n if n >= _FINEST_ALIVE_BLOCK else _ALIVE_BLOCK for n in fine)
    blocks = blocks_of(*positions, position_kinds_of(args), (size_q, size_k))
    return Seen(operands, *positions, *alive(args.mask, operands, *positions, *blocks))


def position_kinds_of(args: Arguments) -> tuple[str, str]:
    """Where positions come from: see ``AttentionInputs.position_kinds``."""
    query = "index" if args.query_offset is None else "offset"
    query = query if args.query_positions is None else "given"
    return query, "index" if args.key_positions is None else "given"


def positions_of(
    args: Arguments, batch: tuple[int, ...], t: int, s: int
) -> tuple[Array, Array]:
    """Positions as operands: ``[B or 1, 1, T, 1]`` and ``[B or 1, 1, 1, S]``."""
    if args.query_positions is not None:
        positions = arguments.as_int32(args.query_positions)[..., None, :, None]
    else:
        offset = 0 if args.query_offset is None else args.query_offset
        offset = arguments.as_int32(jnp.asarray(offset))[..., None, None, None]
        slots = jnp.arange(t, dtype=jnp.int32).reshape(*[1] * (offset.ndim - 2), t, 1)
        # The same as offset + slots, clipped to the greatest position.
        positions = jnp.minimum(offset, FAR - slots) + slots
    query = normalise(Operand(positions), batch, "query_positions")
    if args.key_positions is not None:
        positions = arguments.as_int32(args.key_positions)[..., None, None, :]
    else:
        positions = jnp.arange(s, dtype=jnp.int32)[None, None, :]
    return query, normalise(Operand(positions), batch, "key_positions")


def project_key(score: Score, key: Array, precision: Any) -> Array:
    """``score.project_key``, in the precision that is asked for.

    Args:
        score: the score.
        key: ``[*batch, S, K, H]``.
        precision: as of :func:`attnlab.attention`.
    """
    with precision_of(precision):
        return score.project_key(key)


def _without_scale(score: Score, query: Array) -> tuple[Score, float, Array | None]:
    """The score without its scale; the scale as a float (or 1.0), as data (or None)."""
    if not score.is_inner_product:
        return score, 1.0, None
    name = type(unwrapped(score)).__name__
    score, scale = score.without_scale(query.shape[-1])
    if isinstance(scale, float):
        return score, scale, None
    heads, scale = query.shape[2], jnp.asarray(scale)
    if scale.shape not in ((), (1,), (heads,)):
        raise ValueError(
            f"score: {name} expected one factor or one for each of {heads} query "
            f"heads, got shape {scale.shape}"
        )
    scale = scale.astype(accumulation_dtype(query.dtype))
    return score, 1.0, scale.reshape(1, -1, 1, 1)


def _project(
    score: Score, query: Array, key: Array, name: str, precision: Any
) -> tuple[Array, Array]:
    with precision_of(precision):
        try:
            projected = score.project_query(query), score.project_key(key)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"score: {name} cannot project query {query.shape} and "
                f"key {key.shape}: {error}"
            ) from error
    for method, before, after in zip(
        ("project_query", "project_key"), (query, key), projected, strict=True
    ):
        if jnp.shape(after)[:-1] != before.shape[:-1]:
            raise ValueError(
                f"score: {name}.{method} makes shape {jnp.shape(after)} of "
                f"{before.shape}, expected {before.shape[:-1]} and one more axis"
            )
        if not is_wide_float(after.dtype):
            raise TypeError(
                f"score: {name}.{method} yields {after.dtype}, expected a floating "
                "dtype of at least 16 bits"
            )
    types = {x.dtype for x in projected}
    wide = {accumulation_dtype(t) for t in types}
    if len(wide) > 1 or len(types - wide) > 1:
        raise TypeError(
            f"score: {name} projects the query to {projected[0].dtype} and the key to "
            f"{projected[1].dtype}; they must agree, unless one is float32 and the "
            "other has 16 bits"
        )
    sizes = [x.shape[-1] for x in projected]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"score: {name} makes query head size {sizes[0]} and key "
            f"head size {sizes[1]}, which must agree; a score that projects "
            "(bilinear, additive) takes different sizes"
        )
    return projected


def _pair_operand(x: Array, heads: int) -> Array:
    x = jnp.asarray(x)
    x = placement.of_own_heads(x, heads, 0) if x.ndim else x
    if x.ndim == 0 or x.shape[0] not in (1, heads):
        raise ValueError(
            f"score: the first axis of each array of pair_params must be {heads} "
            f"(heads) or 1, got shape {x.shape}"
        )
    return x.reshape((1, x.shape[0], 1, 1, *x.shape[1:]))


def _dropout_words(
    rng: Array,
    batch: int,
    heads: int,
    query_positions: Array,
    key_positions: Array,
    first_example: Any = 0,
    first_head: Any = 0,
) -> tuple[Array, Array]:
    """A 32-bit word for each row (batch, head, position) and column (position).

    Args:
        rng: a PRNG key of any generator.
        batch: B, or 1 for one pattern for all examples.
        heads: N, or 1 for one pattern for all heads.
        query_positions: ``[B or 1, 1, T, 1]``.
        key_positions: ``[B or 1, 1, 1, S]``.
        first_example: number of the first example, not 0 in a shard.
        first_head: number of the first head.

    Returns:
        uint32 operands ``[B or 1, N or 1, T, 1]`` and ``[B or 1, 1, 1, S]``.
    """
    rng = as_threefry(rng)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    spread = jax.vmap(jax.random.fold_in, (0, 0))

    def word(keys: Array) -> Array:
        data = jax.random.key_data(keys)
        return data[..., 0] ^ data[..., 1]

    t, s = query_positions.shape[2], key_positions.shape[3]
    cells = jnp.arange(batch * heads, dtype=jnp.uint32)
    examples = jnp.uint32(first_example) + cells // heads
    examples = fold(jax.random.fold_in(rng, 0), examples)
    rows = spread(examples, jnp.uint32(first_head) + cells % heads)
    rows = rows.reshape(batch, heads)
    lead = jnp.broadcast_shapes(rows.shape, query_positions.shape[:2])
    rows = jnp.broadcast_to(rows, lead).reshape(-1)
    positions = jnp.broadcast_to(query_positions[:, :, :, 0], (*lead, t))
    positions = positions.reshape(-1, t).astype(jnp.uint32)
    row_words = word(jax.vmap(fold)(rows, positions)).reshape(*lead, t, 1)
    columns = key_positions.reshape(-1).astype(jnp.uint32)
    col_words = word(fold(jax.random.fold_in(rng, 1), columns))
    return row_words, col_words.reshape(-1, 1, 1, s)
