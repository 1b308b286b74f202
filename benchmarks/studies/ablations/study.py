"""What do scaling, heads, positions, residuals and normalisation contribute?"""

from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from attnlab import nn
from attnlab.masks import causal as causal_mask
from attnlab.masks import full
from benchmarks.studies.ablations.changes import (
    BUDGET,
    CHANGES,
    KINDS,
    NOT_QUICK,
    QUICK,
    SAME,
    SEEDS,
    placed,
)
from benchmarks.studies.ablations.inside import Inside, inside
from benchmarks.studies.ablations.page import page
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.stretches import Stretch, Stretches
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.models.language_models import language_model, loss
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import Page, interval
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json, fingerprint, gradient_norm
from benchmarks.studies.machinery.training import Run, Trained


class Task:
    """Language models that each differ from a base model by one change."""

    def __init__(self, context: Context):
        self.budget = budget = QUICK if context.quick else BUDGET
        self.context = context.dividing(budget.rows)
        self.data = budget.read(context)
        self._stretches = {
            (part, causal): Stretches(
                getattr(self.data, part),
                length=budget.length,
                rows=budget.rows,
                vocabulary_size=self.data.vocabulary.size,
                causal=causal,
            )
            for part in ("train", "dev", "test")
            for causal in (False, True)
        }

    def batches(self, part: str, causal: bool) -> list[Stretch]:
        return self._stretches[part, causal].all()

    def make(self, name: str, seed: int = 0) -> nnx.Module:
        """An untrained model with a change."""
        change, budget = CHANGES[name], self.budget
        rngs = nnx.Rngs(seed)
        sizes = budget.sizes
        if change.heads is not None:
            sizes = sizes._replace(heads=min(change.heads, sizes.features // 2))
        train = self._stretches["train", change.causal]
        options = dict(change.options(budget, rngs))
        if "embedded_position" in options:
            options["embedding"] = nn.Embedding(
                train.vocabulary_size,
                sizes.features,
                position=options.pop("embedded_position"),
                rngs=rngs,
            )
        return language_model(
            train.vocabulary_size,
            sizes,
            [causal_mask() if change.causal else full()] * sizes.layers,
            causal=change.causal,
            rngs=rngs,
            **options,
        )

    def run(self, name: str, rate: float, seed: int) -> Run:
        """One training run."""
        budget, causal = self.budget, CHANGES[name].causal
        train = self._stretches["train", causal]
        # Each seed starts with another epoch.
        first = seed * train.steps

        def batch_at(step: int) -> Stretch:
            return train.batch_at(first + step)

        return Run(
            name=f"{name}/rate-{rate:g}/seed-{seed}",
            config={
                "model": name,
                "drawn": fingerprint(nnx.state(self.make(name, seed)), batch_at(0)),
                "budget": budget.config(),
                "data": self.data.fingerprint,
                "rate": rate,
            },
            make_model=lambda: self.make(name, seed),
            loss=loss,
            batch_at=batch_at,
            optimiser=adam(rate, steps=budget.steps, warmup=max(budget.steps // 10, 1)),
            steps=budget.steps,
            evaluate=MeanLoss(loss, self.batches("dev", causal), self.context.mesh),
            evaluate_every=max(budget.steps // 4, min(3, budget.steps)),
            seed=seed,
            measure=lambda model, log: self.measure(name, model, log),
        )

    def measure(self, name: str, model: Any, log: list[Json]) -> Json:
        """The numbers of a trained model that the page needs."""
        return {
            "test_loss": self.test_loss(name, model),
            "gradient_norm": [gradient_norm(log, s) for s in (0.1, -0.1)],
            "inside": self.look_inside(name, model)._asdict(),
        }

    def train(self, name: str) -> "Trial | None":
        """Trains a change at its best rate with every seed.

        Returns:
            The runs; None if ``--only`` left out runs that are not finished.
        """
        context, quick = self.context, self.context.quick
        rates = CHANGES[name].rates[-1:] if quick else CHANGES[name].rates
        found = {rate: context.train(self.run(name, rate, 0)) for rate in rates}
        done = {rate: t for rate, t in found.items() if t is not None}
        if len(done) < len(rates):
            return None
        rate = min(done, key=lambda rate: done[rate].summary["best"]["loss"])
        seeds = range(1, 1 if quick else SEEDS)
        more = [context.train(self.run(name, rate, seed)) for seed in seeds]
        kept = [t for t in more if t is not None]
        if len(kept) < len(more):
            return None
        every = [*done.values(), *kept]
        return Trial(rate, [done[rate], *kept], [t.summary for t in every])

    def test_loss(self, name: str, model: Any) -> float:
        batches = self.batches("test", CHANGES[name].causal)
        return MeanLoss(loss, batches, self.context.mesh)(model)["loss"]

    def look_inside(self, name: str, model: Any) -> Inside:
        """Statistics of attention on two batches of the test documents."""
        batches = self.batches("test", CHANGES[name].causal)[:2]
        run = over_batch(inside, self.context.mesh)
        found = np.concatenate([np.asarray(run(model, b), np.float64) for b in batches])
        return Inside(*found.mean(0).T.tolist())


class Trial(NamedTuple):
    """The runs of one change.

    Attributes:
        rate: the best rate.
        seeds: the run of each seed at that rate.
        summaries: of every run.
    """

    rate: float
    seeds: list[Trained]
    summaries: list[Json]


def order_matters(task: Task, name: str) -> float:
    """The relative change of an untrained model's outputs when words are shuffled.

    Outputs of the same word are compared; 0 means that the model cannot tell the order.
    For a causal model only the output of the last word is compared, with the words
    before it shuffled.
    """
    model: Any = task.make(name)
    model.eval()
    change = CHANGES[name]
    tokens = task.batches("test", change.causal)[0].tokens[:2]
    order = np.random.default_rng(0).permutation(tokens.shape[1] - 1)
    order = np.append(order, tokens.shape[1] - 1)
    before, after = np.asarray(model(tokens)), np.asarray(model(tokens[:, order]))
    before = before[:, order]
    if change.causal:
        before, after = before[:, -1:], after[:, -1:]
    return float(np.abs(after - before).max() / np.abs(before - before.mean()).max())


def study(context: Context) -> Page | None:
    """Trains every change with every seed, and compares them."""
    task = Task(context)
    left_out = {*SAME, *(NOT_QUICK if context.quick else ())}
    wanted = [name for name in CHANGES if name not in left_out]
    trained: dict[str, Trial] = {}
    for name in wanted:
        trial = task.train(name)
        if trial is not None:
            trained[name] = trial
    if len(trained) < len(wanted):
        return None
    summaries = [s for trial in trained.values() for s in trial.summaries]
    trained |= {name: trained[base] for name, base in SAME.items()}
    rows = {name: _row(task, name, trial) for name, trial in trained.items()}
    moved = {
        kind: {
            label: order_matters(task, name)
            for label, name in placed(kind).items()
            if name in rows
        }
        for kind in KINDS
    }
    return page(rows, moved, task.budget, summaries)


def _row(task: Task, name: str, trial: Trial) -> Json:
    new: Any = task.make(name)
    new.eval()
    first = trial.seeds[0].summary
    measured = [t.summary["measured"] for t in trial.seeds]
    return {
        "rate": trial.rate,
        "dev_loss": interval([t.summary["best"]["loss"] for t in trial.seeds]),
        "test_loss": interval([m["test_loss"] for m in measured]),
        "parameters": first["parameters"],
        "gradient_norm": measured[0]["gradient_norm"],
        "untrained": task.look_inside(name, new)._asdict(),
        "trained": measured[0]["inside"],
        "over_seeds": {
            "gradient_norm": [
                interval(norms)
                for norms in zip(*(m["gradient_norm"] for m in measured), strict=True)
            ],
            **{
                key: interval([float(np.mean(m["inside"][key])) for m in measured])
                for key in Inside._fields
            },
        },
    }
