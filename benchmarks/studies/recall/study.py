"""Does the graph of a pattern predict from how far a model can recall?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from attnlab._src.masks.graph import reach, reach_through
from attnlab.masks import Mask
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.puzzles import KEYS, VALUES, ListOps, Recall
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.models.language_models import (
    PATTERNS,
    Sizes,
    hits_of_rows,
    language_model,
    layer_masks,
    loss,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import Page, half_width
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json, fingerprint
from benchmarks.studies.machinery.training import Run, Trained
from benchmarks.studies.recall.page import page

SIZES = Sizes(features=64, heads=4, layers=3)
LENGTH, ROWS, STEPS, RATE = 256, 32, 1500, 2e-3
#: Ranges of distances from a value to the question for it, tested separately.
DISTANCES = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 224))
#: Batches of the test and of the dev set for each range of distances; for ListOps four
#: times as many in all.
TESTED, DEV = 16, 4
#: "reach": a row has one value, and eight questions for it. "recall": a row has eight
#: values, and a question for each.
PUZZLES = {
    "reach": {"pairs": 1, "questions": 8},
    "recall": {"pairs": 8, "questions": 1},
}
#: Patterns that are tried on ListOps.
LISTS = ("full", "window", "anchor", "random", "window+anchor", "all three")


class Task:
    """One puzzle, solved by models that differ only in their pattern.

    Models are not causal, so that anchors can pass on what they see.
    """

    def __init__(self, context: Context, name: str):
        quick = context.quick
        self.name = name
        self.rows = 4 if quick else ROWS
        self.context = context.dividing(self.rows)
        self.sizes = Sizes(16, 2, 2) if quick else SIZES
        self.steps = 6 if quick else STEPS
        self.length = 64 if quick else LENGTH
        self.distances = ((1, 4), (30, 34)) if quick else DISTANCES
        self.patterns = LISTS if name == "listops" else tuple(PATTERNS)
        if quick:
            self.patterns = self.patterns[:2]

    def data(self) -> Recall | ListOps:
        """The puzzle as training data."""
        if self.name == "listops":
            return ListOps(length=self.length, rows=self.rows)
        return Recall(
            length=self.length,
            rows=self.rows,
            distances=(self.distances[0][0], self.distances[-1][1]),
            **PUZZLES[self.name],
        )

    def apart(self, count: int, purpose: str) -> dict[tuple[int, int], list[Stretch]]:
        """Batches not used in training, by distances; ``(0, 0)`` for ListOps."""
        data, count = self.data(), 1 if self.context.quick else count
        if isinstance(data, Recall):
            return {d: data.apart(d, count, purpose=purpose) for d in self.distances}
        return {(0, 0): data.apart(4 * count, purpose=purpose)}

    def masks(self, pattern: str) -> list[Mask]:
        """The mask of each layer."""
        return layer_masks(pattern, self.length, self.sizes.layers, False)

    def run(self, pattern: str, dev: Sequence[Stretch]) -> Run:
        """One training run."""
        data, mask = self.data(), self.masks(pattern)
        return Run(
            name=f"{self.name}/{pattern.replace(' ', '-')}",
            config={
                "pattern": pattern,
                "masks": [repr(m) for m in mask],
                "drawn": fingerprint(mask, data.batch_at(0)),
                "sizes": self.sizes._asdict(),
                "rate": RATE,
            },
            make_model=lambda: language_model(
                data.vocabulary_size,
                self.sizes,
                mask,
                causal=False,
                rngs=nnx.Rngs(0),
            ),
            loss=loss,
            batch_at=data.batch_at,
            optimiser=adam(RATE, steps=self.steps, warmup=max(self.steps // 20, 1)),
            steps=self.steps,
            evaluate=MeanLoss(loss, dev, self.context.mesh),
            evaluate_every=max(self.steps // 5, min(3, self.steps)),
            measure=lambda model, _: {"accuracy": self.accuracy(model)},
        )

    def train(self) -> dict[str, Trained] | None:
        """Trains a model with each pattern."""
        dev = [b for batches in self.apart(DEV, "dev").values() for b in batches]
        return self.context.train_all(self.run(p, dev) for p in self.patterns)

    def tests(self) -> dict[tuple[int, int], list[Stretch]]:
        """Batches of the test, by range of distances."""
        return self.apart(TESTED, "test")

    def accuracy(self, model: Any) -> list[float]:
        """Share of right answers in :meth:`tests`, for each range of distances."""
        counts = over_batch(hits_of_rows, self.context.mesh)
        found = []
        for batches in self.tests().values():
            rows = np.concatenate([np.asarray(counts(model, b)) for b in batches])
            found.append(float(rows[:, 0].sum() / rows[:, 1].sum()))
        return found

    def predicted(
        self, pattern: str, batches: Sequence[Stretch]
    ) -> tuple[float, float]:
        """The accuracy that the graph predicts for questions of :class:`Recall`.

        Returns:
            The predicted accuracy: a question is answered if paths lead to it from the
            value and, unless there is only one value, from its key; other answers are
            guesses. And an upper bound: only questions that no path from the value
            reaches are guesses.
        """
        seen = reach_through(self.masks(pattern), self.length)
        only = PUZZLES[self.name]["pairs"] == 1
        both, alone = [], []
        for batch in batches:
            tokens = np.asarray(batch.tokens)
            for row, ask in zip(*np.nonzero(batch.counted), strict=True):
                (key,) = np.flatnonzero(tokens[row] == tokens[row, ask] - KEYS)
                both.append((only or seen[ask, key]) and seen[ask, key + 1])
                alone.append(seen[ask, key + 1])
        guess = 1 / VALUES
        expected, most = (
            float(np.mean(x)) * (1 - guess) + guess for x in (both, alone)
        )
        return expected, most


def recall_rows(task: Task, found: dict[str, Trained]) -> list[Json]:
    """A row for each pattern: accuracy and prediction by distance."""
    tests = task.tests()
    rows: list[Json] = []
    for pattern, trained in zip(task.patterns, found.values(), strict=True):
        masks = task.masks(pattern)
        graph = reach(masks[0], task.length)
        pairs = task.length * (task.length - 1)
        connected = reach_through(masks, task.length).sum() - task.length
        at = []
        shares = trained.summary["measured"]["accuracy"]
        for (distances, batches), measured in zip(tests.items(), shares, strict=True):
            counted = np.concatenate([np.asarray(b.counted) for b in batches])
            predicted, most = task.predicted(pattern, batches)
            # Answers within one text are not independent: count texts.
            half = half_width(measured, int(counted.any(1).sum()))
            at.append({
                "distances": distances,
                "questions": int(counted.sum()),
                "accuracy": measured,
                "half_width": half,
                "predicted": predicted,
                "most": most,
                "beyond": measured - half > most,
            })
        rows.append({
            "pattern": pattern,
            "connected": float(connected / pairs),
            "layers_to_full_reach": graph.layers,
            "unreachable": graph.unreachable,
            "at": at,
        })
    return rows


def list_rows(task: Task, found: dict[str, Trained]) -> tuple[list[Json], float]:
    """A row for each pattern on ListOps, and the share of the most frequent answer."""
    (batches,) = task.tests().values()
    answers = np.concatenate([b.labels[np.asarray(b.counted)] for b in batches])
    rows: list[Json] = []
    for pattern, trained in zip(task.patterns, found.values(), strict=True):
        (share,) = trained.summary["measured"]["accuracy"]
        rows.append({
            "pattern": pattern,
            "accuracy": share,
            "half_width": half_width(share, len(answers)),
            "layers_to_full_reach": reach(task.masks(pattern)[0], task.length).layers,
        })
    return rows, float(np.bincount(answers).max() / len(answers))


def study(context: Context) -> Page | None:
    """Trains and tests reach and recall by distance, and ListOps."""
    tasks = [Task(context, name) for name in (*PUZZLES, "listops")]
    trained = [runs for task in tasks if (runs := task.train()) is not None]
    if len(trained) < len(tasks):
        return None
    *puzzles, lists = zip(tasks, trained, strict=True)
    list_table, commonest = list_rows(*lists)
    return page(
        {task.name: recall_rows(task, runs) for task, runs in puzzles},
        list_table,
        commonest,
        length=tasks[0].length,
        layers=tasks[0].sizes.layers,
        summaries=[t.summary for runs in trained for t in runs.values()],
    )
