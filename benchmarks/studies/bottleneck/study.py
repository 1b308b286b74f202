"""Does a sentence fit into one vector?"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.synthetic import Symbols
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.losses import forced
from benchmarks.studies.machinery.models.scoring import exact_matches, score_by_length
from benchmarks.studies.machinery.models.translation_runs import (
    BUDGET,
    SIZES,
    Task,
    counts_of,
    translators,
)
from benchmarks.studies.machinery.models.translators import (
    TRANSLATORS,
    Sizes,
    greedy,
    logits,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import Page, cost_of, lines, table
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.sweep import Chosen, train_at_best_rate
from benchmarks.studies.machinery.training import Run

#: Task of reversing sequences: lengths in training and in the test, and symbols.
LENGTHS, TESTED, SYMBOLS = (1, 40), (5, 10, 15, 20, 25, 30, 35, 40), 20
REVERSE_SIZES = Sizes(features=128, hidden_size=128, layers=2, dropout_rate=0.0)
REVERSE_STEPS, REVERSE_ROWS = 2500, 128
REVERSE_RATES = (1e-3, 2e-3, 4e-3)


def reverse_runs(context: Context) -> dict[str, Chosen] | None:
    """Each model, trained to reverse, at its best rate."""
    quick = context.quick
    rows = 16 if quick else REVERSE_ROWS
    context = context.dividing(rows)
    lengths = (1, 6) if quick else LENGTHS
    sizes = (
        REVERSE_SIZES._replace(features=8, hidden_size=8) if quick else REVERSE_SIZES
    )
    rates = REVERSE_RATES[:1] if quick else REVERSE_RATES
    whole = 6 if quick else REVERSE_STEPS
    task = Symbols("reverse", symbols=SYMBOLS, lengths=lengths, rows=rows)
    # The test has another seed.
    apart = Symbols("reverse", symbols=SYMBOLS, lengths=lengths, rows=rows, seed=1)
    seen = apart.test(sorted({*lengths, sum(lengths) // 2}))
    dev = MeanLoss(forced(logits), seen, context.mesh)

    def run(name: str, rate: float, steps: int) -> Run:
        return Run(
            name=f"reverse/{name}",
            config={
                "model": name,
                "sizes": sizes._asdict(),
                "symbols": SYMBOLS,
                "lengths": lengths,
                "rows": rows,
                "rate": rate,
            },
            make_model=lambda: TRANSLATORS[name](
                task.vocabulary_size, sizes, nnx.Rngs(0)
            ),
            loss=forced(logits),
            batch_at=task.batch_at,
            optimiser=adam(rate, steps=steps, warmup=max(steps // 20, 1)),
            steps=steps,
            evaluate=dev,
            evaluate_every=min(250, steps),
        )

    def train(name: str) -> Chosen | None:
        def at(rate: float, short: bool) -> Run:
            return run(name, rate, max(whole // 8, 3) if short else whole)

        return train_at_best_rate(context, at, rates)

    found = {name: train(name) for name in TRANSLATORS}
    done = {name: chosen for name, chosen in found.items() if chosen is not None}
    return done if len(done) == len(found) else None


def exact_by_length(
    context: Context, found: dict[str, Chosen]
) -> dict[str, list[tuple[float, float]]]:
    """Share of sequences reversed without a mistake, by length."""
    context = context.dividing(REVERSE_ROWS)
    lengths = (2, 4, 6) if context.quick else TESTED
    task = Symbols(
        "reverse",
        symbols=SYMBOLS,
        lengths=(1, 6) if context.quick else LENGTHS,
        rows=REVERSE_ROWS,
    )
    decode = over_batch(greedy, context.mesh)
    return {
        name: [
            (
                length,
                float(
                    np.mean([
                        exact_matches(decode(chosen.trained.model, *batch[:2]), batch)
                        for batch in task.test([length], 1 if context.quick else 4)
                    ])
                ),
            )
            for length in lengths
        ]
        for name, chosen in found.items()
    }


def share(part: Json, whole: Json) -> tuple[float, float]:
    """The quotient of two scores with intervals, and half the width of its interval.

    Both are 0 if ``whole`` is almost 0, as after a few steps of training.
    """
    if whole["value"] < 0.1:
        return 0.0, 0.0
    value = part["value"] / whole["value"]
    relative = [x["half_width"] / max(x["value"], 1e-9) for x in (part, whole)]
    return value, value * math.hypot(*relative)


def study(context: Context) -> Page | None:
    """Measures quality by length, for translation and for reversing sequences."""
    task = Task(context, BUDGET, SIZES)
    found, reversing = translators(task), reverse_runs(context)
    if found is None or reversing is None:
        return None
    pairs = task.corpus.split.test
    sources, references = [p.source for p in pairs], [p.target for p in pairs]
    classes: dict[str, list[Any]] = {
        name: score_by_length(sources, task.translate(chosen.trained.model), references)
        for name, chosen in found.items()
    }
    # Shares of the BLEU on the shortest sentences, and on the next class, which has
    # more of them.
    heads = [row["words"] for row in next(iter(classes.values()))]
    starts = (0, 1)[: len(heads) - 1]
    kept = {
        name: [share(rows[-1]["bleu"], rows[start]["bleu"]) for start in starts]
        for name, rows in classes.items()
    }
    exact = exact_by_length(context, reversing)
    longest = exact["additive"][-1][0]
    last = {name: points[-1][1] for name, points in exact.items()}

    panels = {
        metric: {
            name: [(r["mean_words"], r[key]["value"]) for r in rows]
            for name, rows in classes.items()
        }
        for metric, key in (("BLEU", "bleu"), ("chrF", "chrf"))
    }
    kept_table = [
        [name, *(f"{100 * x:.0f} ± {100 * y:.0f} %" for x, y in shares)]
        for name, shares in kept.items()
    ]
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "counts": counts_of(task),
            "longest_words": heads[-1],
            "longest_symbols": longest,
            "reversed": ", ".join(
                f"{name} {right:.0%}" for name, right in last.items()
            ),
            "cost": cost_of(
                s
                for chosen in (*found.values(), *reversing.values())
                for s in chosen.summaries
            ),
            "kept": table(["model", *(f"of {heads[i]}" for i in starts)], kept_table),
            "classes": table(
                ["words", "sentences", *classes],
                [
                    [
                        rows[0]["words"],
                        rows[0]["sentences"],
                        *(
                            f"{r['bleu']['value']:.1f} ± {r['bleu']['half_width']:.1f}"
                            for r in rows
                        ),
                    ]
                    for rows in zip(*classes.values(), strict=True)
                ],
            ),
            "exact": table(
                ["symbols", *exact],
                [
                    [points[0][0], *(f"{y:.1%}" for _, y in points)]
                    for points in zip(*exact.values(), strict=True)
                ],
            ),
        },
        charts={
            "translation": lines(panels, "words of the source"),
            "reverse": lines({"exact": exact}, "symbols"),
        },
        results={
            "classes": classes,
            "kept": kept,
            "exact": exact,
            "runs": {
                **{name: c.trained.summary for name, c in found.items()},
                **{f"reverse/{n}": c.trained.summary for n, c in reversing.items()},
            },
        },
    )
