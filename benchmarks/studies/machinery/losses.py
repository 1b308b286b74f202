"""Cross-entropy of the next token, without padding."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.studies.machinery.data.batches import Batch

#: ``(model, batch, rng) -> (sum of losses, number of target tokens)``; a batch is a
#: tuple of arrays whose first axis is the batch.
Loss = Callable[[nnx.Module, Any, jax.Array], tuple[jax.Array, jax.Array]]


def cross_entropy(
    logits: jax.Array, batch: Batch, smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The sum over target tokens, and their number.

    Args:
        logits: ``[B, T - 1, V]``, predictions of ``batch.target[:, 1:]``.
        batch: with targets ``[B, T]``.
        smoothing: the share of a label that is divided equally among all tokens.

    References:
        Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7
        (smoothing).
    """
    labels = batch.target[:, 1:]
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if smoothing:
        # As optax.smooth_labels, without an array of labels [B, T, V].
        alike = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
        losses = (1 - smoothing) * losses + smoothing * alike
    places = jnp.arange(labels.shape[1], dtype=jnp.int32)[None]
    counted = places < batch.target_lengths[:, None] - 1
    return jnp.where(counted, losses, 0).sum(), counted.sum()


def forced(logits: Callable[[Any, Batch], jax.Array], smoothing: float = 0.0) -> Loss:
    """The loss with teacher forcing.

    Args:
        logits: ``(model, batch) -> [B, T - 1, V]``: predictions of the token after each
            of ``batch.target[:, :-1]``.
        smoothing: see :func:`cross_entropy`.
    """

    def loss(
        model: nnx.Module, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(logits(model, batch), batch, smoothing)

    return loss
