"""Does the graph of a pattern tell from how far a model can recall?"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.bench.graph import reach, reach_through
from attnlab.masks import Mask
from benchmarks.studies.context import Context
from benchmarks.studies.evaluation import MeanLoss
from benchmarks.studies.language_models import (
    PATTERNS,
    Sizes,
    language_model,
    layer_masks,
    loss,
    losses_and_hits,
)
from benchmarks.studies.optimisers import adam
from benchmarks.studies.page import Chart, Page, Table, cost_of, lines
from benchmarks.studies.parallel import over_batch
from benchmarks.studies.puzzles import KEYS, VALUES, ListOps, Recall
from benchmarks.studies.record import Json, fingerprint
from benchmarks.studies.stretches import Stretch
from benchmarks.studies.training import Run, Trained

SIZES = Sizes(features=64, heads=4, layers=3)
LENGTH, ROWS, STEPS, RATE = 256, 32, 1500, 2e-3
#: From a value to the question for it: each row of the table has its own.
DISTANCES = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 224))
#: Batches of the test, for each distance; of ListOps in all; likewise to choose by.
TESTED, DEV = 16, 4
#: Of ListOps.
LISTS = ("full", "window", "anchor", "random", "window+anchor", "all three")


class Task:
    """One puzzle, solved by models that differ in their pattern alone.

    A model reads in both directions, as where anchors can pass on what they have seen.
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
        self.patterns = tuple(PATTERNS) if name == "recall" else LISTS
        if quick:
            self.patterns = self.patterns[:2]

    def data(self) -> Recall | ListOps:
        """What the models learn from."""
        if self.name == "recall":
            whole = (self.distances[0][0], self.distances[-1][1])
            return Recall(length=self.length, rows=self.rows, distances=whole)
        return ListOps(length=self.length, rows=self.rows)

    def apart(self, count: int, purpose: str) -> dict[tuple[int, int], list[Stretch]]:
        """Batches that no model learns from, by distance; ListOps knows none."""
        data, count = self.data(), 1 if self.context.quick else count
        if isinstance(data, Recall):
            return {d: data.apart(d, count, purpose=purpose) for d in self.distances}
        return {(0, 0): data.apart(4 * count, purpose=purpose)}

    def masks(self, pattern: str) -> list[Mask]:
        """Of each layer."""
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
        """A run for each pattern."""
        dev = [b for batches in self.apart(DEV, "dev").values() for b in batches]
        return self.context.train_all(self.run(p, dev) for p in self.patterns)

    def tests(self) -> dict[tuple[int, int], list[Stretch]]:
        """Batches to report, by distance."""
        return self.apart(TESTED, "test")

    def accuracy(self, model: Any) -> list[float]:
        """Share of the questions of :meth:`tests` that are answered right."""
        counts = over_batch(_counts, self.context.mesh)
        found = []
        for batches in self.tests().values():
            rows = np.concatenate([np.asarray(counts(model, b)) for b in batches])
            found.append(float(rows[:, 0].sum() / rows[:, 1].sum()))
        return found

    def predicted(
        self, pattern: str, batches: Sequence[Stretch]
    ) -> tuple[float, float]:
        """What the graph says of some questions of :class:`Recall`.

        Returns:
            The share that can be answered, because paths lead to the question from the
            value and from its key, and a guess for each of the others; and what nobody
            can exceed: a guess only where the value itself is out of reach.
        """
        seen = reach_through(self.masks(pattern), self.length)
        both, alone = [], []
        for batch in batches:
            tokens = np.asarray(batch.tokens)
            for row, ask in zip(*np.nonzero(batch.counted), strict=True):
                (key,) = np.flatnonzero(tokens[row] == tokens[row, ask] - KEYS)
                both.append(seen[ask, key] and seen[ask, key + 1])
                alone.append(seen[ask, key + 1])
        guess = 1 / VALUES
        expected, most = (
            float(np.mean(x)) * (1 - guess) + guess for x in (both, alone)
        )
        return expected, most


def _counts(model: Any, batch: Stretch) -> jax.Array:
    """``[B, 2]``: right answers, and questions."""
    _, hits = losses_and_hits(model, batch)
    return jnp.stack([hits.sum(1), batch.counted.sum(1)], 1)


def half_width(share: float, count: int) -> float:
    """Half the 95 % interval of a share, two of each kind added to those counted.

    References:
        Agresti and Coull, "Approximate is better than exact for interval estimation of
        binomial proportions", 1998.
    """
    share = (share * count + 2) / (count + 4)
    return float(1.96 * np.sqrt(share * (1 - share) / (count + 4)))


