"""Do patterns that each query chooses do better than fixed ones, and is it worth it?"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import cost
from attnlab.masks import Mask
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.models.language_models import (
    Budget,
    Sizes,
    language_model,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import Page, interval
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.training import Run, Trained
from benchmarks.studies.patterns_lm.study import BASE, BUDGET, close_rows
from benchmarks.studies.patterns_lm.study import Task as Patterns
from benchmarks.studies.selection.layers import (
    CHOSEN,
    FIXED,
    INDEXED,
    MIXTURE,
    TOLD,
    compared,
    copy,
    layer,
    loss,
    seen_keys,
    selected,
)
from benchmarks.studies.selection.page import page
from benchmarks.studies.selection.puzzle import Puzzle

#: The learning rate of all runs: the best for causal models in ``patterns-lm``.
RATE = 4e-3
SEEDS = 3
#: The share of the steps in which an indexer learns from attention to all.
FIRST = 0.25
QUICK = Budget(6, 128, 2, 400, limit=12, test=2, dev=2, sizes=Sizes(16, 2, 2))
QUICK_BASE = QUICK._replace(length=64)


class Task(Patterns):
    """Causal language models as in ``patterns-lm``, with layers that choose, too."""

    loss = staticmethod(loss)
    copy = staticmethod(copy)

    def patterns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the patterns, and of those of quick forms."""
        return (*FIXED, *CHOSEN), ("full", "window", MIXTURE, INDEXED)

    def masks(self, pattern: str, seed: int = 0) -> list[Mask]:
        """The mask of each layer; of those that choose, what they choose from."""
        return super().masks(pattern if pattern in FIXED else "full", seed)

    def model(
        self, pattern: str, mask: list[Mask], seed: int, learn: str = "selected"
    ) -> nnx.Module:
        """A new model."""
        return language_model(
            self.data.vocabulary.size,
            self.budget.sizes,
            mask,
            causal=True,
            rngs=nnx.Rngs(seed),
            attention=layer(pattern, self.budget.length, learn),
        )

    def run(self, name: str, pattern: str, rate: float, seed: int = 0) -> Run:
        """One training run; that of an indexer continues one that attends to all."""
        run = super().run(name, pattern, rate, seed)
        if pattern != INDEXED:
            return run
        first = max(round(FIRST * run.steps), 1)
        mask, rest = self.masks(pattern, seed), run.steps - first

        def part(steps: int, **changes: Any) -> Run:
            return dataclasses.replace(
                run,
                steps=steps,
                optimiser=adam(rate, steps=steps, warmup=max(steps // 10, 1)),
                evaluate_every=max(steps // 4, min(3, steps)),
                **changes,
            )

        before = part(
            first,
            name=f"{run.name}/first",
            config={**run.config, "learn": "all"},
            make_model=lambda: self.model(pattern, mask, seed, "all"),
        )
        return part(
            rest,
            config={**run.config, "first": first},
            batch_at=lambda step: run.batch_at(step + first),
            begin=lambda model: copy(self.context.model(before), model),
        )

    def on_test(self, model: Any) -> Json:
        """As of other patterns; and what layers select, by distance."""
        found = super().on_test(model)
        attention = model.stack.each()[0].attention
        if isinstance(attention, TOLD):
            layers = selected(model, jnp.asarray(self.test[0].tokens[:1]))
            found["selected"] = [
                {name: np.asarray(x).tolist() for name, x in each._asdict().items()}
                for each in layers
            ]
        return found

    def keys_seen(self, pattern: str) -> float:
        """Keys that a query sees, mean over queries and layers."""
        length = self.budget.length
        if pattern in FIXED:
            density = np.mean([m.density(length) for m in self.masks(pattern)])
            return float(density * length)
        return float(seen_keys(pattern, length).mean())

    def flops(self, pattern: str) -> tuple[float, float]:
        """FLOPs a token, all layers: of what is seen, in training; of choosing."""
        length, sizes = self.budget.length, self.budget.sizes
        size = sizes.features // sizes.heads
        x = jax.ShapeDtypeStruct((1, length, sizes.heads, size), jnp.float32)
        whole = cost(x, x, x)
        of_pair = (whole.flops_forward + whole.flops_backward) / length**2
        choosing = 2 * compared(pattern, length, sizes.heads, size)
        layers = sizes.layers
        return layers * self.keys_seen(pattern) * of_pair, layers * choosing


def train(task: Task) -> dict[str, dict[int, Trained]] | None:
    """Trains each pattern once, then full attention and close ones with more seeds."""
    context, found = task.context, {}

    def train_all(patterns: list[str], seed: int) -> bool:
        for pattern in patterns:
            name = f"{pattern.replace(' ', '-')}/seed-{seed}"
            trained = context.train(task.run(name, pattern, RATE, seed))
            if trained is not None:
                found.setdefault(pattern, {})[seed] = trained
        return all(seed in found.get(p, {}) for p in patterns)

    if not train_all(list(task.names), 0):
        return None
    first = {name: runs[0].summary["best"]["loss"] for name, runs in found.items()}
    again = list(dict.fromkeys(["full", *close_rows(first)]))
    for seed in range(1, 1 if context.quick else SEEDS):
        train_all(again, seed)
    return found


def results_of(task: Task, found: dict[str, dict[int, Trained]]) -> list[Json]:
    """A row for each pattern, best first."""
    seconds = task.step_seconds(RATE)
    tests = {
        name: {seed: t.summary["measured"] for seed, t in runs.items()}
        for name, runs in found.items()
    }
    rows: list[Json] = []
    for name, runs in found.items():
        own, full = tests[name], tests["full"]
        # Runs of one seed have the same data in the same order.
        both = [seed for seed in own if seed in full]
        apart = [own[s]["loss"] - full[s]["loss"] for s in both]
        of_seen, of_choosing = task.flops(name)
        rows.append({
            "pattern": name,
            "keys_seen": task.keys_seen(name),
            "seeds": len(runs),
            "dev_loss": interval([t.summary["best"]["loss"] for t in runs.values()]),
            "test_loss": interval([t["loss"] for t in own.values()]),
            "against_full": interval(apart),
            "test_accuracy": interval([100 * t["accuracy"] for t in own.values()]),
            "by_position": np.mean(
                [t["by_position"] for t in own.values()], 0
            ).tolist(),
            "seconds_per_step": seconds[name],
            "speed_against_full": seconds["full"] / seconds[name],
            "attention_flops_per_token": of_seen,
            "choosing_flops_per_token": of_choosing,
            "parameters": runs[0].summary["parameters"],
            "selected": own[0].get("selected", []),
        })
    return sorted(rows, key=lambda row: row["test_loss"][0])


def study(context: Context) -> Page | None:
    """Trains and compares language models, and recall over long distances."""
    budget, short = (QUICK, QUICK_BASE) if context.quick else (BUDGET, BASE)
    # The data of a run must not depend on the number of devices: one row, one device.
    alone = context.dividing(1)
    data = budget.read(context)
    task = Task(alone, data, True, budget, Task(alone, data, True, short))
    puzzle = Puzzle(alone)
    models, recalled = train(task), puzzle.train()
    if models is None or recalled is None:
        return None
    return page(
        results_of(task, models),
        recalled,
        puzzle.distances,
        (short, budget, RATE, FIRST),
        data.counts,
        [
            *(t.summary for runs in models.values() for t in runs.values()),
            *recalled.values(),
        ],
    )
