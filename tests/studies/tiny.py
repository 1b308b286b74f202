"""A run that takes a second: a bag-of-embeddings model of copied symbols.

The script ``python -m tests.studies.tiny FOLDER`` trains one run to its end, then
another that kills its own process; with ``--resume`` it continues the second run.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from benchmarks.studies.machinery.data.synthetic import Symbols
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.losses import forced
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.parallel import ask_for_devices, make_mesh
from benchmarks.studies.machinery.training import Place, Run, train

TASK = Symbols("copy", symbols=7, lengths=(1, 5), rows=6)
STEPS, EVERY = 23, 5


class Bag(nnx.Module):
    """Predicts the next token from the sum of the source and the last token."""

    def __init__(self, features=13, dropout_rate=0.2, *, rngs):
        self.embedding = nnx.Embed(TASK.vocabulary_size, features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.out = nnx.Linear(features, TASK.vocabulary_size, rngs=rngs)

    def __call__(self, batch):
        source, last = map(self.embedding, (batch.source, batch.target[:, :-1]))
        seen = jnp.arange(source.shape[1])[None] < batch.source_lengths[:, None]
        bag = source.sum(1, keepdims=True, where=seen[..., None])
        return self.out(self.dropout(jax.nn.relu(bag + last)))


def logits(model, batch):
    return model(batch)


def make_run(name="tiny", *, mesh, **changes):
    fields = {
        "name": name,
        "config": {"features": 13, "rate": 0.05},
        "make_model": lambda: Bag(rngs=nnx.Rngs(3)),
        "loss": forced(logits, smoothing=0.1),
        "batch_at": TASK.batch_at,
        "optimiser": adam(0.05, steps=STEPS, warmup=3),
        "steps": STEPS,
        "evaluate": MeanLoss(forced(logits), TASK.test([2, 5]), mesh),
        "evaluate_every": EVERY,
        "seed": 11,
    }
    return Run(**{**fields, **changes})


def killing(step):
    def batch_at(number):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return TASK.batch_at(number)

    return batch_at


def main(folder, resume):
    ask_for_devices(2)
    mesh, console = make_mesh(2), Console()
    if not resume:
        train(make_run(mesh=mesh), Place(folder / "whole", mesh, console))
    run = make_run(mesh=mesh, batch_at=TASK.batch_at if resume else killing(17))
    train(run, Place(folder / "killed", mesh, console, resume))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--resume" in sys.argv)
