"""What the recall study found, on a page."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.studies.page import Chart, Page, Table, cost_of, lines
from benchmarks.studies.puzzles import VALUES
from benchmarks.studies.record import Json

#: What each of the two puzzles is.
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


def off(at: Json) -> float:
    """How far a cell is from what the graph says."""
    return abs(at["accuracy"] - at["predicted"])


def deviation(rows: Sequence[Json]) -> str:
    """How far measurements are from what the graph says, in a clause."""
    found = cells(rows)
    pattern, worst = max(found, key=lambda cell: off(cell[1]))
    return (
        f"{np.mean([off(at) for _, at in found]):.1%} from what the graph says, the "
        f"average over {len(found)} patterns and distances, most in {pattern} at "
        f"{span(worst['distances'])} ({worst['accuracy']:.0%} measured, "
        f"{worst['predicted']:.0%} said)"
    )


def short(rows: Sequence[Json]) -> str:
    """How much less than what paths allow is recalled, and how much more."""
    signed = [at["predicted"] - at["accuracy"] for _, at in cells(rows)]
    less, more = (np.maximum(x, 0).mean() for x in (signed, np.negative(signed)))
    why = (
        ": whoever is on the way knows not yet which will be asked for, and must keep "
        "all"
        if less > more
        else ""
    )
    seen = " (who sees a value without its key may guess it)" if more else ""
    return f"On average {less:.1%} are missing there, {more:.1%} too many{seen}{why}. "


def answer(
    puzzles: Mapping[str, Sequence[Json]], lists: Sequence[Json], commonest: float
) -> str:
    """What the tables say."""
    beyond = [
        f"{pattern} at {span(at['distances'])} ({TITLES[name]})"
        for name, rows in puzzles.items()
        for pattern, at in cells(rows)
        if at["beyond"]
    ]
    best, least = (choose(lists, key=lambda r: r["accuracy"]) for choose in (max, min))
    return (
        "Where a row holds one value to pass on, accuracy is "
        f"{deviation(puzzles['reach'])}. Where it holds eight, and the question tells "
        f"which, it is {deviation(puzzles['recall'])}. {short(puzzles['recall'])}"
        + (
            f"Beyond what any model can know: {', '.join(beyond)}. "
            if beyond
            else "Nowhere does a model know what no path brings: the graph is a bound. "
        )
        + f"ListOps: {best['pattern']} is best ({percent(best)}), {least['pattern']} "
        f"last ({percent(least)}); the commonest answer alone is right in "
        f"{commonest:.1%}. Each is one run. Long Range Arena's lists have 500 to 2,000 "
        "tokens, its models more parameters and steps, and its best results are near "
        "37 %."
    )


def distance_table(
    name: str, rows: Sequence[Json], *, length: int, layers: int
) -> Table:
    """Of one puzzle, by distance."""
    return Table(
        f"Recall, {TITLES[name]}, by the distance from value to question: measured / "
        f"as the graph says, in percent; a guess gets {1 / VALUES:.0%}. Connected: "
        f"pairs of {length} words, by {layers} layers; layers: to full reach, if one "
        "alone were repeated; never: pairs that it does not connect.",
        [
            "pattern",
            "connected",
            "layers",
            "never",
            *(span(at["distances"]) for at in rows[0]["at"]),
        ],
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
        puzzles: rows of "reach" and of "recall", a pattern each.
        lists: those of ListOps.
        commonest: share of the answers of ListOps that are the commonest one.
        length: of the texts.
        layers: of the models.
        summaries: of every run.
    """
    return Page(
        title="Does the graph tell from how far a model recalls?",
        claim="A pattern is a graph, and a layer is a step on it: what a word can know "
        "after some layers is what paths of that length reach. A window needs many "
        "layers, random edges and anchors few.",
        answer=answer(puzzles, lists, commonest),
        cost=cost_of(summaries),
        tables=[
            *(
                distance_table(name, rows, length=length, layers=layers)
                for name, rows in puzzles.items()
            ),
            Table(
                f"ListOps, {length // 4} to {length} tokens, ± half a 95 % interval.",
                ["pattern", "layers", "accuracy"],
                [
                    [row["pattern"], row["layers_to_full_reach"], percent(row)]
                    for row in lists
                ],
            ),
        ],
        charts=[
            Chart(
                "distance",
                "Recall by distance: as the graph says, and measured.",
                lines(
                    {
                        "as the graph says": by_distance(puzzles["reach"], "predicted"),
                        **{
                            f"measured, {TITLES[name]}": by_distance(rows, "accuracy")
                            for name, rows in puzzles.items()
                        },
                    },
                    "distance",
                    log="x",
                ),
            )
        ],
        results={**puzzles, "listops": lists, "commonest": commonest},
    )
