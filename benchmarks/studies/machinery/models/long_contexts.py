"""Comparisons of language models that continue one base model on long contexts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.masks import Mask
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.addresses import Addresses
from benchmarks.studies.machinery.data.stretches import Stretches
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.models.language_models import (
    OWN,
    Budget,
    Sizes,
    anchors_of_own,
    copy_parameters,
    language_model,
    layer_masks,
    loss,
    losses_and_hits,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import interval, shown
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json, fingerprint
from benchmarks.studies.machinery.training import Run, Trained

#: The base model that every run continues, trained on short contexts with full
#: attention, as BigBird and Longformer continue RoBERTa. A masked model that is trained
#: from scratch on contexts of 4,096 does not use its context yet after 2.6 million
#: tokens.
BASE, BASE_RATE = Budget(steps=640, length=512, rows=8), 8e-3
BUDGET = Budget(steps=320, length=4096, rows=1)
QUICK = Budget(6, 128, 2, 400, limit=12, test=2, dev=2, sizes=Sizes(16, 2, 2))
QUICK_BASE = QUICK._replace(length=64)
#: Patterns whose loss is this close to a neighbour's in the table, in nats, are trained
#: with more seeds.
CLOSE = 0.05
SEEDS = 3
#: A context is divided into this many parts for the loss by position.
PARTS = 16


class Task:
    """Masked or causal language modelling under one budget.

    A subclass may have another :meth:`model`, :attr:`loss` and :attr:`copy`.
    """

    def __init__(
        self,
        context: Context,
        data: Addresses,
        causal: bool,
        budget: Budget,
        names: Sequence[str],
        base: "Task | None" = None,
    ):
        """Cuts the documents.

        Args:
            context: context of the study.
            data: the documents.
            causal: True: predict the next token; False: predict hidden tokens.
            budget: budget of each run.
            names: the patterns that are compared.
            base: the task whose models the runs continue; None: train from scratch.
        """
        self.context, self.causal = context.dividing(budget.rows), causal
        self.data, self.budget, self.base = data, budget, base
        self.names = tuple(names)
        self.test = self._stretches(self.data.test).all()
        dev_batches = self._stretches(self.data.dev).all()
        self._evaluate = MeanLoss(loss, dev_batches, self.context.mesh)

    #: What training minimises.
    loss = staticmethod(loss)
    #: How the model of a run begins as that of its base.
    copy = staticmethod(copy_parameters)

    @property
    def kind(self) -> str:
        return "causal" if self.causal else "masked"

    def _stretches(self, stream: np.ndarray, seed: int = 0) -> Stretches:
        return Stretches(
            stream,
            length=self.budget.length,
            rows=self.budget.rows,
            vocabulary_size=self.data.vocabulary.size,
            causal=self.causal,
            seed=seed,
        )

    def model(self, pattern: str, mask: list[Mask], seed: int) -> nnx.Module:
        """A new model."""
        return language_model(
            self.data.vocabulary.size + (not self.causal),
            self.budget.sizes,
            mask,
            causal=self.causal,
            own_projections=anchors_of_own(self.budget.length) if pattern == OWN else 0,
            rngs=nnx.Rngs(seed),
        )

    def run(self, name: str, pattern: str, rate: float, seed: int = 0) -> Run:
        """One training run, named ``KIND/NAME``."""
        train = self._stretches(self.data.train, seed)
        steps = self.budget.steps
        mask = self.masks(pattern, seed)
        config: Json = {
            "pattern": pattern,
            "masks": [repr(m) for m in mask],
            "drawn": fingerprint(mask, train.batch_at(0)),
            "budget": self.budget.config(),
            "data": self.data.fingerprint,
            "rate": rate,
        }
        begin = None
        if self.base is not None:
            base = self.base.base_run(seed)
            config["base"] = base.config

            def begin(model: nnx.Module) -> None:
                self.copy(self.context.model(base), model)

        return Run(
            name=f"{self.kind}/{name}",
            config=config,
            make_model=lambda: self.model(pattern, mask, seed),
            loss=self.loss,
            batch_at=train.batch_at,
            optimiser=adam(rate, steps=steps, warmup=max(steps // 10, 1)),
            steps=steps,
            evaluate=self._evaluate,
            evaluate_every=max(steps // 4, min(3, steps)),
            seed=seed,
            begin=begin,
            measure=lambda model, _: self.on_test(model),
        )

    def base_run(self, seed: int) -> Run:
        """The run of the base model, for a seed."""
        return self.run(f"base/seed-{seed}", "full", BASE_RATE, seed)

    def masks(self, pattern: str, seed: int = 0) -> list[Mask]:
        """The mask of each layer."""
        name = "window+anchor" if pattern == OWN else pattern
        length, layers = self.budget.length, self.budget.sizes.layers
        return layer_masks(name, length, layers, self.causal, seed)

    def step_seconds(self, rate: float) -> dict[str, float]:
        """Seconds of a training step with each pattern."""
        runs = [self.run(pattern, pattern, rate) for pattern in self.names]
        found = self.context.step_seconds(runs)
        return dict(zip(self.names, found.values(), strict=True))

    def on_test(self, model: Any) -> Json:
        """Loss and accuracy on the test documents.

        Returns:
            ``loss``: the mean per token; ``accuracy``: how often the most probable
            token is right; ``by_position``: ``[position, loss]`` for each part of the
            context.
        """
        sums = over_batch(_by_position, self.context.mesh)
        rows = [np.asarray(sums(model, batch), np.float64) for batch in self.test]
        total, hits, count = np.concatenate(rows).sum(0)
        loss, accuracy = total.sum() / count.sum(), hits.sum() / count.sum()
        total, count = (x.reshape(PARTS, -1).sum(1) for x in (total, count))
        middle = (np.arange(PARTS) + 0.5) * self.budget.length / PARTS
        return {
            "loss": float(loss),
            "accuracy": float(accuracy),
            "by_position": np.stack([middle, total / count], 1).tolist(),
        }


def _by_position(model: Any, batch: Any) -> jax.Array:
    """``[B, 3, T]``: loss, hit (0 or 1), and whether the token counts."""
    found = losses_and_hits(model, batch)
    return jnp.stack([*found, batch.counted.astype(jnp.float32)], 1)


def close_rows(found: Mapping[str, float]) -> list[str]:
    """Names whose loss is within :data:`CLOSE` of a neighbour's, best first."""
    ranked = sorted(found, key=lambda name: found[name])
    gaps = [found[b] - found[a] for a, b in zip(ranked, ranked[1:], strict=False)]
    near = [gap < CLOSE for gap in gaps]
    return [
        name
        for i, name in enumerate(ranked)
        if (i > 0 and near[i - 1]) or (i < len(near) and near[i])
    ]


