"""What the ablations found, on a page."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks.studies.ablations_changes import (
    HEAD_COUNTS,
    HEAD_SIZES,
    KINDS,
    RESIDUALS,
    placed,
)
from benchmarks.studies.language_models import Budget
from benchmarks.studies.page import Chart, Page, Table, cost_of, dots, lines, shown
from benchmarks.studies.record import Json


def page(
    rows: Mapping[str, Json],
    moved: Mapping[str, Mapping[str, float]],
    budget: Budget,
    summaries: Iterable[Json],
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
        return {label: rows[name]["dev_loss"] for label, name in names.items()}

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
        rows[scale[kind][largest]]["gradient_norm"][0] for kind in scale
    )
    by_heads = losses(heads)
    best_heads, worst_heads = (
        choose(by_heads, key=lambda n: by_heads[n][0]) for choose in (min, max)
    )
    itself = {kind: rows[f"{kind}/rotary"]["trained"] for kind in KINDS}
    kept, ends = of(residuals, "trained", "kept"), losses(residuals)
    by_place = {kind: losses(positions[kind]) for kind in KINDS}

    def best(values: Mapping[str, tuple[float, float | None]]) -> str:
        return min((n for n in values if n != "none"), key=lambda n: values[n][0])

    best_position = {kind: best(by_place[kind]) for kind in KINDS}
    answer = (
        f"Scaling: at head size {largest} the logits of an untrained model deviate by "
        f"{spread:.2f} without the scale and {spread_scaled:.2f} with it, gradients "
        f"have a norm of {norm:.2f} and {norm_scaled:.2f} in the first tenth, and runs "
        f"end at {shown(dot)} and {shown(scaled)} nats. Heads: {best_heads} end at "
        f"{shown(by_heads[best_heads])}, {worst_heads} at "
        f"{shown(by_heads[worst_heads])}. Positions: if words change places, what an "
        "untrained model without positions says moves by "
        + "; ".join(
            f"{moved[kind]['none']:.0e} of their size ({kind}), with "
            f"{best_position[kind]} ones by {moved[kind][best_position[kind]]:.0e}"
            for kind in KINDS
        )
        + "; trained without they end at "
        + "; ".join(
            f"{shown(by_place[kind]['none'])} ({kind}), "
            f"with {best_position[kind]} ones "
            f"at {shown(by_place[kind][best_position[kind]])}"
            for kind in KINDS
        )
        + f". Residuals: a block's output has a cosine of {kept['pre-norm']:.2f} with "
        f"its input, without them {kept['no residual']:.2f}, and runs end at "
        f"{shown(ends['pre-norm'])} and {shown(ends['no residual'])}; post-norm "
        f"{shown(ends['post-norm'])}, no norm {shown(ends['no norm'])}. Self to self "
        "is the greatest weight in "
        + " and ".join(
            f"{np.mean(itself[kind]['itself']):.0%} ({kind}, "
            f"{np.mean(itself[kind]['own_weight']):.1f} times an equal share)"
            for kind in KINDS
        )
        + " of the cases. The paper's models are thirty times as large and translate: "
        "what heads do for BLEU there need not be what they do for a loss here."
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

    def change(row: Json, key: str, digits: int = 2) -> str:
        return " → ".join(
            f"{np.mean(row[when][key]):.{digits}f}" for when in ("untrained", "trained")
        )

    table = [
        [
            name,
            f"{row['rate']:g}",
            shown(row["dev_loss"]),
            shown(row["test_loss"]),
            " → ".join(f"{n:.2f}" for n in row["gradient_norm"]),
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
                f"Loss ± half a 95 % interval over seeds: {budget.steps} steps, "
                f"{budget.sizes.layers} layers of {budget.sizes.features} features, "
                f"contexts of {budget.length}. Gradient norm: median of the first → of "
                "the last tenth of the steps. The rest, means over layers: untrained → "
                "trained.",
                columns,
                table,
            )
        ],
        charts=[
            Chart(
                "scale",
                "With and without the scale, by head size.",
                lines(
                    {
                        title: {
                            kind: [
                                (float(n), y) for n, y in of(scale[kind], *path).items()
                            ]
                            for kind in scale
                        }
                        for title, path in (
                            ("dev loss", ("dev_loss", 0)),
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
                "Loss by heads, positions, residual and norm.",
                dots({
                    "heads": by_heads,
                    **{f"positions, {kind}": by_place[kind] for kind in KINDS},
                    "residual and norm": ends,
                }),
            ),
            Chart(
                "layers",
                "What each layer of the trained base does.",
                lines(
                    {
                        title: {
                            kind: list(enumerate(itself[kind][key], 1))
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
