"""The page of the ablations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.ablations.changes import (
    CHANGES,
    HEAD_COUNTS,
    HEAD_SIZES,
    KINDS,
    RESIDUALS,
    SAME,
    placed,
)
from benchmarks.studies.machinery.models.language_models import Budget
from benchmarks.studies.machinery.page import Page, cost_of, dots, lines, shown, table
from benchmarks.studies.machinery.record import Json

HEADER = (
    "run, rate, dev loss, test loss, gradient norm, logit deviation, entropy, itself, "
    "kept"
)


def page(
    rows: Mapping[str, Json],
    moved: Mapping[str, Mapping[str, float]],
    budget: Budget,
    summaries: Sequence[Json],
) -> Page:
    """The page of the study.

    Args:
        rows: results by name of the change.
        moved: results of ``order_matters``, by kind of task and kind of positions.
        budget: of every run.
        summaries: of every run.
    """

    def named(names: Mapping[str, str]) -> dict[str, str]:
        """The entries of ``names`` that were trained."""
        return {label: name for label, name in names.items() if name in rows}

    def losses(names: Mapping[str, str]) -> dict[str, tuple[float, float | None]]:
        return {label: rows[name]["test_loss"] for label, name in names.items()}

    def of(names: Mapping[str, str], *path: str | int) -> dict[str, float]:
        found = {}
        for label, name in names.items():
            number: Any = rows[name]
            for step in path:
                number = number[step]
            found[label] = float(np.mean(number))
        return found

    scale = {
        kind: named({str(n): f"{kind}/{n}" for n in HEAD_SIZES})
        for kind in ("dot", "scaled_dot")
    }
    heads = named({str(n): f"heads/{n}" for n in HEAD_COUNTS})
    positions = {kind: named(placed(kind)) for kind in KINDS}
    residuals = {n: f"residual/{n.replace(' ', '-')}" for n in RESIDUALS}
    largest = str(HEAD_SIZES[-1])
    dot, scaled = (losses(scale[kind])[largest] for kind in scale)
    spread, spread_scaled = (
        of(scale[kind], "untrained", "deviation")[largest] for kind in scale
    )
    norm, norm_scaled = (
        rows[scale[kind][largest]]["over_seeds"]["gradient_norm"][0] for kind in scale
    )
    by_heads = losses(heads)
    best_heads, worst_heads = (
        choose(by_heads, key=lambda n: by_heads[n][0]) for choose in (min, max)
    )
    rotary = {kind: rows[f"{kind}/rotary"] for kind in KINDS}
    ends = losses(residuals)
    kept = {n: rows[name]["over_seeds"]["kept"] for n, name in residuals.items()}
    by_place = {kind: losses(positions[kind]) for kind in KINDS}
    # Changes for which several rates were tried.
    swept = [n for n in rows if n not in SAME and len(CHANGES[n].rates) > 1]

    def best_first(kind: str) -> str:
        ranked = sorted(by_place[kind].items(), key=lambda item: item[1][0])
        return ", ".join(f"{name} {shown(loss)}" for name, loss in ranked)

    def change(row: Json, key: str) -> str:
        after = shown(row["over_seeds"][key], 2)
        return f"{np.mean(row['untrained'][key]):.2f} → {after}"

    values: dict[str, object] = {
        "largest": largest,
        "spread": spread,
        "spread_scaled": spread_scaled,
        "norm": shown(norm, 2),
        "norm_scaled": shown(norm_scaled, 2),
        "dot": shown(dot),
        "scaled": shown(scaled),
        "best_heads": best_heads,
        "best_heads_loss": shown(by_heads[best_heads]),
        "worst_heads": worst_heads,
        "worst_heads_loss": shown(by_heads[worst_heads]),
        "budget": budget,
        "kept": {n: shown(kept[n], 2) for n in ("pre-norm", "no residual")},
        "ends": {n: shown(loss) for n, loss in ends.items()},
        "rates": ", ".join(map(str, CHANGES[swept[0]].rates)),
        "highest": sum(rows[n]["rate"] == max(CHANGES[n].rates) for n in swept),
        "swept": len(swept),
        "cost": cost_of(summaries),
        "runs": table(
            HEADER.split(", "),
            [
                [
                    name,
                    f"{row['rate']:g}",
                    shown(row["dev_loss"]),
                    shown(row["test_loss"]),
                    " → ".join(shown(n, 2) for n in row["over_seeds"]["gradient_norm"]),
                    *(
                        change(row, k)
                        for k in ("deviation", "entropy", "itself", "kept")
                    ),
                ]
                for name, row in rows.items()
            ],
        ),
    }
    for kind in KINDS:
        over_seeds = rotary[kind]["over_seeds"]
        values[kind] = {
            "moved": moved[kind]["none"],
            "moved_rotary": moved[kind]["rotary"],
            "losses": best_first(kind),
            "itself": shown(tuple(x and 100 * x for x in over_seeds["itself"]), 0),
            "own_weight": shown(over_seeds["own_weight"], 1),
        }
    by_size = {
        title: {
            kind: [(float(n), y) for n, y in of(scale[kind], *path).items()]
            for kind in scale
        }
        for title, path in (
            ("test loss", ("test_loss", 0)),
            ("logit deviation, untrained", ("untrained", "deviation")),
            ("relative entropy, untrained", ("untrained", "entropy")),
        )
    }
    by_layer = {
        title: {
            kind: list(enumerate(rotary[kind]["trained"][key], 1)) for kind in KINDS
        }
        for title, key in (
            ("greatest weight is its own", "itself"),
            ("own weight over an equal share", "own_weight"),
            ("relative entropy", "entropy"),
        )
    }
    by_change = {
        "heads": by_heads,
        **{f"positions, {kind}": by_place[kind] for kind in KINDS},
        "residual and norm": ends,
    }
    return Page(
        Path(__file__).with_name("page.md"),
        values,
        charts={
            "scale": lines(by_size, "head size", log="x"),
            "changes": dots(by_change),
            "layers": lines(by_layer, "layer"),
        },
        results={"runs": rows, "order": moved},
    )
