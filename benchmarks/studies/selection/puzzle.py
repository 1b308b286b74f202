"""Recall over long distances with layers that choose, and with fixed patterns."""

from typing import Any

import numpy as np
from flax import nnx

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.puzzles import Recall
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.models.language_models import (
    Sizes,
    hits_of_rows,
    language_model,
    layer_masks,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import half_width
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.training import Run
from benchmarks.studies.selection.layers import (
    CHOSEN,
    FIXED,
    INDEXED,
    NATIVE,
    copy,
    layer,
    loss,
    with_first_part,
)

SIZES = Sizes(features=64, heads=4, layers=3)
#: The base model reads short texts with full attention; every run continues it.
BASE_LENGTH, BASE_ROWS, BASE_STEPS, BASE_RATE = 256, 32, 1500, 2e-3
LENGTH, ROWS, STEPS, RATE = 4096, 2, 300, 1e-3
#: Ranges of distances from a value to the question for it, tested separately.
DISTANCES = ((1, 128), (129, 512), (513, 1536), (1537, 3800))
TESTED, DEV = 24, 4


class Puzzle:
    """Eight values and a question for each, in one long text."""

    def __init__(self, context: Context):
        quick = self.quick = context.quick
        self.context = context
        self.sizes = Sizes(16, 2, 2) if quick else SIZES
        self.length = 128 if quick else LENGTH
        self.distances = ((1, 16), (17, 100)) if quick else DISTANCES
        self.patterns = (*FIXED, *CHOSEN)
        if quick:
            self.patterns = ("full", NATIVE)

    def data(self, length: int, rows: int) -> Recall:
        """The puzzle as training data."""
        far = min(self.distances[-1][1], 7 * length // 8)
        return Recall(length=length, rows=rows, distances=(1, far), pairs=8)

    def base(self) -> Run:
        """The run of the base model."""
        length, rows = (64, 4) if self.quick else (BASE_LENGTH, BASE_ROWS)
        steps = 6 if self.quick else BASE_STEPS
        return self._run("base", "full", length, rows, steps, BASE_RATE)

    def run(self, pattern: str) -> Run:
        """The run with a pattern."""
        rows, steps = (2, 6) if self.quick else (ROWS, STEPS)
        return self._run(pattern, pattern, self.length, rows, steps, RATE)

    def _run(
        self, name: str, pattern: str, length: int, rows: int, steps: int, rate: float
    ) -> Run:
        data, layers = self.data(length, rows), self.sizes.layers
        mask = layer_masks(
            pattern if pattern in FIXED else "full", length, layers, causal=True
        )
        config: Json = {
            "pattern": pattern,
            "masks": [repr(m) for m in mask],
            "length": length,
            "rows": rows,
            "sizes": self.sizes._asdict(),
            "rate": rate,
        }
        begin = None
        if name != "base":
            base = self.base()
            config["base"] = base.config

            def begin(model: nnx.Module) -> None:
                copy(self.context.model(base), model)

        dev = self.data(length, rows).apart((1, 7 * length // 8), DEV, purpose="dev")

        def make_model(learn: str = "selected") -> nnx.Module:
            return language_model(
                data.vocabulary_size,
                self.sizes,
                mask,
                causal=True,
                rngs=nnx.Rngs(0),
                attention=layer(pattern, length, learn),
            )

        run = Run(
            name=f"recall/{name.replace(' ', '-')}",
            config=config,
            make_model=make_model,
            loss=loss,
            batch_at=data.batch_at,
            optimiser=adam(rate, steps=steps, warmup=max(steps // 20, 1)),
            steps=steps,
            evaluate=MeanLoss(loss, dev, self.context.mesh),
            evaluate_every=max(steps // 5, min(3, steps)),
            begin=begin,
            measure=lambda model, _: self.measured(model),
        )
        if pattern != INDEXED:
            return run
        return with_first_part(self.context, run, rate, lambda: make_model("all"))

    def measured(self, model: Any) -> Json:
        """Accuracy, half its 95 % interval and number of questions by distance."""
        counts = over_batch(hits_of_rows, self.context.mesh)
        found: Json = {"accuracy": [], "half_width": [], "questions": []}
        data = self.data(self.length, ROWS)
        for distances in self.distances:
            tests = data.apart(distances, 2 if self.quick else TESTED, purpose="test")
            rows = np.concatenate([np.asarray(counts(model, b)) for b in tests])
            share = float(rows[:, 0].sum() / rows[:, 1].sum())
            found["accuracy"].append(share)
            # Answers within one text are not independent: count texts.
            found["half_width"].append(half_width(share, len(rows)))
            found["questions"].append(int(rows[:, 1].sum()))
        return found

    def train(self) -> dict[str, Json] | None:
        """Trains the base and a model with each pattern.

        Returns:
            The summaries by name of the run; None if ``--only`` leaves out one.
        """
        runs = [self.base(), *map(self.run, self.patterns)]
        trained = self.context.train_all(runs)
        if trained is None:
            return None
        names = ("base", *self.patterns)
        return {
            name: run.summary for name, run in zip(names, trained.values(), strict=True)
        }
