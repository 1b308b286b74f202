"""Handles NaN and infinity outside of kernels that do not handle them.

The weight of a hidden pair is 0, and 0 times NaN is NaN: without care, a number that is
not finite reaches every query of its block. Here the kernel gets zeros in its place.
Then the outputs of queries that attend to such a number are set to NaN, and so are the
gradients of all that these queries attend to. If all numbers are finite, this branch is
skipped at run time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.implementations.schedule import Operands, Tiles
from attnlab._src.implementations.tile import finite, spoilt
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.types import (
    Array,
    AttentionInputs,
    Intervals,
    Live,
    Plan,
    Tile,
)
from attnlab._src.varying import vary_like

#: Number of pairs that are processed at once.
_PAIRS = 2**18


def forward(
    inputs: AttentionInputs, run: Callable[[AttentionInputs], tuple[Array, Array]]
) -> tuple[Array, Array]:
    """Output and log-sum-exp of ``run``, for inputs that may not be finite."""
    arrays = inputs.query, inputs.key, inputs.value
    bad_query, bad_key, bad_value = map(spoilt, arrays)
    output, lse = run(_finite(inputs))

    def lose(output: Array, lse: Array) -> tuple[Array, Array]:
        group = inputs.sizes.N // inputs.sizes.K
        lost, lost_value = (
            _pairs(inputs, jnp.repeat(bad, group, 2), None)[0]
            for bad in (bad_key, bad_value)
        )
        sees = ~jnp.isneginf(lse)
        lost = (lost | bad_query) & sees
        lost_output = lost | (lost_value & sees)
        lse = jnp.where(lost, jnp.nan, lse)
        return jnp.where(lost_output[..., None], jnp.nan, output), lse

    some = bad_query.any() | bad_key.any() | bad_value.any()
    return lax.cond(some, lose, lambda *x: x, output, lse)


def backward(
    inputs: AttentionInputs,
    output: Array,
    lse: Array,
    d_output: Array,
    d_lse: Array | None,
    run: Callable[..., list[Array | None]],
) -> list[Array | None]:
    """Gradients of ``run(inputs, output, lse, d_output, d_lse)``, as in ``forward``."""
    lost = spoilt(inputs.query) | spoilt(output) | spoilt(d_output) | jnp.isnan(lse)
    lost &= ~jnp.isneginf(lse)
    # In the kernel, a lost query attends to nothing.
    output, d_output = (
        jnp.where(lost[..., None], jnp.zeros((), x.dtype), x)
        for x in (output, d_output)
    )
    if d_lse is not None:
        d_lse = jnp.where(lost, 0, d_lse)
    hidden = jnp.where(lost, -jnp.inf, lse)
    found = run(_finite(inputs), output, hidden, d_output, d_lse)

    def lose(found: AttentionInputs) -> AttentionInputs:
        _, seen = _pairs(inputs, None, lost)
        s = inputs.sizes
        seen_keys = seen.reshape(s.B, s.S, s.K, -1).any(-1)
        sides = lost.swapaxes(1, 2)[..., None], seen.swapaxes(1, 2)[:, :, None]

        def nan(x: Array | None, where: Array) -> Any:
            return None if x is None else jnp.where(where, jnp.nan, x)

        def operand(x: Array) -> Array | None:
            """``[B or 1, N or 1, T or 1, S or 1, *payload]``."""
            rows, cols = (
                side.any([n for n in range(4) if x.shape[n] == 1], keepdims=True)
                for side in sides
            )
            return nan(x, (rows & cols).reshape(*x.shape[:4], *[1] * (x.ndim - 4)))

        return dataclasses.replace(
            found,
            query=nan(found.query, lost[..., None]),
            key=nan(found.key, seen_keys[..., None]),
            value=nan(found.value, seen_keys[..., None]),
            pair_params=jax.tree.map(operand, found.pair_params),
            modifier_operands=jax.tree.map(operand, found.modifier_operands),
        )

    structure = jax.tree.structure(inputs)
    gradients = jax.tree.unflatten(structure, found)
    return structure.flatten_up_to(lax.cond(lost.any(), lose, lambda x: x, gradients))


def _finite(inputs: AttentionInputs) -> AttentionInputs:
    query, key, value = map(finite, (inputs.query, inputs.key, inputs.value))
    return dataclasses.replace(inputs, query=query, key=key, value=value)


def _pairs(
    inputs: AttentionInputs, keys: Array | None, queries: Array | None
) -> tuple[Array, Array]:
    """Which queries see a given key, and which keys are seen by a given query.

    Args:
        inputs: the canonical record.
        keys: mask of the given keys, ``[B, S, N]``; None: no key.
        queries: mask of the given queries, ``[B, T, N]``; None: no query.

    Returns:
        Queries that see any of the keys, ``[B, T, N]``; and keys that any of the
        queries sees, ``[B, S, N]``.
    """
    s = inputs.sizes
    size = min(max(_PAIRS // s.S, 1), s.T)
    # A plan with one full block of all keys for each block of queries.
    rows = -(-s.T // size)
    whole = Intervals(*(np.full((1, 1, rows, 1), n, np.int32) for n in (0, 1)))
    nothing = Intervals(*[np.zeros((1, 1, rows, 0), np.int32)] * 2)
    plan = Plan(Live(whole, nothing), None, size, s.S, s.T, s.S)
    tiles = Tiles(inputs, plan)
    operands = Operands.of(tiles)
    keys, queries = (
        jnp.zeros(shape, bool) if x is None else x
        for x, shape in ((keys, (s.B, s.S, s.N)), (queries, (s.B, s.T, s.N)))
    )
    queries = tiles.queries(queries[..., None])
    ids, valid = jnp.zeros(1, jnp.int32), jnp.ones(1, bool)

    def row(found: Array, r: Array) -> tuple[Array, Array]:
        where = tiles.row(r)
        here = operands.at(tiles, where, ids, valid)
        tile = Tile(here.query_positions, here.key_positions, where.head)
        seen = visible_pairs(inputs.mask, tile, here.mask)
        sees = (seen & keys[where.example, :, where.head][None]).any(1)
        meant = (seen & tiles.query_block(queries, where)).any(0)
        meant = jnp.broadcast_to(meant, (s.S,))
        found = found.at[where.example, :, where.head].max(meant)
        return found, jnp.broadcast_to(sees, (size,))

    start = vary_like(jnp.zeros((s.B, s.S, s.N), bool), inputs)
    found, sees = lax.scan(row, start, tiles.all_rows())
    return tiles.unrow(sees), found
