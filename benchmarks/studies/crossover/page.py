"""The page of the crossover study."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnlab._src.implementations.measured import Fit
from benchmarks.studies.crossover.cases import (
    DENSE,
    DIRECTIONS,
    HEAD_SIZE,
    HEADS,
    PATTERNS,
    SHARES,
    TARGET,
    TPU_LENGTHS,
    TPU_PATTERNS,
)
from benchmarks.studies.machinery.page import Page, lines, table
from benchmarks.studies.machinery.record import Json


def crossing(points: Sequence[tuple[float, float]]) -> tuple[float | None, bool]:
    """The length from which a ratio of times stays below 1, interpolated.

    Args:
        points: (length, ratio), ascending.

    Returns:
        The length, None if the ratio at the last point is not below 1; and whether the
        ratio is below 1 at all points: then the crossing may be before the first.
    """
    places, gains = zip(*((np.log(x), -np.log(y)) for x, y in points), strict=True)
    if gains[-1] <= 0:
        return None, False
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=-1)
    if last < 0:
        return float(points[0][0]), True
    part = gains[last] / (gains[last] - gains[last + 1])
    return float(np.exp(places[last] + part * (places[last + 1] - places[last]))), False


def tpu_table(rows: Sequence[Json]) -> str:
    """A table of cycles over those of full attention; - where they are unknown."""
    cycles = {(row["pattern"], row["length"]): row["cycles"] for row in rows}

    def ratio(pattern: str, length: int) -> str:
        own = cycles.get((pattern, length))
        return "-" if own is None else f"{own / cycles['full', length]:.2f}"

    return table(
        ["pattern", *(f"{n:,}" for n in TPU_LENGTHS)],
        [[p, *(ratio(p, n) for n in TPU_LENGTHS)] for p in TPU_PATTERNS[1:]],
    )


def page(
    rows: Sequence[Json],
    fits: dict[str, Fit],
    rates: Sequence[tuple[int, float]],
    tpu: Sequence[Json] | None,
) -> Page:
    """The page of these measurements."""
    at = {(row["series"], row["length"]): row for row in rows}
    lengths = sorted({n for name, n in at if name == "full"})
    longest = lengths[-1]

    def ratios(name: str, direction: str) -> list[tuple[float, float]]:
        dense = _dense(name)
        return [
            (n, at[name, n]["seconds"][direction] / at[dense, n]["seconds"][direction])
            for n in lengths
        ]

    found: Json = {}
    for name in PATTERNS:
        by = {d: ratios(name, d) for d in DIRECTIONS}
        found[name] = {
            "against": _dense(name),
            "from": {d: crossing(points) for d, points in by.items()},
            "gain": {d: 1 / points[-1][1] for d, points in by.items()},
        }

    def start(name: str, direction: str) -> str:
        where, always = found[name]["from"][direction]
        if where is None:
            return "never"
        return f"{'≤ ' if always else ''}{where:,.0f}"

    def memory(name: str, direction: str) -> str:
        held = at[name, longest]["temporary_bytes"][direction]
        return "-" if held is None else f"{held / 1e6:,.1f} MB"

    shares: Json = {
        kind: {
            d: sorted(
                (
                    row["density"],
                    row["seconds"][d] / at["full", row["length"]]["seconds"][d],
                )
                for row in rows
                if row["series"].startswith(f"{kind} of")
            )
            for d in DIRECTIONS
        }
        for kind in ("window", "random")
    }
    middle = next(row["length"] for row in rows if " of " in row["series"])

    def by_direction(kind: str) -> str:
        return ", ".join(f"{d} {density_below(shares[kind][d])}" for d in DIRECTIONS)

    columns = (f"{d} {what}" for what in ("from", "gain", "memory") for d in DIRECTIONS)
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "starts": ", ".join(
                f"{name} {start(name, 'training')}" for name in PATTERNS
            ),
            "middle": middle,
            "longest": longest,
            "window_pays": by_direction("window"),
            "random_pays": by_direction("random"),
            "cases": len(rows),
            "fits": fits,
            "worst": max(f.worst for f in fits.values()),
            "seconds": sum(sum(r["seconds"].values()) for r in rows),
            "heads": HEADS,
            "head_size": HEAD_SIZE,
            "target": TARGET,
            "crossings": table(
                ["pattern", "against", *columns],
                [
                    [
                        name,
                        found[name]["against"],
                        *(start(name, d) for d in DIRECTIONS),
                        *(f"{found[name]['gain'][d]:.1f}x" for d in DIRECTIONS),
                        *(memory(name, d) for d in DIRECTIONS),
                    ]
                    for name in PATTERNS
                ],
            ),
            "densities": table(
                ["pattern", "direction", *(f"{s:.1%}" for s in SHARES)],
                [
                    [kind, d, *(f"{y:.2f}" for _, y in points[d])]
                    for kind, points in shares.items()
                    for d in DIRECTIONS
                    if len(points[d]) == len(SHARES)
                ],
            ),
            "fitted": table(
                ["", "call", "query", "pair", "block", "median error", "worst"],
                [
                    [
                        d,
                        1e6 * f.call,
                        1e9 * f.query,
                        1e12 * f.pair,
                        1e9 * f.block,
                        f"{f.error:.0%}",
                        f"{f.worst:.0%}",
                    ]
                    for d, f in fits.items()
                ],
            ),
            "tpu": tpu_table(tpu or ()),
        },
        charts={
            "length": lines(
                {
                    d: {
                        name: [
                            (n, 1e6 * at[name, n]["seconds"][d] / n) for n in lengths
                        ]
                        for name in (*DENSE, *PATTERNS)
                    }
                    for d in DIRECTIONS
                },
                "length T = S",
                log="xy",
            ),
            "density": lines(
                {
                    d: {kind: points[d] for kind, points in shares.items()}
                    for d in DIRECTIONS
                },
                "density",
                log="xy",
            ),
        },
        results={
            "crossover": found,
            "fit": {d: f._asdict() for d, f in fits.items()},
            "tpu": tpu,
            "tile_rates": rates,
            "rows": rows,
        },
    )


def _dense(name: str) -> str:
    return "causal" if name.startswith("causal") else "full"


def density_below(points: Sequence[tuple[float, float]]) -> str:
    """The density below which time is less than full attention's, as text.

    Args:
        points: (density, ratio of times), ascending.
    """
    # ``crossing`` wants ascending values: 1 / density, from the dense end on.
    where, _ = crossing([(1 / x, y) for x, y in reversed(points)])
    if where is None:
        return "none"
    return f"{1 / where:.0%}"
