"""How well do three translators do, with the same data and the same budget?"""

from typing import Any

from benchmarks.studies.context import Context
from benchmarks.studies.page import Chart, Page, Table, cost_of, lines, smooth
from benchmarks.studies.scoring import Score, score
from benchmarks.studies.sweep import Sweep, sweep
from benchmarks.studies.training import Trained
from benchmarks.studies.translation_runs import Budget, Task
from benchmarks.studies.translators import TRANSLATORS, Sizes

#: Eight epochs; a run takes twenty minutes to half an hour on two cores.
BUDGET = Budget(steps=2800, evaluate_every=200)
SIZES = Sizes(features=192, hidden_size=192, layers=2)
#: Rates that are tried, each with a tenth of the budget.
RATES = {
    "plain": (5e-4, 1e-3, 2e-3),
    "additive": (5e-4, 1e-3, 2e-3),
    "transformer": (5e-4, 1e-3, 2e-3),
}
#: Test sentences shown on the page.
SHOWN = 6


def best_rate(task: Task, name: str) -> Sweep | None:
    """The rate of a translator that is best after a tenth of the budget."""
    steps = max(task.budget.steps // 10, 3)

    def short(rate: float) -> Any:
        return task.run(name, TRANSLATORS[name], rate, steps=steps)

    rates = RATES[name][:1] if task.context.quick else RATES[name]
    return sweep(task.context.shared("translators"), short, rates)


def translators(
    task: Task, names: Any = tuple(TRANSLATORS)
) -> dict[str, Trained] | None:
    """The trained translators, each at its best rate; None where some are left out."""
    shared, found = task.context.shared("translators"), {}
    names = list(names)
    # Every run is asked for, whether or not --only leaves others out.
    for name in names:
        swept = best_rate(task, name)
        if swept is None:
            continue
        trained = shared.train(task.run(name, TRANSLATORS[name], swept.rate))
        if trained is not None:
            found[name] = trained
    return found if len(found) == len(names) else None


def counts_of(task: Task) -> str:
    """What the data are, in a sentence."""
    c = task.corpus.counts
    return (
        f"{c['train']:,} sentence pairs to train on, {c['dev']:,} to choose by and "
        f"{c['test']:,} to report, in a joint vocabulary of {c['vocabulary']:,} pieces"
    )


def study(context: Context) -> Page | None:
    """Trains all three, translates the test set with each."""
    task = Task(context, BUDGET, SIZES)
    found = translators(task)
    if found is None:
        return None
    pairs = task.corpus.split.test
    references = [p.target for p in pairs]
    said = {name: task.translate(trained.model) for name, trained in found.items()}
    scores: dict[str, dict[str, Score]] = {
        name: score(texts, references) for name, texts in said.items()
    }
    rows = [
        [
            name,
            trained.summary["parameters"],
            trained.summary["config"]["rate"],
            trained.summary["best"]["loss"],
            str(scores[name]["bleu"]),
            str(scores[name]["chrf"]),
            trained.summary["seconds"] / 60,
            round(trained.summary["tokens_per_second"]),
        ]
        for name, trained in found.items()
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
        name: smooth([(r["tokens"], r["loss"]) for r in t.log if "loss" in r], 50)
        for name, t in found.items()
    }
    return Page(
        title="How well do three translators do with the same data and budget?",
        claim="A recurrent network that must pass a sentence as one vector translates "
        "worse than one that attends to all of its states (Bahdanau et al., 2015, "
        "table 1: 17.8 BLEU against 26.8), and a network of attention alone does at "
        "least as well (Vaswani et al., 2017).",
        answer=f"With {counts_of(task)}, {best} reaches {scores[best]['bleu']} BLEU "
        f"and {worst} {scores[worst]['bleu']}.",
        cost=cost_of(t.summary for t in found.values()),
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
            "runs": {name: t.summary for name, t in found.items()},
        },
    )
