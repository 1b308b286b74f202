"""Statistics of attention inside a model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attnlab import nn
from attnlab._src.nn.parameters import as_arrays
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.machinery.models.language_models import blocks_of


class Inside(NamedTuple):
    """Statistics of attention in each layer, means over heads and queries.

    Attributes:
        deviation: standard deviation of a query's visible logits, before modifiers.
        entropy: entropy of a query's weights over that of equal weights.
        itself: how often a query's greatest weight is on its own position.
        own_weight: the weight on its own position over that of equal weights.
        kept: cosine similarity of a block's input and output.
    """

    deviation: list[float]
    entropy: list[float]
    itself: list[float]
    own_weight: list[float]
    kept: list[float]


def inside(model: Any, batch: Stretch) -> jax.Array:
    """``[B, layers, 5]``: the numbers of :class:`Inside`."""
    is_causal = isinstance(model, nn.Decoder)
    part = model if is_causal else model.encoder
    rows = []
    for block, before, read, after in blocks_of(part, jnp.asarray(batch.tokens)):
        weights: Any = block.attention.with_stats(read, top_k="all").weights
        logits = _logits(block.attention, read)
        found = [_deviation(logits, is_causal), *_shape_of(weights, is_causal)]
        rows.append([*found, _cosine(before, after)])
    return jnp.stack([jnp.stack(row, -1) for row in rows], 1)


def _logits(attention: nn.MultiHeadAttention, x: jax.Array) -> jax.Array:
    """``[B, N, T, T]`` of self-attention by an inner product, before modifiers."""
    score = as_arrays(attention.score)
    where = jnp.arange(x.shape[1])
    query, key = (
        attention.position.rotate(project(x), where)
        for project in (attention.query, attention.key)
    )
    query, key = score.project_query(query), score.project_key(key)
    return jnp.einsum("btnp,bsnp->bnts", query, key)


def _seen(length: int, is_causal: bool) -> jax.Array:
    """Visible keys ``[T - 1, T]`` of all queries but the first, which may see one."""
    keys = jnp.arange(length)
    seen = keys[None] <= keys[1:, None]
    return seen if is_causal else jnp.ones_like(seen)


def _deviation(logits: jax.Array, is_causal: bool) -> jax.Array:
    """``[B]``: standard deviation over the keys of a query, mean over queries."""
    seen = _seen(logits.shape[-1], is_causal)
    return logits[:, :, 1:].std(-1, where=seen[None, None]).mean((1, 2))


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[B]``: mean over positions."""
    product = (x * y).sum(-1)
    sizes = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (product / jnp.maximum(sizes, 1e-9)).mean(-1)


def _shape_of(weights: jax.Array, is_causal: bool) -> list[jax.Array]:
    """Entropy, itself and own weight, each ``[B]``, of weights ``[B, N, T, T]``."""
    count = _seen(weights.shape[-1], is_causal).sum(-1).astype(jnp.float32)
    weights = weights[:, :, 1:]
    own = jnp.arange(1, weights.shape[-1])
    logs = jnp.log(jnp.where(weights > 0, weights, 1))
    entropy = -(weights * logs).sum(-1) / jnp.log(count)[None, None]
    itself = weights.argmax(-1) == own[None, None]
    own_weight = jnp.diagonal(weights, 1, axis1=-2, axis2=-1) * count[None, None]
    numbers = (entropy, itself, own_weight)
    return [x.astype(jnp.float32).mean((1, 2)) for x in numbers]
