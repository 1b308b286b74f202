"""How good are sparse patterns in language models, and how much time do they save?"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import cost
from attnlab.masks import Mask
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.addresses import Addresses
from benchmarks.studies.machinery.data.stretches import Stretches
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.models.language_models import (
    OWN,
    PATTERNS,
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
from benchmarks.studies.machinery.page import Page, interval
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json, fingerprint
from benchmarks.studies.machinery.sweep import Sweep, sweep
from benchmarks.studies.machinery.training import Run, Trained
from benchmarks.studies.patterns_lm.page import page

#: Patterns of causal models; masked models use all patterns.
CAUSAL = (
    "full",
    "window",
    "random",
    "window+random",
    "window+anchor",
    "all three",
    "dilated",
)
#: Learning rates that are tried in whole runs with the pattern :data:`SWEPT`; the best
#: one is used for all patterns.
RATES = (2e-3, 4e-3)
SWEPT = "window"
#: Patterns whose loss is this close to a neighbour's in the table, in nats, are trained
#: with more seeds.
CLOSE = 0.05
SEEDS = 3
#: A context is divided into this many parts for the loss by position.
PARTS = 16

#: The base model that every run continues, trained on short contexts with full
#: attention, as BigBird and Longformer continue RoBERTa. A masked model that is trained
#: from scratch on contexts of 4,096 does not use its context yet after 2.6 million
#: tokens.
BASE, BASE_RATE = Budget(steps=640, length=512, rows=8), 8e-3
BUDGET = Budget(steps=320, length=4096, rows=1)
QUICK = Budget(6, 128, 2, 400, limit=12, test=2, dev=2, sizes=Sizes(16, 2, 2))
QUICK_BASE = QUICK._replace(length=64)
QUICK_PATTERNS = ("full", "window", "all three", OWN)


class Task:
    """Masked or causal language modelling under one budget."""

    def __init__(
        self,
        context: Context,
        data: Addresses,
        causal: bool,
        budget: Budget,
        base: "Task | None" = None,
    ):
        """Cuts the documents.

        Args:
            context: context of the study.
            data: the documents.
            causal: True: predict the next token; False: predict hidden tokens.
            budget: budget of each run.
            base: the task whose models the runs continue; None: train from scratch.
        """
        self.context, self.causal = context.dividing(budget.rows), causal
        self.data, self.budget, self.base = data, budget, base
        names = CAUSAL if causal else (*PATTERNS, OWN)
        self.names = tuple(n for n in names if not context.quick or n in QUICK_PATTERNS)
        self.test = self._stretches(self.data.test).all()
        dev_batches = self._stretches(self.data.dev).all()
        self._evaluate = MeanLoss(loss, dev_batches, self.context.mesh)

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

    def run(self, name: str, pattern: str, rate: float, seed: int = 0) -> Run:
        """One training run, named ``KIND/NAME``."""
        train = self._stretches(self.data.train, seed)
        steps = self.budget.steps
        mask = self.masks(pattern, seed)
        own = anchors_of_own(self.budget.length) if pattern == OWN else 0
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
                copy_parameters(self.context.model(base), model)

        return Run(
            name=f"{self.kind}/{name}",
            config=config,
            make_model=lambda: language_model(
                train.vocabulary_size,
                self.budget.sizes,
                mask,
                causal=self.causal,
                own_projections=own,
                rngs=nnx.Rngs(seed),
            ),
            loss=loss,
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

    def attention_flops(self, pattern: str) -> tuple[float, float]:
        """FLOPs of attention per token of training, all layers: useful, executed."""
        length, sizes = self.budget.length, self.budget.sizes
        shape = (1, length, sizes.heads, sizes.features // sizes.heads)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        prices = [cost(x, x, x, mask=mask) for mask in self.masks(pattern)]
        useful = sum(p.flops_forward + p.flops_backward for p in prices)
        done = sum(p.flops_forward_executed + p.flops_backward_executed for p in prices)
        return useful / length, done / length

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


def close_rows(found: dict[str, float]) -> list[str]:
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
        swept: the sweep with the pattern :data:`SWEPT`, which sets the rate of all.
        by_pattern: by name of the pattern, then by seed.
    """

    bases: dict[int, Trained]
    swept: Sweep
    by_pattern: dict[str, dict[int, Trained]]

    def summaries(self) -> list[Json]:
        """The summaries of all runs."""
        each = [self.bases, *self.by_pattern.values()]
        kept = [trained.summary for runs in each for trained in runs.values()]
        return [*kept, *(s for s in self.swept.summaries if s not in kept)]


