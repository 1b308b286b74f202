"""How good are sparse patterns in language models, and how much time do they save?"""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import cost
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.models.language_models import OWN, PATTERNS
from benchmarks.studies.machinery.models.long_contexts import (
    BASE,
    BUDGET,
    QUICK,
    QUICK_BASE,
    Runs,
    Task,
    compared,
    train_base,
    train_patterns,
)
from benchmarks.studies.machinery.page import Page, interval
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.sweep import Sweep, sweep
from benchmarks.studies.machinery.training import Trained
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
QUICK_PATTERNS = ("full", "window", "all three", OWN)


class Patterns(Task):
    """Language models with fixed patterns."""

    def attention_flops(self, pattern: str) -> tuple[float, float]:
        """FLOPs of attention per token of training, all layers: useful, executed."""
        length, sizes = self.budget.length, self.budget.sizes
        shape = (1, length, sizes.heads, sizes.features // sizes.heads)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        prices = [cost(x, x, x, mask=mask) for mask in self.masks(pattern)]
        useful = sum(p.flops_forward + p.flops_backward for p in prices)
        done = sum(p.flops_forward_executed + p.flops_backward_executed for p in prices)
        return useful / length, done / length


def train(task: Patterns) -> tuple[Sweep, Runs] | None:
    """Sweeps the learning rate with one pattern, then trains all patterns."""
    bases = train_base(task, 0)
    swept = sweep(
        task.context,
        lambda rate: task.run(SWEPT, SWEPT, rate),
        RATES[:1] if task.context.quick else RATES,
    )
    if swept is None:
        return None
    best = [s for s in swept.summaries if s["config"]["rate"] == swept.rate]
    done = {SWEPT: {0: Trained(best[0], None, [])}} if best else {}
    runs = train_patterns(task, swept.rate, Runs(bases, done))
    return None if runs is None else (swept, runs)


def results_of(task: Patterns, swept: Sweep, runs: Runs) -> list[Json]:
    """A row for each pattern, best first."""
    rows = [
        {
            **row,
            "density": float(
                np.mean([m.density(task.budget.length) for m in task.masks(name)])
            ),
            "attention_flops_per_token": list(task.attention_flops(name)),
        }
        for name, row in compared(runs, task.step_seconds(swept.rate)).items()
    ]
    return sorted(rows, key=lambda row: row["test_loss"][0])


def study(context: Context) -> Page | None:
    """Trains and compares all patterns, for masked and causal language models."""
    budget, short = (QUICK, QUICK_BASE) if context.quick else (BUDGET, BASE)
    # The data of a run must not depend on the number of devices: one row, one device.
    alone = context.dividing(budget.rows)
    data = budget.read(context)
    tasks, trained = [], []
    for causal in (False, True):
        base = Task(alone, data, causal, short, ())
        names = [
            name
            for name in (CAUSAL if causal else (*PATTERNS, OWN))
            if not context.quick or name in QUICK_PATTERNS
        ]
        tasks.append(Patterns(alone, data, causal, budget, names, base))
        trained.append(train(tasks[-1]))
    done = {
        task.kind: found
        for task, found in zip(tasks, trained, strict=True)
        if found is not None
    }
    if len(done) < len(tasks):
        return None
    summaries = [s for _, runs in done.values() for s in runs.summaries()]
    tried = [s for swept, _ in done.values() for s in swept.summaries]
    return page(
        {task.kind: results_of(task, *done[task.kind]) for task in tasks},
        {kind: swept for kind, (swept, _) in done.items()},
        SWEPT,
        (short, budget),
        {
            kind: interval([t.summary["best"]["loss"] for t in runs.bases.values()])
            for kind, (_, runs) in done.items()
        },
        data.counts,
        [*summaries, *(s for s in tried if s not in summaries)],
    )
