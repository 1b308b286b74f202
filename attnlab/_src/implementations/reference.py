"""The reference implementation: dense, readable, differentiable to any order."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnlab._src.implementations.deferred import apply_deferred
from attnlab._src.implementations.tile import (
    compare,
    finite,
    kept,
    matmul,
    modify,
    spoilt,
    squeeze_params,
)
from attnlab._src.masks.rule import visible_pairs
from attnlab._src.types import Array, AttentionInputs, Implementation, PyTree, Tile


def _over(
    fn: Callable[..., PyTree], size: int, shared: tuple[PyTree, ...]
) -> tuple[Callable[..., PyTree], PyTree]:
    """Maps over the leading axis of every array; arrays of size 1 there are shared."""
    axes = jax.tree.map(lambda x: None if x.shape[0] == 1 else 0, shared)
    arrays = jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x, shared)
    return jax.vmap(fn, (0, axes), axis_size=size), arrays


def _lose(lost: Array, seen: Array, x: Array) -> Array:
    """``x [T, ...]``, but NaN for queries that are ``lost [T]``.

    The NaN is a function of ``seen``, so that gradients with respect to it are NaN.
    """
    value = jnp.where(lost, jnp.nan, 1) * seen
    lost, value = (y.reshape(-1, *[1] * (x.ndim - 1)) for y in (lost, value))
    return jnp.where(lost, value, x)


def attend(inputs: AttentionInputs) -> tuple[Array, Array, Array]:
    """Output ``[B, T, N, D]``, log-sum-exp ``[B, T, N]``, weights ``[B, N, T, S]``."""
    inputs, sizes = apply_deferred(inputs), inputs.sizes
    group = sizes.N // sizes.K

    def one_head(
        arrays: tuple[Array, ...], operands: PyTree
    ) -> tuple[Array, Array, Array]:
        q, k, v, head = arrays
        params, head_scale, modifiers, masks, q_pos, k_pos, words = operands
        tile = Tile(q_pos, k_pos, head)
        bad_q, bad_k, bad_v = map(spoilt, (q, k, v))
        q, k, v = map(finite, (q, k, v))
        logits = compare(inputs, squeeze_params(params), head_scale, q, k)
        visible = visible_pairs(inputs.mask, tile, masks)
        visible = jnp.broadcast_to(visible, logits.shape)
        logits = modify(inputs, logits, tile, modifiers, visible)
        logits = jnp.where(visible, logits, -jnp.inf)

        top = jax.lax.stop_gradient(logits.max(1, initial=-jnp.inf, keepdims=True))
        top = jnp.where(jnp.isneginf(top), 0, top)
        p = jnp.exp(logits - top)
        total = p.sum(1, keepdims=True)
        alive = total != 0  # True for NaN, which so reaches the output
        safe = jnp.where(alive, total, 1)
        weights = jnp.where(visible, p / safe, 0)
        lse = jnp.where(alive, top + jnp.log(safe), -jnp.inf)[:, 0]
        if words is not None:
            scale = 1 / (1 - inputs.dropout_rate)
            weights = jnp.where(kept(inputs, words), weights * scale, 0)
        output = matmul(inputs, weights, v, (1, 0))

        # A query that sees a number that is not finite is lost: its output is NaN, and
        # so are the gradients of all that it sees. NaN is inserted afterwards, because
        # in products 0 times NaN would be NaN for hidden pairs, too.
        sums = v.astype(logits.dtype).sum(1)
        seen = jnp.where(visible, logits + sums[None], 0).sum(1)
        lost = (visible & (bad_q[:, None] | bad_k[None])).any(1)
        lost |= jnp.isnan(total[:, 0])
        lse = _lose(lost, seen, lse)
        weights = jnp.where(visible, _lose(lost, seen, weights), 0)
        lost |= (visible & bad_v[None]).any(1)
        return _lose(lost, seen, output), lse, weights

    def one_example(
        arrays: tuple[Array, ...], operands: PyTree
    ) -> tuple[Array, Array, Array]:
        q, k, v = (x.swapaxes(0, 1) for x in arrays)
        k, v = jnp.repeat(k, group, 0), jnp.repeat(v, group, 0)
        heads = jnp.arange(sizes.N, dtype=jnp.int32)
        run, operands = _over(one_head, sizes.N, operands)
        return run((q, k, v, heads), operands)

    operands = (
        inputs.pair_params,
        inputs.head_scale,
        inputs.modifier_operands,
        inputs.mask_operands,
        inputs.query_positions,
        inputs.key_positions,
        inputs.dropout_words,
    )
    run, operands = _over(one_example, sizes.B, operands)
    output, lse, weights = run((inputs.query, inputs.key, inputs.value), operands)
    return output.swapaxes(1, 2), lse.swapaxes(1, 2), weights


class Reference(Implementation):
    """Dense einsum with ``[B, N, T, S]`` in memory; the specification of all others."""

    name = "reference"
    why_not_automatic = "it holds [T, S] in memory"
    differentiable = True
    symbolic = "BTS"

    def forward(self, inputs: AttentionInputs) -> tuple[Array, Array]:
        """See :class:`attnlab.extend.Implementation`."""
        output, lse, _ = attend(inputs)
        return output, lse
