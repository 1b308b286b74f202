"""How many layers of a pattern carry a word from anywhere to anywhere?"""

import math
import time

import numpy as np

from attnlab._src.bench.graph import Reach, reach
from benchmarks.studies.context import Context
from benchmarks.studies.language_models import PATTERNS, layer_masks
from benchmarks.studies.page import Chart, Page, Table, lines

#: Longformer's own projections change weights, not who sees whom.
NAMES = tuple(name for name in PATTERNS if name != "own projections")


def row(name: str, density: float, found: Reach) -> list[str | int]:
    mean = "-" if math.isnan(found.mean_path) else f"{found.mean_path:.2f}"
    return [
        name,
        f"{density:.1%}",
        found.layers,
        mean,
        f"{found.unreachable:.1%}",
        f"{found.gap:.3f}",
    ]


def study(context: Context) -> Page:
    """Every pattern, in both directions and causal; nothing is trained."""
    length = 128 if context.quick else 1024
    started = time.perf_counter()
    found: dict[str, dict[str, Reach]] = {}
    tables, panels = [], {}
    for kind, causal in (("both directions", False), ("causal", True)):
        masks = {name: layer_masks(name, length, 1, causal)[0] for name in NAMES}
        found[kind] = {name: reach(mask, length) for name, mask in masks.items()}
        tables.append(
            Table(
                f"{kind.capitalize()}, {length:,} words. Layers: to full reach; never: "
                "pairs that no number of layers connects; gap: 1 - the second "
                "eigenvalue of a random walk.",
                ["pattern", "density", "layers", "mean path", "never", "gap"],
                [row(n, masks[n].density(length), f) for n, f in found[kind].items()],
            )
        )
        panels[kind] = {
            name: list(enumerate(f.shares, 1)) for name, f in found[kind].items()
        }
    both = found["both directions"]
    whole = [n for n in both if n != "full" and not both[n].unreachable]
    never = [f"{n} {f.unreachable:.0%}" for n, f in both.items() if f.unreachable]
    slowest, fastest = (
        choose(whole, key=lambda n: both[n].layers) for choose in (max, min)
    )
    gaps = {n: f.gap for n, f in both.items() if n != "full"}
    widest = max(gaps, key=lambda n: gaps[n])
    seconds = time.perf_counter() - started
    return Page(
        title="How far does a word travel in a layer?",
        claim="Random edges make an expander, in which every two words are a few steps "
        "apart and information mixes fast; anchors join all in two; a window alone "
        "needs as many layers as it fits into the text (Zaheer et al., 2020, section "
        "2).",
        answer=f"At the same number of pairs, {slowest} needs {both[slowest].layers} "
        f"layers until every word can know every other, {fastest} "
        f"{both[fastest].layers}"
        + (f"; never connected: of {', '.join(never)} of the pairs" if never else "")
        + f"; the widest spectral gap is that of {widest} "
        f"({gaps[widest]:.3f}; window {gaps['window']:.3f}).",
        cost=f"Nothing is trained; {seconds:.0f} seconds.",
        tables=tables,
        charts=[
            Chart(
                "reach",
                "Share of the pairs that can be connected at all, by layers.",
                lines(panels, "layers", log="x"),
            )
        ],
        results={
            kind: {name: _finite(f) for name, f in rows.items()}
            for kind, rows in found.items()
        },
    )


def _finite(found: Reach) -> dict[str, object]:
    mean = None if np.isnan(found.mean_path) else found.mean_path
    return {**found._asdict(), "mean_path": mean, "layers": found.layers}
