"""The loss of a model on data that it was not trained on."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks.studies.machinery.losses import Loss
from benchmarks.studies.machinery.parallel import over_batch


class MeanLoss:
    """``evaluate(model)``: the mean loss per token, and its exponential, perplexity."""

    def __init__(self, loss: Loss, batches: Sequence[Any], mesh: Mesh):
        """An evaluation.

        Args:
            loss: see :data:`Loss`; without label smoothing.
            batches: the evaluation data.
            mesh: devices that share a batch.
        """

        def sums(model: nnx.Module, batch: Any) -> jax.Array:
            total, count = loss(model, batch, jax.random.key(0))
            return jnp.stack([total, count.astype(total.dtype)])[None]

        self.batches = batches
        self._sums = over_batch(sums, mesh)

    def __call__(self, model: nnx.Module) -> dict[str, float]:
        """Evaluates a model whose dropout is off."""
        sums = [np.asarray(self._sums(model, b), np.float64) for b in self.batches]
        total, count = np.concatenate(sums).sum(0)
        mean = float(total / count)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
