"""A tiny study to test the machinery: a recurrent network reverses symbols."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import nn
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.batches import END, START, Batch
from benchmarks.studies.machinery.data.synthetic import Symbols
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.losses import forced
from benchmarks.studies.machinery.models.scoring import exact_matches
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import Page, cost_of, lines, table
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.training import Run


class Reverser(nnx.Module):
    """One GRU reads the source and then produces the target."""

    def __init__(self, vocabulary_size: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary_size, features, rngs=rngs)
        self.cell = nnx.GRUCell(features, features, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.features = features

    def _step(self, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        state, output = self.cell(state, self.embedding(token))
        return state, self.embedding.attend(output)

    def start(self, source: jax.Array, lengths: jax.Array) -> jax.Array:
        """``[B, S] -> [B, features]``: the state after the source."""
        state = jnp.zeros((source.shape[0], self.features))
        for place in range(source.shape[1]):
            seen = (place < lengths)[:, None]
            state = jnp.where(seen, self._step(state, source[:, place])[0], state)
        return self.dropout(state)

    def decode(
        self, tokens: jax.Array, state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The next tokens: logits ``[B, T, V]``, and the next state."""
        logits = []
        for place in range(tokens.shape[1]):
            state, found = self._step(state, tokens[:, place])
            logits.append(found)
        return jnp.stack(logits, 1), state


def logits(model: Any, batch: Batch) -> jax.Array:
    """Logits of each target token except the first."""
    state = model.start(batch.source, batch.source_lengths)
    return model.decode(batch.target[:, :-1], state)[0]


def decode(model: Any, source: jax.Array, lengths: jax.Array) -> jax.Array:
    """Greedy decoding, ``[B, S] -> [B, S]``."""
    prompt = jnp.full((source.shape[0], 1), START)
    state = model.start(source, lengths)
    return nn.greedy(
        model.decode, state, prompt, length=source.shape[1], end=END
    ).tokens


def study(context: Context) -> Page | None:
    """Trains two sizes of the state."""
    steps = 30 if context.quick else 1500
    task = Symbols("reverse", symbols=5, lengths=(1, 4), rows=16 * context.mesh.size)
    tests = task.test([1, 2, 3, 4])

    def make_run(features: int) -> Run:
        return Run(
            name=f"state-{features}",
            config={"features": features, "rate": 1e-2},
            make_model=lambda: Reverser(
                task.vocabulary_size, features, rngs=nnx.Rngs(0)
            ),
            loss=forced(logits),
            batch_at=task.batch_at,
            optimiser=adam(1e-2, steps=steps, warmup=10),
            steps=steps,
            evaluate=MeanLoss(forced(logits), tests, context.mesh),
            evaluate_every=max(steps // 5, 1),
        )

    sizes = (8, 16)
    runs = context.train_all(map(make_run, sizes))
    if runs is None:
        return None
    trained = dict(zip(sizes, runs.values(), strict=True))
    translate = over_batch(decode, context.mesh)
    rows = []
    for features, found in trained.items():
        right = [
            float(exact_matches(translate(found.model, *b[:2]), b).mean())
            for b in tests
        ]
        rows.append([features, found.summary["best"]["loss"], *right])
    curves = {
        f"state of {features}": [
            (line["step"], line["loss"]) for line in found.log if "loss" in line
        ]
        for features, found in trained.items()
    }
    best = max(float(np.mean(row[2:])) for row in rows)
    return Page(
        Path(__file__).with_name("smoke.md"),
        {
            "best": best,
            "cost": cost_of(found.summary for found in trained.values()),
            "right": table(
                ["state", "loss", *(f"{n} symbols" for n in (1, 2, 3, 4))], rows
            ),
        },
        charts={"loss": lines({"loss": curves}, "steps", marker="")},
        results={"rows": rows},
    )
