"""What a row of blocks computes from a chunk of keys, in plain JAX, in both passes.

``tiled`` walks the rows one after another; ``batched`` computes many at once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab._src.implementations.schedule import Operands, Row, Tiles
from attnlab._src.implementations.tile import (
    compare,
    finite,
    kept,
    matmul,
    modify,
    scaled,
    spoilt,
)
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.types import Array, AttentionInputs, PyTree, Tile


class Softmax(NamedTuple):
    """The state of an online softmax of a block of queries.

    Attributes:
        top: ``[q]``, the greatest logit so far.
        total: ``[q]``, the sum of weights, relative to ``exp(top)``.
        sums: ``[q, D]``, the weighted sum of values, likewise.
    """

    top: Array
    total: Array
    sums: Array


class ForwardSteps:
    """Outputs of rows, a chunk of keys at a time."""

    def __init__(self, tiles: Tiles):
        inputs = tiles.inputs
        self._tiles, self._operands = tiles, Operands.of(tiles)
        self._queries = tiles.queries(inputs.query)
        self._keys = tiles.keys(inputs.key)
        self._values = tiles.keys(inputs.value)

    def start(self) -> Softmax:
        """The state of a row before its first chunk."""
        dtype, bq = self._tiles.inputs.accumulation_dtype, self._tiles.bq
        return Softmax(
            jnp.full((bq,), jnp.finfo(dtype).min, dtype),
            jnp.zeros((bq,), dtype),
            jnp.zeros((bq, self._tiles.sizes.D), dtype),
        )

    def row(self, where: Row) -> Array:
        """What all chunks of a row read: its queries, ``[bq, P]``."""
        block = self._tiles.query_block(self._queries, where)
        return block.astype(self._tiles.inputs.accumulation_dtype)

    def step(
        self,
        where: Row,
        query: Array,
        ids: Array,
        valid: Array,
        state: Softmax,
        masked: bool,
    ) -> Softmax:
        """One chunk.

        Args:
            where: the row.
            query: its queries, of :meth:`row`.
            ids: ``[chunk]``, the blocks of keys.
            valid: ``[chunk]``, which of them exist.
            state: before the chunk.
            masked: whether some pair may be hidden.
        """
        tiles, inputs = self._tiles, self._tiles.inputs
        top, total, sums = state
        here = self._operands.at(tiles, where, ids, valid)
        tile = Tile(here.query_positions, here.key_positions, where.head)
        key = tiles.key_blocks(self._keys, where, ids)
        logits = compare(inputs, here.params, here.head_scale, query, key)
        logits = modify(inputs, logits, tile, here.modifiers)
        seen = visible_pairs(inputs.mask, tile, here.mask) if masked else None
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        # ``top`` stays finite, so a hidden pair gives exp(-inf) = 0 exactly.
        new = jnp.maximum(top, logits.max(1))
        p = jnp.exp(logits - new[:, None])
        shrink = jnp.exp(top - new)
        total = total * shrink + p.sum(1)
        if here.words is not None:
            p = jnp.where(kept(inputs, here.words), p, 0)
        value = tiles.key_blocks(self._values, where, ids)
        if seen is not None:
            # The weight 0 of a hidden pair times NaN would be NaN.
            p = jnp.where(seen & spoilt(value)[None], jnp.nan, p)
            value = finite(value)
        product = matmul(inputs, p, value, (1, 0))
        return Softmax(new, total, sums * shrink[:, None] + product)

    def results(self, state: Softmax) -> tuple[Array, Array]:
        """Output ``[..., bq, D]`` and log-sum-exp ``[..., bq]`` after all chunks."""
        top, total, sums = state
        alive = total != 0  # True for NaN, which so reaches the output
        safe = jnp.where(alive, total, 1)
        kept_share = 1 - self._tiles.inputs.dropout_rate
        output = sums / (safe * kept_share)[..., None]
        output = jnp.where(alive[..., None], output, 0)
        return output, jnp.where(alive, top + jnp.log(safe), -jnp.inf)


class RowValues(NamedTuple):
    """What all chunks of a row read in the backward pass.

    Attributes:
        query: ``[bq, P]``.
        d_output: ``[bq, D]``, times the scale of dropout.
        delta: ``[bq, 1]``, what is subtracted from the gradients of weights.
        shift: ``[bq, 1]``, the log-sum-exp; infinite for a row that sees nothing.
    """

    query: Array
    d_output: Array
    delta: Array
    shift: Array


class Parts(NamedTuple):
    """What a chunk adds to gradients.

    Attributes:
        query: ``[bq, P]``.
        key: transposed, ``[P, chunk * bk]``.
        value: transposed, ``[D, chunk * bk]``.
        learned: tiles of the gradients of (pair parameters, modifier operands).
    """

    query: Array
    key: Array
    value: Array
    learned: PyTree


class BackwardSteps:
    """Gradients of rows, a chunk of keys at a time."""

    def __init__(
        self,
        tiles: Tiles,
        output: Array,
        lse: Array,
        d_output: Array,
        d_lse: Array | None,
        wanted: Sequence[bool],
    ):
        inputs, dtype = tiles.inputs, tiles.inputs.accumulation_dtype
        self._tiles, self._operands = tiles, Operands.of(tiles)
        self._keys, self._values = tiles.keys(inputs.key), tiles.keys(inputs.value)
        #: Which gradients are wanted, as a record like the inputs.
        self.want: Any = jax.tree.unflatten(jax.tree.structure(inputs), list(wanted))
        delta = (d_output.astype(dtype) * output.astype(dtype)).sum(-1)
        if d_lse is not None:
            delta = delta - d_lse
        # For a row that sees nothing, or of padding: exp(logits - inf) = 0.
        shift = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
        padding = [(0, 0), (0, tiles.nq * tiles.bq - tiles.sizes.T), (0, 0)]
        shift = jnp.pad(shift, padding, constant_values=jnp.inf)
        sides = inputs.query, d_output, delta[..., None], shift[..., None]
        self._by_row = RowValues(*map(tiles.queries, sides))

    def zeros(self, shape: Sequence[int], on: bool) -> Array | None:
        """A sum of gradients before the first chunk; None if it is not wanted."""
        dtype = self._tiles.inputs.accumulation_dtype
        return jnp.zeros(shape, dtype) if on else None

    def learned(self, make: Callable[[Array, bool], Array | None]) -> PyTree:
        """``make(operand, wanted)`` of (pair parameters, modifier operands), padded."""
        arrays = self._operands.params, self._operands.modifiers
        wanted = self.want.pair_params, self.want.modifier_operands
        return jax.tree.map(make, arrays, wanted)

    def row(self, where: Row) -> RowValues:
        """What all chunks of a row read."""
        inputs = self._tiles.inputs
        blocks = [self._tiles.query_block(x, where) for x in self._by_row]
        found = RowValues(*(x.astype(inputs.accumulation_dtype) for x in blocks))
        # Scale of dropout, applied once and not in every tile.
        scale = 1 / (1 - inputs.dropout_rate)
        return found._replace(d_output=found.d_output * scale)

    def step(
        self, where: Row, row: RowValues, ids: Array, valid: Array, masked: bool
    ) -> Parts:
        """One chunk; arguments as of :meth:`ForwardSteps.step`."""
        tiles, inputs = self._tiles, self._tiles.inputs
        dtype = inputs.accumulation_dtype
        here = self._operands.at(tiles, where, ids, valid)
        tile = Tile(here.query_positions, here.key_positions, where.head)
        key = tiles.key_blocks(self._keys, where, ids).astype(dtype)
        value = tiles.key_blocks(self._values, where, ids).astype(dtype)
        seen = visible_pairs(inputs.mask, tile, here.mask) if masked else None
        sides, above = (row.query, key), row.d_output
        if seen is not None:  # as in the forward pass
            sides, above = (finite(row.query), finite(key)), finite(above)
        logits, pull = _pullback(inputs, here, tile, *sides, seen)
        p = jnp.exp(logits - row.shift)
        if seen is not None:
            lost = spoilt(row.query) | spoilt(row.d_output)
            bad = lost[:, None] | spoilt(key)[None]
            p = jnp.where(seen, jnp.where(bad, jnp.nan, p), 0)
        d_p = matmul(inputs, above, value, (1, 1))
        dropped = p
        if here.words is not None:
            keep = kept(inputs, here.words)
            d_p = jnp.where(keep, d_p, 0)
            dropped = jnp.where(keep, p, 0)
        d_logits = p * (d_p - row.delta)
        if seen is not None:
            d_logits = jnp.where(seen, d_logits, 0)
        d_query, d_key, d_learned = pull(d_logits)
        return Parts(d_query, d_key, matmul(inputs, above, dropped, (0, 0)), d_learned)

    def gradients(
        self,
        query: Array | None,
        key: Array | None,
        value: Array | None,
        learned: PyTree,
    ) -> list[Array | None]:
        """What ``Implementation.backward`` returns.

        Args:
            query: ``[rows, bq, P]``, or None.
            key: ``[B * K, nk, P, bk]``, or None.
            value: ``[B * K, nk, D, bk]``, or None.
            learned: of (pair parameters, modifier operands), padded as these.
        """
        tiles, inputs = self._tiles, self._tiles.inputs
        given = inputs.pair_params, inputs.modifier_operands

        def unpadded(x: Array | None, like: Array) -> Array | None:
            return None if x is None else x[:, :, : like.shape[2], : like.shape[3]]

        found = jax.tree.map(unpadded, learned, given, is_leaf=lambda x: x is None)
        return inputs.gradients(
            query=None if query is None else tiles.unrow(query),
            key=tiles.unblock(key),
            value=tiles.unblock(value),
            pair_params=found[0],
            modifier_operands=found[1],
        )


def _pullback(
    inputs: AttentionInputs,
    here: Operands,
    tile: Tile,
    query: Array,
    key: Array,
    seen: Array | None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, PyTree]]]:
    """The logits of a tile, and their pullback to the tile's inputs.

    Returns:
        Logits ``[q, k]``, and a function from their gradient to those of query
        ``[q, P]`` (times ``head_scale``), of key, transposed ``[P, k]``, and of (pair
        parameters, modifiers). XLA removes computations of unused gradients.
    """
    if inputs.score.is_inner_product:
        logits = compare(inputs, here.params, here.head_scale, query, key)

        def uncompare(d: Array) -> tuple[PyTree, Array, Array]:
            d_query = scaled(inputs, matmul(inputs, d, key, (1, 0)), None)
            scaled_query = scaled(inputs, query, here.head_scale)
            return here.params, d_query, matmul(inputs, scaled_query, d, (0, 0))

    else:
        logits, pull = jax.vjp(
            functools.partial(compare, inputs), here.params, None, query, key
        )

        def uncompare(d: Array) -> tuple[PyTree, Array, Array]:
            d_params, _, d_query, d_key = pull(d)
            return d_params, d_query, d_key.T

    logits, unmodify = jax.vjp(
        lambda z, operands: modify(inputs, z, tile, operands, seen),
        logits,
        here.modifiers,
    )

    def back(d: Array) -> tuple[Array, Array, PyTree]:
        hidden = d == 0
        d, d_modifiers = unmodify(d)
        if inputs.modifiers:
            # A modifier's derivative need not be finite at hidden pairs.
            d = jnp.where(hidden, 0, d)
        d_params, d_query, d_key = uncompare(d)
        d_params = jax.tree.map(lambda x: x[None, None], d_params)
        return d_query, d_key, (d_params, d_modifiers)

    return logits, back
