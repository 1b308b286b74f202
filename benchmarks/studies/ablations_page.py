"""What the ablations found, on a page."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.studies.ablations_changes import (
    CHANGES,
    HEAD_COUNTS,
    HEAD_SIZES,
    KINDS,
    RESIDUALS,
    SAME,
    placed,
)
from benchmarks.studies.language_models import Budget
from benchmarks.studies.page import Chart, Page, Table, cost_of, dots, lines, shown
from benchmarks.studies.record import Json


def tried(rows: Mapping[str, Json], summaries: Sequence[Json]) -> str:
    """At which rates, in a sentence: the best of two is at an end of them."""
    if len({s["config"]["rate"] for s in summaries}) < 2:
        return ""
    own = [n for n in rows if n not in SAME]
    several = {n: CHANGES[n] for n in own if len(CHANGES[n].rates) > 1}
    rates = next(iter(several.values())).rates
    highest = sum(rows[name]["rate"] == max(rates) for name in several)
    return (
        f"Where the best rate may be another one, {' and '.join(map(str, rates))} were "
        f"tried, and the higher is the better one in {highest} of {len(several)}: a "
        "further one may be better still. All else is at the base's rate."
    )


def page(
    rows: Mapping[str, Json],
    moved: Mapping[str, Mapping[str, float]],
    budget: Budget,
    summaries: Sequence[Json],
) -> Page:
    """What was found.

    Args:
        rows: by name of the change.
        moved: by kind of task and kind of position, how far outputs move with order.
        budget: of every run.
        summaries: of every run.
    """

    def named(names: Mapping[str, str]) -> dict[str, str]:
        """Those that were trained."""
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

    def placed_best_first(kind: str) -> str:
        found = by_place[kind]
        return ", ".join(
            f"{n} {shown(found[n])}" for n in sorted(found, key=lambda n: found[n][0])
        )

    def itself(kind: str) -> str:
        found = rotary[kind]["over_seeds"]
        share = shown(tuple(x and 100 * x for x in found["itself"]), 0)
        own = shown(found["own_weight"], 1)
        usual = "usually" if found["itself"][0] > 0.5 else "not usually"
        return (
            f"{usual} the greatest weight: in {share} % of the cases ({kind}), at "
            f"{own} times an equal share"
        )

    answer = (
        f"Scaling: at head size {largest} the logits of an untrained model deviate by "
        f"{spread:.2f} without the scale and {spread_scaled:.2f} with it, gradients "
        f"have a norm of {shown(norm, 2)} and {shown(norm_scaled, 2)} in the first "
        f"tenth, and runs end at {shown(dot)} and {shown(scaled)} nats. Heads: "
        f"{best_heads} end at {shown(by_heads[best_heads])}, {worst_heads} at "
        f"{shown(by_heads[worst_heads])}: a head has {budget.sizes.features} features "
        "divided by their number, and the paper's models are thirty times as large and "
        "translate; what heads do for BLEU there need not be what they do for a loss "
        "here. Positions: if words change places, what an untrained model without "
        "positions says moves by "
        + "; ".join(
            f"{moved[kind]['none']:.0e} of its size ({kind}), with rotary ones by "
            f"{moved[kind]['rotary']:.0e}"
            for kind in KINDS
        )
        + ". Trained: "
        + "; ".join(f"{placed_best_first(kind)} ({kind})" for kind in KINDS)
        + f". In {budget.steps} steps a model may not learn to use what is added to a "
        "word, or a table. Residuals: a block's output has a cosine of "
        f"{shown(kept['pre-norm'], 2)} with its input, without them "
        f"{shown(kept['no residual'], 2)}, and runs end at {shown(ends['pre-norm'])} "
        f"and {shown(ends['no residual'])}; post-norm {shown(ends['post-norm'])}, no "
        f"norm {shown(ends['no norm'])}. Self to self is "
        + ", and ".join(map(itself, KINDS))
        + (
            "."
            if any(r["over_seeds"]["itself"][0] > 0.5 for r in rotary.values())
            else "; where a residual hands on a word itself, attention need not."
        )
        + f" {tried(rows, summaries)}"
    )
    columns = [
        "run",
        "rate",
        "dev loss",
        "test loss",
        "gradient norm",
        "logit deviation",
        "entropy",
        "itself",
        "kept",
    ]

    def change(row: Json, key: str) -> str:
        after = shown(row["over_seeds"][key], 2)
        return f"{np.mean(row['untrained'][key]):.2f} → {after}"

    table = [
        [
            name,
            f"{row['rate']:g}",
            shown(row["dev_loss"]),
            shown(row["test_loss"]),
            " → ".join(shown(n, 2) for n in row["over_seeds"]["gradient_norm"]),
            change(row, "deviation"),
            change(row, "entropy"),
            change(row, "itself"),
            change(row, "kept"),
        ]
        for name, row in rows.items()
    ]
    return Page(
        title="What are scaling, heads, positions, residuals and norms good for?",
        claim="Scaling gives nicer gradients; order is lost without positions; "
        "residuals preserve the previous layer; self-to-self is usually highest; "
        "several heads see more than one (Vaswani et al., 2017, sections 3.2.1, 3.2.2, "
        "3.5 and table 3: one head 0.9 BLEU worse than eight, sixteen 0.4).",
        answer=answer,
        cost=cost_of(summaries),
        tables=[
            Table(
                f"± half a 95 % interval over seeds: {budget.steps} steps, "
                f"{budget.sizes.layers} layers of {budget.sizes.features} features, "
                f"contexts of {budget.length}. Gradient norm: median of the first → of "
                "the last tenth of the steps. The rest, means over layers: untrained, "
                "of the first seed → trained.",
                columns,
                table,
            )
        ],
        charts=[
            Chart(
                "scale",
                "With and without the scale, by head size; untrained: the first seed.",
                lines(
                    {
                        title: {
                            kind: [
                                (float(n), y) for n, y in of(scale[kind], *path).items()
                            ]
                            for kind in scale
                        }
                        for title, path in (
                            ("test loss", ("test_loss", 0)),
                            ("logit deviation, untrained", ("untrained", "deviation")),
                            ("relative entropy, untrained", ("untrained", "entropy")),
                        )
                    },
                    "head size",
                    log="x",
                ),
            ),
            Chart(
                "changes",
                "Test loss by heads, positions, residual and norm.",
                dots({
                    "heads": by_heads,
                    **{f"positions, {kind}": by_place[kind] for kind in KINDS},
                    "residual and norm": ends,
                }),
            ),
            Chart(
                "layers",
                "What each layer of the trained base does, first seed.",
                lines(
                    {
                        title: {
                            kind: list(enumerate(rotary[kind]["trained"][key], 1))
                            for kind in KINDS
                        }
                        for title, key in (
                            ("greatest weight is its own", "itself"),
                            ("own weight over an equal share", "own_weight"),
                            ("relative entropy", "entropy"),
                        )
                    },
                    "layer",
                ),
            ),
        ],
        results={"runs": rows, "order": moved},
    )
