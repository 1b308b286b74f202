"""What the pattern study found, on a page."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.studies.language_models import OWN, Budget
from benchmarks.studies.page import Chart, Page, Table, cost_of, lines, shown
from benchmarks.studies.record import Json
from benchmarks.studies.sweep import Sweep

#: Nats from full attention beyond which a line would flatten all others.
FAR = 0.25
#: Masked accuracy in percent, best first (Zaheer et al., 2020, table 1).
PAPER = {"full": 64.2, "window+random": 62.7, "random": 60.1, "window": 58.3}


def table(kind: str, rows: Sequence[Json]) -> Table:
    """The numbers of one kind of task, "masked" or "causal"."""
    what = "the next token" if kind == "causal" else "15 % of the tokens, hidden"
    return Table(
        f"{kind.capitalize()}: {what}. Loss in nats, ± half a 95 % interval where "
        "there are several seeds; differences from full attention are of runs with the "
        "same data in the same order. Seconds: of a step, all patterns in turns. The "
        f"operations of {OWN} leave out those of its anchors.",
        [
            "pattern",
            "density",
            "seeds",
            "dev loss",
            "test loss",
            "against full",
            "accuracy, %",
            "s a step",
            "speed",
            "attention MFLOP a token",
            "parameters",
        ],
        [
            [
                row["pattern"],
                f"{row['density']:.1%}",
                row["seeds"],
                shown(row["dev_loss"]),
                shown(row["test_loss"]),
                shown(row["against_full"]),
                shown(row["test_accuracy"], 1),
                row["seconds_per_step"],
                f"{row['speed_against_full']:.2f}x",
                row["attention_flops_per_token"][0] / 1e6,
                row["parameters"],
            ]
            for row in rows
        ],
    )


def answer(kind: str, rows: Sequence[Json]) -> str:
    """What a table says, in sentences."""
    by_name = {row["pattern"]: row for row in rows}
    full = shown(by_name["full"]["test_loss"])
    sparse = [row for row in rows if row["density"] < 0.25]
    losses_of = ", ".join(
        f"{row['pattern']} {shown(row['against_full'])}" for row in sparse
    )
    best, slowest = sparse[0], min(sparse, key=lambda row: row["speed_against_full"])
    return (
        f"{kind.capitalize()}, against full attention ({full} nats): {losses_of}. "
        f"{best['pattern'].capitalize()}, the best of them, trains "
        f"{best['speed_against_full']:.2f} times as fast as full attention; the "
        f"slowest, {slowest['pattern']}, {slowest['speed_against_full']:.2f} times. "
    )


def beside_paper(rows: Sequence[Json]) -> str:
    """Whether the order of the paper's rows is found here, and the row it lacks."""
    here = {
        row["pattern"]: row["test_accuracy"]
        for row in rows
        if row["pattern"] in (*PAPER, "anchor")
    }
    both = [name for name in PAPER if name in here]
    ranked = sorted(both, key=lambda name: -here[name][0])
    turned = [
        f"{worse} before {better}"
        for better, worse in itertools.combinations(both, 2)
        if here[worse][0] - here[better][0]
        > sum(here[name][1] or 0 for name in (better, worse))
    ]
    order = (
        f"other than in the paper {', '.join(turned)}. Its models are a hundred times "
        "as large and see many more words, so that far words can pay there where here "
        "most of a loss is that of those nearby"
        if turned
        else "nothing against the paper's order"
    )
    told = ", ".join(f"{name} {shown(here[name], 1)} %" for name in ranked)
    lacking = (
        f", and anchors alone, for which it has no row, {shown(here['anchor'], 1)} %"
        if "anchor" in here
        else ""
    )
    return f"Masked accuracy: {told}{lacking}; {order}. "


def tokens(budget: Budget) -> str:
    """How much a run reads, and how much at once."""
    read = budget.steps * budget.rows * budget.length
    return f"{read:,} subwords in contexts of {budget.length:,}"


def _points(pairs: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in pairs]


def page(
    found: Mapping[str, Sequence[Json]],
    swept: Mapping[str, Sweep],
    pattern: str,
    budgets: tuple[Budget, Budget],
    bases: Mapping[str, tuple[float, float | None]],
    counts: Json,
    summaries: Iterable[Json],
) -> Page:
    """What was found.

    Args:
        found: rows by kind of task, best first.
        swept: how the rate of each kind was found.
        pattern: for which it was found.
        budgets: of what every run begins with, and of every run.
        bases: by kind of task, the dev loss of what runs begin with.
        counts: of the documents.
        summaries: of every run.
    """
    base, budget = budgets
    charts = []
    for kind, rows in found.items():
        by_seconds, by_flops = (
            {r["pattern"]: [(x(r), r["test_loss"][0])] for r in rows}
            for x in (
                lambda r: r["seconds_per_step"],
                lambda r: r["attention_flops_per_token"][0] / 1e6,
            )
        )
        charts += [
            Chart(
                f"{kind}-cost",
                f"{kind.capitalize()}: test loss by measured seconds a step, and "
                "by operations of attention a token.",
                lines(
                    {
                        "test loss by seconds a step": by_seconds,
                        "test loss by MFLOP of attention a token": by_flops,
                    },
                    "",
                    log="x",
                ),
            ),
            Chart(
                f"{kind}-position",
                f"{kind.capitalize()}: test loss by position in the context, and how "
                "far it is from that of full attention, where that is less than "
                f"{FAR:g} nats.",
                lines(
                    {
                        "test loss": {
                            r["pattern"]: _points(r["by_position"]) for r in rows
                        },
                        "minus that of full": {
                            r["pattern"]: _points(r["by_position_against_full"])
                            if abs(r["against_full"][0]) < FAR
                            else []
                            for r in rows
                        },
                    },
                    "position",
                ),
            ),
        ]
    tried = "; ".join(
        ", ".join(
            f"{rate:g} {'diverged' if loss is None else f'{loss:.3f}'}"
            for rate, loss in sorted(each.found.items())
        )
        for each in swept.values()
        if each.found
    )
    documents = ", ".join(f"{n} {part}" for part, n in counts["documents"].items())
    return Page(
        title="Do sparse patterns do well?",
        claim="Self-attention over all pairs is expensive; people try sparse patterns: "
        "anchor words, a sliding window, random, fully connected. Of BigBird's parts "
        "none alone is enough, window and random together come close to full attention "
        "(Zaheer et al., 2020, table 1: masked accuracy "
        + ", ".join(f"{name} {share}" for name, share in PAPER.items())
        + "; no row for anchors alone).",
        answer="".join(answer(kind, rows) for kind, rows in found.items())
        + beside_paper(found["masked"])
        + "A rate of "
        + " and ".join(f"{s.rate:g} ({kind})" for kind, s in swept.items())
        + f", the best for {pattern}"
        + (f" (dev losses of whole runs: {tried})" if tried else "")
        + ". Every run goes on, with "
        + tokens(budget)
        + ", from a model that read with full attention "
        + tokens(base)
        + " (one for each kind and seed; dev losses on such contexts: "
        + ", ".join(f"{kind} {shown(loss)}" for kind, loss in bases.items())
        + "), as BigBird's and Longformer's go on from RoBERTa, and anchors' own "
        f"projections begin as the ordinary ones. Documents: {documents}.",
        cost=cost_of(summaries),
        tables=[table(kind, rows) for kind, rows in found.items()],
        charts=charts,
        results=dict(found),
    )
