"""What measurements of sparse and dense attention say, on a page."""

from collections.abc import Sequence

import numpy as np

from attnlab._src.implementations.measured import Fit
from benchmarks.studies.crossover_cases import (
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
from benchmarks.studies.page import Chart, Page, Table, lines
from benchmarks.studies.record import Json


def crossing(points: Sequence[tuple[float, float]]) -> tuple[float | None, bool]:
    """From where on a ratio of times is below 1, between the points that were measured.

    Args:
        points: (length, ratio), ascending.

    Returns:
        None where it is not below 1 at the end; and whether it is below 1 at all
        points, so that it may be already before the first.
    """
    places, gains = zip(*((np.log(x), -np.log(y)) for x, y in points), strict=True)
    if gains[-1] <= 0:
        return None, False
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=-1)
    if last < 0:
        return float(points[0][0]), True
    part = gains[last] / (gains[last] - gains[last + 1])
    return float(np.exp(places[last] + part * (places[last + 1] - places[last]))), False


def tpu_table(rows: Sequence[Json]) -> Table:
    """Cycles over those of full attention."""
    cycles = {(row["pattern"], row["length"]): row["cycles"] for row in rows}

    def ratio(pattern: str, length: int) -> str:
        own = cycles[pattern, length]
        return "-" if own is None else f"{own / cycles['full', length]:.2f}"

    return Table(
        f"Forward on {TARGET}, by the static estimate of its compiler: cycles over "
        "those of full attention (-: it tells none); bfloat16, eight heads of 128, "
        "window ±256.",
        ["pattern", *(f"{n:,}" for n in TPU_LENGTHS)],
        [[p, *(ratio(p, n) for n in TPU_LENGTHS)] for p in TPU_PATTERNS[1:]],
    )


def page(
    rows: Sequence[Json],
    fits: dict[str, Fit],
    rates: Sequence[tuple[int, float]],
    tpu: Sequence[Json] | None,
) -> Page:
    """What the measurements say."""
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
    below = "; ".join(
        f"{kind} {d} below {least}"
        for kind, points in shares.items()
        for d in DIRECTIONS
        for least in [density_below(points[d])]
    )
    return Page(
        title="When does sparsity pay?",
        claim="Compute and memory in proportion to what is alive: a pattern of a fixed "
        "number of keys a query costs O(T), full attention O(T^2); where do they meet?",
        answer="Forward and backward, attention alone, a pattern of about 385 keys a "
        "query is faster than full (causal ones: than causal) attention from T on: "
        + ", ".join(f"{name} {start(name, 'training')}" for name in PATTERNS)
        + f". At {middle:,} it pays: {below} of the pairs. The fit of {len(rows)} "
        f"cases is off by {fits['forward'].error:.0%} (forward) and "
        f"{fits['training'].error:.0%} (training) in the median, "
        f"{max(f.worst for f in fits.values()):.0%} at worst.",
        cost="Nothing is trained; one call of each takes "
        f"{sum(sum(r['seconds'].values()) for r in rows):.0f} seconds.",
        tables=[
            Table(
                "The length from which a pattern of about 385 keys a query is faster "
                f"than dense attention; how much faster it is at {longest:,}, and what "
                "it holds there beside inputs and outputs.",
                [
                    "pattern",
                    "against",
                    *(f"{d} from" for d in DIRECTIONS),
                    *(f"{d} gain" for d in DIRECTIONS),
                    *(f"{d} memory" for d in DIRECTIONS),
                ],
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
            Table(
                f"Time over that of full attention at {middle:,}, by density.",
                ["pattern", "direction", *(f"{s:.1%}" for s in SHARES)],
                [
                    [kind, d, *(f"{y:.2f}" for _, y in points[d])]
                    for kind, points in shares.items()
                    for d in DIRECTIONS
                    if len(points[d]) == len(SHARES)
                ],
            ),
            Table(
                "Fitted: microseconds a call, nanoseconds a query, picoseconds a pair "
                "that is executed, nanoseconds a live block; the last three a head.",
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
            *([] if tpu is None else [tpu_table(tpu)]),
        ],
        charts=[
            Chart(
                "length",
                f"Microseconds a token by length; {HEADS} heads of {HEAD_SIZE}, "
                "float32.",
                lines(
                    {
                        d: {
                            name: [
                                (n, 1e6 * at[name, n]["seconds"][d] / n)
                                for n in lengths
                            ]
                            for name in (*DENSE, *PATTERNS)
                        }
                        for d in DIRECTIONS
                    },
                    "length T = S",
                    log="xy",
                ),
            ),
            Chart(
                "density",
                f"Time over that of full attention at {middle:,}, by density.",
                lines(
                    {
                        d: {kind: points[d] for kind, points in shares.items()}
                        for d in DIRECTIONS
                    },
                    "density",
                    log="xy",
                ),
            ),
        ],
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
    # From the dense end on: as a length, something that grows.
    where, _ = crossing([(1 / x, y) for x, y in reversed(points)])
    if where is None:
        return "none"
    return f"{1 / where:.0%}"
