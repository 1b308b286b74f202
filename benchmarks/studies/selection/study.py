"""Do patterns that each query chooses do better than fixed ones, and is it worth it?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import cost
from attnlab.masks import Mask
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.models.language_models import language_model
from benchmarks.studies.machinery.models.long_contexts import (
    BASE,
    BUDGET,
    QUICK,
    QUICK_BASE,
    Runs,
    Task,
    compared,
    train_patterns,
)
from benchmarks.studies.machinery.page import Page
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.training import Run
from benchmarks.studies.selection.layers import (
    CHOSEN,
    FIRST,
    FIXED,
    INDEXED,
    MIXTURE,
    TOLD,
    copy,
    layer,
    loss,
    products_of_choosing,
    seen_keys,
    selected,
    with_first_part,
)
from benchmarks.studies.selection.page import page
from benchmarks.studies.selection.puzzle import Puzzle

#: The learning rate of all runs: the best for causal models in ``patterns-lm``.
RATE = 4e-3
QUICK_PATTERNS = ("full", "window", MIXTURE, INDEXED)


class Selection(Task):
    """Causal language models, with layers that choose among them."""

    loss = staticmethod(loss)
    copy = staticmethod(copy)

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
        mask = self.masks(pattern, seed)
        return with_first_part(
            self.context, run, rate, lambda: self.model(pattern, mask, seed, "all")
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
        choosing = 2 * products_of_choosing(pattern, length, sizes.heads, size)
        layers = sizes.layers
        return layers * self.keys_seen(pattern) * of_pair, layers * choosing


def results_of(task: Selection, runs: Runs) -> list[Json]:
    """A row for each pattern, best first."""
    rows = []
    for name, row in compared(runs, task.step_seconds(RATE)).items():
        of_seen, of_choosing = task.flops(name)
        measured = runs.by_pattern[name][0].summary["measured"]
        rows.append({
            **row,
            "keys_seen": task.keys_seen(name),
            "attention_flops_per_token": of_seen,
            "choosing_flops_per_token": of_choosing,
            "selected": measured.get("selected", []),
        })
    return sorted(rows, key=lambda row: row["test_loss"][0])


def study(context: Context) -> Page | None:
    """Trains and compares language models, and recall over long distances."""
    budget, short = (QUICK, QUICK_BASE) if context.quick else (BUDGET, BASE)
    # The data of a run must not depend on the number of devices: one row, one device.
    alone = context.dividing(1)
    data = budget.read(context)
    names = QUICK_PATTERNS if context.quick else (*FIXED, *CHOSEN)
    base = Task(alone, data, True, short, ())
    task = Selection(alone, data, True, budget, names, base)
    puzzle = Puzzle(alone)
    runs, recalled = train_patterns(task, RATE), puzzle.train()
    if runs is None or recalled is None:
        return None
    return page(
        results_of(task, runs),
        recalled,
        puzzle.distances,
        (short, budget, RATE, FIRST),
        data.counts,
        [*runs.summaries(), *recalled.values()],
    )