class Runs(NamedTuple):
    """The runs of one task.

    Attributes:
        bases: the base models, by seed.
        by_pattern: by name of the pattern, then by seed.
    """

    bases: dict[int, Trained]
    by_pattern: dict[str, dict[int, Trained]]

    def summaries(self) -> list[Json]:
        """The summaries of all runs."""
        each = [self.bases, *self.by_pattern.values()]
        return [trained.summary for runs in each for trained in runs.values()]


def train_base(task: Task, seed: int) -> dict[int, Trained]:
    """Trains the base model of a task; empty if ``--only`` left it out."""
    assert task.base is not None
    trained = task.context.train(task.base.base_run(seed))
    return {} if trained is None else {seed: trained}


def train_patterns(task: Task, rate: float, done: Runs | None = None) -> Runs | None:
    """Trains each pattern once, then full attention and close ones with more seeds.

    Args:
        task: what is trained; it has a base.
        rate: the learning rate of all runs.
        done: runs that are not to be repeated.

    Returns:
        The runs; None if ``--only`` left out one that is needed.
    """
    runs = done or Runs({}, {})
    bases, found = {**runs.bases}, {p: {**of} for p, of in runs.by_pattern.items()}

    def train_all(patterns: Iterable[str], seed: int) -> bool:
        """Trains the base and the patterns; returns whether none is left out."""
        if seed not in bases:
            bases.update(train_base(task, seed))
        for pattern in patterns:
            if seed in found.get(pattern, {}):
                continue
            name = f"{pattern.replace(' ', '-')}/seed-{seed}"
            trained = task.context.train(task.run(name, pattern, rate, seed))
            if trained is not None:
                found.setdefault(pattern, {})[seed] = trained
        return seed in bases and all(seed in found.get(p, {}) for p in patterns)

    if not train_all(task.names, 0):
        return None
    first = {name: of[0].summary["best"]["loss"] for name, of in found.items()}
    again = dict.fromkeys(["full", *close_rows(first)])
    seeds = range(1, 1 if task.context.quick else SEEDS)
    complete = [train_all(again, seed) for seed in seeds]
    return Runs(bases, found) if all(complete) else None


def compared(runs: Runs, seconds: Mapping[str, float]) -> dict[str, Json]:
    """What pages tell of each pattern, by pattern.

    Args:
        runs: those of full attention, with all seeds, among them.
        seconds: of a step with each pattern.
    """
    found = runs.by_pattern
    tests = {
        name: {seed: t.summary["measured"] for seed, t in of.items()}
        for name, of in found.items()
    }
    rows: dict[str, Json] = {}
    for name, of in found.items():
        own, full = tests[name], tests["full"]
        # Runs of one seed have the same data in the same order.
        apart = [own[s]["loss"] - full[s]["loss"] for s in own]
        curve, beside = (
            np.mean([each[s]["by_position"] for s in own], 0) for each in (own, full)
        )
        rows[name] = {
            "pattern": name,
            "seeds": len(of),
            "dev_loss": interval([t.summary["best"]["loss"] for t in of.values()]),
            "test_loss": interval([t["loss"] for t in own.values()]),
            "against_full": interval(apart),
            "test_accuracy": interval([100 * t["accuracy"] for t in own.values()]),
            "by_position": curve.tolist(),
            "by_position_against_full": [
                [at, own_loss - loss]
                for (at, own_loss), (_, loss) in zip(curve, beside, strict=True)
            ],
            "seconds_per_step": seconds[name],
            "minutes": of[0].summary["seconds"] / 60,
            "speed_against_full": seconds["full"] / seconds[name],
            "parameters": of[0].summary["parameters"],
            "tokens": [t.summary["tokens"] for t in of.values()],
        }
    return rows


#: Columns of tables, for :func:`cells`.
COLUMNS = "seeds, dev loss, test loss, against full, accuracy %, s a step, speed"


def cells(row: Json) -> list[object]:
    """The cells of :data:`COLUMNS`, of a row of :func:`compared`."""
    return [
        row["seeds"],
        shown(row["dev_loss"]),
        shown(row["test_loss"]),
        shown(row["against_full"]),
        shown(row["test_accuracy"], 1),
        row["seconds_per_step"],
        f"{row['speed_against_full']:.2f}x",
    ]