def recall_rows(task: Task, found: dict[str, Trained]) -> list[Json]:
    """Accuracy by distance, and what the graph says of it."""
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
            asked = int(sum(np.asarray(b.counted).sum() for b in batches))
            predicted, most = task.predicted(pattern, batches)
            half = half_width(measured, asked)
            at.append({
                "distances": distances,
                "questions": asked,
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
    """Accuracy on ListOps, and that of the commonest answer alone."""
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


def span(distances: tuple[int, int]) -> str:
    """``9-16``."""
    return "-".join(map(str, distances))


def study(context: Context) -> Page | None:
    """Recall by distance, and ListOps, through every pattern."""
    recall, lists = Task(context, "recall"), Task(context, "listops")
    recalled, listed = (task.train() for task in (recall, lists))
    if recalled is None or listed is None:
        return None
    rows = recall_rows(recall, recalled)
    lists_rows, commonest = list_rows(lists, listed)
    cells = [(row["pattern"], at) for row in rows for at in row["at"]]
    beyond = [
        f"{name} at {span(at['distances'])}" for name, at in cells if at["beyond"]
    ]
    errors = [abs(at["accuracy"] - at["predicted"]) for _, at in cells]
    worst, at_worst = max(
        cells, key=lambda c: abs(c[1]["accuracy"] - c[1]["predicted"])
    )
    best, least = (
        choose(lists_rows, key=lambda r: r["accuracy"]) for choose in (max, min)
    )

    def percent(row: Json) -> str:
        return f"{row['accuracy']:.1%} ± {row['half_width']:.1%}"

    layers = recall.sizes.layers
    return Page(
        title="Does the graph tell from how far a model recalls?",
        claim="A pattern is a graph, and a layer is a step on it: what a word can know "
        "after some layers is what paths of that length reach. A window needs many "
        "layers, random edges and anchors few.",
        answer=f"The graph of {layers} layers says what can be recalled: measured "
        f"accuracy is {np.mean(errors):.1%} from it on average over {len(cells)} cells "
        f"of pattern and distance, most in {worst} at {span(at_worst['distances'])} "
        f"({at_worst['accuracy']:.0%} measured, {at_worst['predicted']:.0%} said). "
        + (
            f"Beyond what any model can know: {', '.join(beyond)}. "
            if beyond
            else "Nowhere does a model know what no path brings. "
        )
        + f"ListOps of {lists.length // 4} to {lists.length} tokens: {best['pattern']} "
        f"is best ({percent(best)}), {least['pattern']} last ({percent(least)}); the "
        f"commonest answer alone is right in {commonest:.1%}. Each is one run. Long "
        "Range Arena's lists have 500 to 2,000 tokens, its models more parameters and "
        "steps, and its best results are near 37 %.",
        cost=cost_of(t.summary for t in (*recalled.values(), *listed.values())),
        tables=[
            Table(
                "Recall by the distance from value to question, measured / as the "
                f"graph says, in percent; a guess gets {1 / VALUES:.0%}. Connected: "
                f"pairs of {recall.length} words, by {layers} layers; layers: to full "
                "reach, if one alone were repeated; never: pairs that it does not "
                "connect.",
                [
                    "pattern",
                    "connected",
                    "layers",
                    "never",
                    *(span(d) for d in recall.distances),
                ],
                [
                    [
                        row["pattern"],
                        f"{row['connected']:.0%}",
                        row["layers_to_full_reach"],
                        f"{row['unreachable']:.0%}",
                        *(
                            f"{100 * a['accuracy']:.0f} / {100 * a['predicted']:.0f}"
                            for a in row["at"]
                        ),
                    ]
                    for row in rows
                ],
            ),
            Table(
                f"ListOps, {lists.length // 4} to {lists.length} tokens, ± half a 95 % "
                "interval.",
                ["pattern", "layers", "accuracy"],
                [
                    [row["pattern"], row["layers_to_full_reach"], percent(row)]
                    for row in lists_rows
                ],
            ),
        ],
        charts=[
            Chart(
                "distance",
                "Recall by distance: measured, and as the graph says.",
                lines(
                    {
                        what: {
                            row["pattern"]: [
                                (float(np.mean(a["distances"])), a[key])
                                for a in row["at"]
                            ]
                            for row in rows
                        }
                        for what, key in (
                            ("measured", "accuracy"),
                            ("predicted", "predicted"),
                        )
                    },
                    "distance",
                    log="x",
                ),
            )
        ],
        results={"recall": rows, "listops": lists_rows, "commonest": commonest},
    )
