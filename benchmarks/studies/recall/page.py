"""The page of the recall study."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.studies.machinery.data.puzzles import VALUES
from benchmarks.studies.machinery.page import Page, cost_of, lines, table
from benchmarks.studies.machinery.record import Json

#: The two puzzles by name, as titles.
TITLES = {"reach": "one pair", "recall": "eight pairs"}


def span(distances: Sequence[int]) -> str:
    """``9-16``."""
    return "-".join(map(str, distances))


def percent(row: Json) -> str:
    """``31.3% ± 2.0%``."""
    return f"{row['accuracy']:.1%} ± {row['half_width']:.1%}"


def cells(rows: Sequence[Json]) -> list[tuple[str, Json]]:
    """Every pattern at every distance."""
    return [(row["pattern"], at) for row in rows for at in row["at"]]


def beside_graph(rows: Sequence[Json]) -> Json:
    """Differences of accuracy and prediction, over patterns and distances."""
    found = cells(rows)
    over = np.array([at["accuracy"] - at["predicted"] for _, at in found])
    pattern, worst = found[int(np.abs(over).argmax())]
    return {
        "cells": len(found),
        "mean": np.abs(over).mean(),
        "below": np.maximum(-over, 0).mean(),
        "above": np.maximum(over, 0).mean(),
        "pattern": pattern,
        "distances": span(worst["distances"]),
        "measured": worst["accuracy"],
        "predicted": worst["predicted"],
    }


def distance_table(rows: Sequence[Json]) -> str:
    """The table of one puzzle, by distance."""
    distances = (span(at["distances"]) for at in rows[0]["at"])
    return table(
        ["pattern", "connected", "layers", "never", *distances],
        [
            [
                row["pattern"],
                f"{row['connected']:.0%}",
                row["layers_to_full_reach"],
                f"{row['unreachable']:.0%}",
                *(
                    f"{100 * at['accuracy']:.0f} / {100 * at['predicted']:.0f}"
                    for at in row["at"]
                ),
            ]
            for row in rows
        ],
    )


def by_distance(rows: Sequence[Json], key: str) -> dict[str, list[tuple[float, float]]]:
    """Points of a chart, by pattern."""
    return {
        row["pattern"]: [(float(np.mean(at["distances"])), at[key]) for at in row["at"]]
        for row in rows
    }


def page(
    puzzles: Mapping[str, Sequence[Json]],
    lists: Sequence[Json],
    commonest: float,
    *,
    length: int,
    layers: int,
    summaries: Iterable[Json],
) -> Page:
    """The page of the study.

    Args:
        puzzles: the rows, one for each pattern, of "reach" and of "recall".
        lists: the rows of ListOps.
        commonest: share of the most frequent answer of ListOps.
        length: tokens in a text.
        layers: layers of the models.
        summaries: of every run.
    """
    ranked = sorted(lists, key=lambda row: -row["accuracy"])
    beyond = [
        f"{pattern} at {span(at['distances'])} ({TITLES[name]})"
        for name, rows in puzzles.items()
        for pattern, at in cells(rows)
        if at["beyond"]
    ]
    measured = {
        f"measured, {TITLES[name]}": by_distance(rows, "accuracy")
        for name, rows in puzzles.items()
    }
    predicted = by_distance(puzzles["reach"], "predicted")
    return Page(
        Path(__file__).with_name("page.md"),
        {
            **{f"{name}_off": beside_graph(rows) for name, rows in puzzles.items()},
            **{name: distance_table(rows) for name, rows in puzzles.items()},
            "beyond": ", ".join(beyond) or "nowhere",
            "best": ranked[0]["pattern"],
            "best_share": percent(ranked[0]),
            "worst": ranked[-1]["pattern"],
            "worst_share": percent(ranked[-1]),
            "commonest": commonest,
            "guess": 1 / VALUES,
            "length": length,
            "shortest_list": length // 4,
            "layers": layers,
            "cost": cost_of(summaries),
            "listops": table(
                ["pattern", "layers", "accuracy"],
                [[r["pattern"], r["layers_to_full_reach"], percent(r)] for r in lists],
            ),
        },
        charts={
            "distance": lines(
                {"as the graph predicts": predicted, **measured}, "distance", log="x"
            )
        },
        results={**puzzles, "listops": lists, "commonest": commonest},
    )
