"""How well do three models translate, given the same data and budget?"""

from pathlib import Path

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.models.scoring import Score, score
from benchmarks.studies.machinery.models.translation_runs import (
    BUDGET,
    SIZES,
    Task,
    counts_of,
    translators,
)
from benchmarks.studies.machinery.page import Page, cost_of, lines, smooth, table

#: Test sentences shown on the page.
SHOWN = 6


def study(context: Context) -> Page | None:
    """Trains all three models, and translates the test set with each."""
    task = Task(context, BUDGET, SIZES)
    found = translators(task)
    if found is None:
        return None
    pairs = task.corpus.split.test
    references = [p.target for p in pairs]
    said = {name: task.translate(c.trained.model) for name, c in found.items()}
    scores: dict[str, dict[str, Score]] = {
        name: score(texts, references) for name, texts in said.items()
    }
    runs = {name: chosen.trained.summary for name, chosen in found.items()}
    rows = [
        [
            name,
            run["parameters"],
            found[name].rate,
            run["best"]["loss"],
            str(scores[name]["bleu"]),
            str(scores[name]["chrf"]),
            run["seconds"] / 60,
            round(run["tokens_per_second"]),
        ]
        for name, run in runs.items()
    ]
    longest = max(range(len(pairs)), key=lambda i: len(pairs[i].source))
    shown = [*range(0, len(pairs), max(len(pairs) // SHOWN, 1))][:SHOWN] + [longest]
    examples = [
        [i + 1, who, text]
        for i in shown
        for who, text in (
            ("source", pairs[i].source),
            ("reference", pairs[i].target),
            *((name, texts[i]) for name, texts in said.items()),
        )
    ]
    bleu = {name: found["bleu"] for name, found in scores.items()}
    best, worst = (
        choose(bleu, key=lambda name: bleu[name].value) for choose in (max, min)
    )
    curves = {
        name: smooth(
            [(r["tokens"], r["loss"]) for r in chosen.trained.log if "loss" in r], 50
        )
        for name, chosen in found.items()
    }
    header = "model, parameters, learning rate, dev loss, BLEU, chrF, minutes, tokens/s"
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "counts": counts_of(task),
            "best": best,
            "best_bleu": bleu[best],
            "worst": worst,
            "worst_bleu": bleu[worst],
            "cost": cost_of(s for chosen in found.values() for s in chosen.summaries),
            "signature": bleu[best].signature,
            "scores": table(header.split(", "), rows),
            "examples": table(["sentence", "from", "text"], examples),
        },
        charts={"loss": lines({"training loss": curves}, "target tokens", marker="")},
        results={
            "counts": task.corpus.counts,
            "scores": {
                name: {metric: s._asdict() for metric, s in each.items()}
                for name, each in scores.items()
            },
            "sweeps": {name: chosen.sweep.found for name, chosen in found.items()},
            "whole": {name: chosen.whole for name, chosen in found.items()},
            "runs": runs,
        },
    )
