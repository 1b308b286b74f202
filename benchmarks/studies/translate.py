"""How well do three translators do, with the same data and the same budget?"""

from collections.abc import Iterable

from benchmarks.studies.context import Context
from benchmarks.studies.page import Chart, Page, Table, cost_of, lines, smooth
from benchmarks.studies.scoring import Score, score
from benchmarks.studies.sweep import Chosen, train_at_best_rate
from benchmarks.studies.training import Run
from benchmarks.studies.translation_runs import Budget, Task
from benchmarks.studies.translators import TRANSLATORS, Sizes

#: Eight epochs; a run takes twenty minutes to half an hour on two cores.
BUDGET = Budget(steps=2800, evaluate_every=200)
SIZES = Sizes(features=192, hidden_size=192, layers=2)
#: Rates that are tried, each with a tenth of the budget.
RATES = {
    "plain": (1e-3, 2e-3, 4e-3),
    "additive": (1e-3, 2e-3, 4e-3),
    "transformer": (5e-4, 1e-3, 2e-3),
}
#: Test sentences shown on the page.
SHOWN = 6


def translators(
    task: Task, names: Iterable[str] = tuple(TRANSLATORS)
) -> dict[str, Chosen] | None:
    """The trained translators, each at its best rate; None where some are left out."""
    shared = task.context.shared("translators")
    short_steps = max(task.budget.steps // 10, 3)

    def train(name: str) -> Chosen | None:
        def run(rate: float, short: bool) -> Run:
            steps = short_steps if short else None
            return task.run(name, TRANSLATORS[name], rate, steps=steps)

        rates = RATES[name][:1] if task.context.quick else RATES[name]
        return train_at_best_rate(shared, run, rates)

    # Every run is asked for, whether or not --only leaves others out.
    found = {name: train(name) for name in names}
    done = {name: chosen for name, chosen in found.items() if chosen is not None}
    return done if len(done) == len(found) else None


def counts_of(task: Task) -> str:
    """What the data are, in a sentence."""
    c = task.corpus.counts
    return (
        f"{c['train'] - task.too_long:,} sentence pairs to train on, {c['dev']:,} to "
        f"choose by and {c['test']:,} to report, in a joint vocabulary of "
        f"{c['vocabulary']:,} pieces"
    )


def study(context: Context) -> Page | None:
    """Trains all three, translates the test set with each."""
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
    rows = [
        [
            name,
            chosen.trained.summary["parameters"],
            chosen.rate,
            chosen.trained.summary["best"]["loss"],
            str(scores[name]["bleu"]),
            str(scores[name]["chrf"]),
            chosen.trained.summary["seconds"] / 60,
            round(chosen.trained.summary["tokens_per_second"]),
        ]
        for name, chosen in found.items()
    ]
    longest = max(range(len(pairs)), key=lambda i: len(pairs[i].source))
    shown = [*range(0, len(pairs), max(len(pairs) // SHOWN, 1))][:SHOWN] + [longest]
    examples = [
        [text]
        for i in shown
        for text in (
            f"*{pairs[i].source}*",
            f"reference: {pairs[i].target}",
            *(f"{name}: {texts[i]}" for name, texts in said.items()),
        )
    ]
    ordered = sorted(scores, key=lambda name: -scores[name]["bleu"].value)
    best, worst = ordered[0], ordered[-1]
    curves = {
        name: smooth(
            [(r["tokens"], r["loss"]) for r in chosen.trained.log if "loss" in r], 50
        )
        for name, chosen in found.items()
    }
    return Page(
        title="How well do three translators do with the same data and budget?",
        claim="A recurrent network that must pass a sentence as one vector translates "
        "worse than one that attends to all of its states (Bahdanau et al., 2015, "
        "table 1: 17.8 BLEU against 26.8), and a network of attention alone does at "
        "least as well (Vaswani et al., 2017).",
        answer=f"With {counts_of(task)}, {best} reaches {scores[best]['bleu']} BLEU "
        f"and {worst} {scores[worst]['bleu']}.",
        cost=cost_of(s for chosen in found.values() for s in chosen.summaries),
        tables=[
            Table(
                f"Beam search with five hypotheses; {scores[best]['bleu'].signature}.",
                [
                    "model",
                    "parameters",
                    "learning rate",
                    "dev loss",
                    "BLEU",
                    "chrF",
                    "minutes",
                    "target tokens a second",
                ],
                rows,
            ),
            Table(
                "Test sentences, regularly spaced, and the longest.", ["text"], examples
            ),
        ],
        charts=[
            Chart(
                "loss",
                "Training loss (smoothed labels) by target tokens seen.",
                lines({"training loss": curves}, "target tokens", marker=""),
            )
        ],
        results={
            "counts": task.corpus.counts,
            "scores": {
                name: {metric: s._asdict() for metric, s in found_.items()}
                for name, found_ in scores.items()
            },
            "sweeps": {name: chosen.sweep.found for name, chosen in found.items()},
            "whole": {name: chosen.whole for name, chosen in found.items()},
            "runs": {name: chosen.trained.summary for name, chosen in found.items()},
        },
    )