def train_patterns(task: Task, base: Task) -> Runs | None:
    """Trains each pattern once, then full attention and close ones with more seeds."""
    context = task.context
    bases: dict[int, Trained] = {}
    found: dict[str, dict[int, Trained]] = {}

    def train_base(seed: int) -> None:
        trained = context.train(base.base_run(seed))
        if trained is not None:
            bases[seed] = trained

    train_base(0)
    swept = sweep(
        context,
        lambda rate: task.run(SWEPT, SWEPT, rate),
        RATES[:1] if context.quick else RATES,
    )
    if swept is None:
        return None
    for summary in swept.summaries:
        if summary["config"]["rate"] == swept.rate:
            found[SWEPT] = {0: Trained(summary, None, [])}

    def train_all(patterns: Iterable[str], seed: int) -> bool:
        """Trains the patterns; returns whether none is left out."""
        for pattern in patterns:
            if seed in found.get(pattern, {}):
                continue
            name = f"{pattern.replace(' ', '-')}/seed-{seed}"
            trained = context.train(task.run(name, pattern, swept.rate, seed))
            if trained is not None:
                found.setdefault(pattern, {})[seed] = trained
        return seed in bases and all(seed in found.get(p, {}) for p in patterns)

    if not train_all(task.names, 0):
        return None
    first = {name: runs[0].summary["best"]["loss"] for name, runs in found.items()}
    again = dict.fromkeys(["full", *close_rows(first)])
    done = True
    for seed in range(1, 1 if context.quick else SEEDS):
        train_base(seed)
        done = train_all(again, seed) and done
    return Runs(bases, swept, found) if done else None


def results_of(task: Task, found: Runs) -> list[Json]:
    """A row for each pattern, best first."""
    seconds = task.step_seconds(found.swept.rate)
    tests = {
        name: {seed: t.summary["measured"] for seed, t in runs.items()}
        for name, runs in found.by_pattern.items()
    }
    rows: list[Json] = []
    for name, runs in found.by_pattern.items():
        useful, executed = task.attention_flops(name)
        own, full = tests[name], tests["full"]
        # Runs of one seed have the same data in the same order.
        apart = [own[s]["loss"] - full[s]["loss"] for s in own]
        curve, beside = (
            np.mean([each[s]["by_position"] for s in own], 0) for each in (own, full)
        )
        rows.append({
            "pattern": name,
            "density": float(
                np.mean([m.density(task.budget.length) for m in task.masks(name)])
            ),
            "seeds": len(runs),
            "dev_loss": interval([t.summary["best"]["loss"] for t in runs.values()]),
            "test_loss": interval([t["loss"] for t in own.values()]),
            "against_full": interval(apart),
            "test_accuracy": interval([100 * t["accuracy"] for t in own.values()]),
            "by_position": curve.tolist(),
            "by_position_against_full": [
                [at, own_loss - loss]
                for (at, own_loss), (_, loss) in zip(curve, beside, strict=True)
            ],
            "seconds_per_step": seconds[name],
            "minutes": runs[0].summary["seconds"] / 60,
            "speed_against_full": seconds["full"] / seconds[name],
            "attention_flops_per_token": [useful, executed],
            "parameters": runs[0].summary["parameters"],
            "tokens": [t.summary["tokens"] for t in runs.values()],
        })
    return sorted(rows, key=lambda row: row["test_loss"][0])


def study(context: Context) -> Page | None:
    """Trains and compares all patterns, for masked and causal language models."""
    budget, short = (QUICK, QUICK_BASE) if context.quick else (BUDGET, BASE)
    # The data of a run must not depend on the number of devices: one row, one device.
    alone = context.dividing(budget.rows)
    data = budget.read(context)
    tasks, trained = [], []
    for causal in (False, True):
        base = Task(alone, data, causal, short)
        tasks.append(Task(alone, data, causal, budget, base))
        trained.append(train_patterns(tasks[-1], base))
    done = {
        task.kind: found
        for task, found in zip(tasks, trained, strict=True)
        if found is not None
    }
    if len(done) < len(tasks):
        return None
    return page(
        {task.kind: results_of(task, done[task.kind]) for task in tasks},
        {kind: found.swept for kind, found in done.items()},
        SWEPT,
        (short, budget),
        {
            kind: interval([t.summary["best"]["loss"] for t in found.bases.values()])
            for kind, found in done.items()
        },
        data.counts,
        [s for found in done.values() for s in found.summaries()],
    )
