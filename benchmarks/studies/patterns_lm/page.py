"""The page of the study of sparse patterns in language models."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.studies.machinery.models.language_models import OWN, Budget
from benchmarks.studies.machinery.models.long_contexts import COLUMNS, cells
from benchmarks.studies.machinery.page import Page, cost_of, lines, shown, table
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.sweep import Sweep

#: Lines that differ by more nats from full attention are not drawn in its panel.
FAR = 0.25
#: Masked accuracy in percent, best first (Zaheer et al., 2020, table 1).
PAPER = {"full": 64.2, "window+random": 62.7, "random": 60.1, "window": 58.3}


HEADER = f"pattern, density, {COLUMNS}, attention MFLOP a token, parameters"


def table_of(rows: Sequence[Json]) -> str:
    """The table of masked or of causal language models."""
    return table(
        HEADER.split(", "),
        [
            [
                row["pattern"],
                f"{row['density']:.1%}",
                *cells(row),
                row["attention_flops_per_token"][0] / 1e6,
                row["parameters"],
            ]
            for row in rows
        ],
    )


def summary_of(rows: Sequence[Json]) -> Json:
    """The numbers of a table that the answer names."""
    by_name = {row["pattern"]: row for row in rows}
    sparse = [row for row in rows if row["density"] < 0.25]
    slowest = min(sparse, key=lambda row: row["speed_against_full"])
    return {
        "full": shown(by_name["full"]["test_loss"]),
        "against": ", ".join(
            f"{row['pattern']} {shown(row['against_full'])}" for row in sparse
        ),
        "best": sparse[0]["pattern"],
        "best_speed": sparse[0]["speed_against_full"],
        "slowest": slowest["pattern"],
        "slowest_speed": slowest["speed_against_full"],
    }


def beside_paper(rows: Sequence[Json]) -> str:
    """A table of accuracy here and in the paper, for its patterns and for anchors."""
    accuracy = {row["pattern"]: shown(row["test_accuracy"], 1) for row in rows}
    return table(
        ["pattern", "accuracy %", "in the paper, %"],
        [
            [name, accuracy[name], PAPER.get(name, "-")]
            for name in (*PAPER, "anchor")
            if name in accuracy
        ],
    )


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
    """The page of the study. Kinds of task are "masked" and "causal".

    Args:
        found: rows by kind of task, best first.
        swept: the sweep of learning rates, by kind of task.
        pattern: the pattern of the sweeps.
        budgets: the budget of the base models, and that of the runs.
        bases: mean dev loss of the base models, and its interval, by kind of task.
        counts: numbers of documents and tokens.
        summaries: of every run.
    """
    base, budget = budgets
    charts = {}
    for kind, rows in found.items():
        by_seconds, by_flops = (
            {r["pattern"]: [(x(r), r["test_loss"][0])] for r in rows}
            for x in (
                lambda r: r["seconds_per_step"],
                lambda r: r["attention_flops_per_token"][0] / 1e6,
            )
        )
        charts[f"{kind}-cost"] = lines(
            {
                "test loss by seconds a step": by_seconds,
                "test loss by MFLOP of attention a token": by_flops,
            },
            "",
            log="x",
        )
        beside = {
            r["pattern"]: _points(r["by_position_against_full"])
            if abs(r["against_full"][0]) < FAR
            else []
            for r in rows
        }
        charts[f"{kind}-position"] = lines(
            {
                "test loss": {r["pattern"]: _points(r["by_position"]) for r in rows},
                "minus that of full": beside,
            },
            "position",
        )
    tried = "; ".join(
        ", ".join(
            f"{rate:g}: {'diverged' if loss is None else f'{loss:.3f}'}"
            for rate, loss in sorted(each.found.items())
        )
        for each in swept.values()
    )
    return Page(
        Path(__file__).with_name("page.md"),
        {
            **{f"{kind}_says": summary_of(rows) for kind, rows in found.items()},
            **{kind: table_of(rows) for kind, rows in found.items()},
            "beside_paper": beside_paper(found["masked"]),
            "rates": ", ".join(f"{s.rate:g} ({kind})" for kind, s in swept.items()),
            "swept": pattern,
            "tried": tried,
            "reads": budget.reads(),
            "base_reads": base.reads(),
            "bases": ", ".join(f"{kind} {shown(loss)}" for kind, loss in bases.items()),
            "documents": ", ".join(
                f"{n} {part}" for part, n in counts["documents"].items()
            ),
            "own": OWN,
            "far": FAR,
            "cost": cost_of(summaries),
        },
        charts=charts,
        results=dict(found),
    )
