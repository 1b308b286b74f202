"""The page of the study of patterns that each query chooses."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.studies.machinery.models.language_models import Budget
from benchmarks.studies.machinery.models.long_contexts import COLUMNS, cells
from benchmarks.studies.machinery.page import Page, cost_of, lines, shown, table
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.selection.layers import BOUNDS, CHOSEN, FIXED

HEADER = (
    f"pattern, keys a query, {COLUMNS}, attention MFLOP a token, "
    "choosing MFLOP a token, parameters"
)


def _models(rows: Sequence[Json]) -> str:
    return table(
        HEADER.split(", "),
        [
            [
                row["pattern"],
                round(row["keys_seen"]),
                *cells(row),
                row["attention_flops_per_token"] / 1e6,
                row["choosing_flops_per_token"] / 1e6,
                row["parameters"],
            ]
            for row in rows
        ],
    )


def _recall(recalled: Mapping[str, Json], distances: Sequence[tuple[int, int]]) -> str:
    return table(
        ["pattern", *(f"{low:,}-{high:,}" for low, high in distances)],
        [
            [
                name,
                *(
                    shown((100 * share, 100 * half), 0)
                    for share, half in zip(
                        summary["measured"]["accuracy"],
                        summary["measured"]["half_width"],
                        strict=True,
                    )
                ),
            ]
            for name, summary in recalled.items()
        ],
    )


def _selected(rows: Sequence[Json]) -> str:
    ends = ["0", *map(str, BOUNDS)]
    spans = [
        f"{low} to {high}" for low, high in zip(ends, [*ends[1:], "64"], strict=True)
    ]
    return table(
        ["pattern", "layer", *spans, "two heads alike"],
        [
            [
                row["pattern"],
                number,
                *(
                    f"{keys:.0%} / {weight:.0%}"
                    for keys, weight in zip(of["keys"], of["weight"], strict=True)
                ),
                f"{of['alike']:.0%}",
            ]
            for row in rows
            for number, of in enumerate(row["selected"], 1)
        ],
    )


def _best(rows: Sequence[Json], names: Iterable[str]) -> Json:
    """The best of some patterns, for the answer."""
    row = next(row for row in rows if row["pattern"] in set(names))
    return {
        "pattern": row["pattern"],
        "against": shown(row["against_full"]),
        "speed": row["speed_against_full"],
    }


def page(
    rows: Sequence[Json],
    recalled: Mapping[str, Json],
    distances: Sequence[tuple[int, int]],
    trained: tuple[Budget, Budget, float, float],
    counts: Json,
    summaries: Iterable[Json],
) -> Page:
    """The page of the study.

    Args:
        rows: of the language models, best first.
        recalled: summaries of the runs of the puzzle, by pattern.
        distances: of the puzzle.
        trained: budgets of the base models and of the runs, the learning rate, and the
            share of steps in which an indexer learns from attention to all.
        counts: numbers of documents and tokens.
        summaries: of every run.
    """
    short, budget, rate, first = trained
    fixed = [name for name in FIXED if name != "full"]
    slow = [r for r in rows if r["pattern"] in CHOSEN and r["speed_against_full"] < 1]
    far = {
        name: 100 * summary["measured"]["accuracy"][-1]
        for name, summary in recalled.items()
    }
    charts = {
        "cost": lines(
            {
                "test loss by seconds a step": {
                    r["pattern"]: [(r["seconds_per_step"], r["test_loss"][0])]
                    for r in rows
                },
                "test loss by MFLOP of attention and choice": {
                    r["pattern"]: [
                        (
                            (
                                r["attention_flops_per_token"]
                                + r["choosing_flops_per_token"]
                            )
                            / 1e6,
                            r["test_loss"][0],
                        )
                    ]
                    for r in rows
                },
            },
            "",
            log="x",
        ),
        "position": lines(
            {"test loss": {r["pattern"]: r["by_position"] for r in rows}}, "position"
        ),
    }
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "fixed": _best(rows, fixed),
            "chosen": _best(rows, CHOSEN),
            "order": ", ".join(f"{r['pattern']} {shown(r['test_loss'])}" for r in rows),
            "slow": ", ".join(
                f"{r['pattern']} ({r['speed_against_full']:.2f} times its speed)"
                for r in slow
            )
            or "none",
            "far": ", ".join(f"{name} {share:.0f} %" for name, share in far.items()),
            "furthest": f"{distances[-1][0]:,} to {distances[-1][1]:,}",
            "reads": budget.reads(),
            "base_reads": short.reads(),
            "rate": rate,
            "first": first,
            "documents": ", ".join(
                f"{n} {part}" for part, n in counts["documents"].items()
            ),
            "cost": cost_of(summaries),
            "models": _models(rows),
            "recall": _recall(recalled, distances),
            "selected": _selected(rows),
        },
        charts=charts,
        results={
            "models": list(rows),
            "recall": {n: s["measured"] for n, s in recalled.items()},
        },
    )
