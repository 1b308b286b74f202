"""How many layers of a pattern does it take until every word can reach every other?"""

import math
import time
from pathlib import Path

import numpy as np

from attnlab._src.masks.graph import Reach, reach
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.models.language_models import PATTERNS, layer_masks
from benchmarks.studies.machinery.page import Page, lines, table

#: Without Longformer's own projections, which do not change the graph.
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
    """Graph measures of every pattern, in both directions and causal."""
    length = 128 if context.quick else 1024
    started = time.perf_counter()
    found: dict[str, dict[str, Reach]] = {}
    values, panels = {}, {}
    for kind, causal in (("both directions", False), ("causal", True)):
        masks = {name: layer_masks(name, length, 1, causal)[0] for name in NAMES}
        found[kind] = {name: reach(mask, length) for name, mask in masks.items()}
        values[kind.split()[0]] = table(
            ["pattern", "density", "layers", "mean path", "never", "gap"],
            [row(n, masks[n].density(length), f) for n, f in found[kind].items()],
        )
        panels[kind] = {
            name: list(enumerate(f.shares, 1)) for name, f in found[kind].items()
        }
    sparse = {n: f for n, f in found["both directions"].items() if n != "full"}
    layers = {n: f.layers for n, f in sparse.items() if not f.unreachable}
    widest = max(sparse, key=lambda n: sparse[n].gap)
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "length": length,
            "layers": ", ".join(
                f"{n} {layers[n]}" for n in sorted(layers, key=lambda n: layers[n])
            ),
            "never": ", ".join(
                f"{n} {f.unreachable:.0%}" for n, f in sparse.items() if f.unreachable
            )
            or "none",
            "widest": widest,
            "gap": sparse[widest].gap,
            "window_gap": sparse["window"].gap,
            "seconds": time.perf_counter() - started,
            **values,
        },
        charts={"reach": lines(panels, "layers", log="x")},
        results={
            kind: {name: _finite(f) for name, f in rows.items()}
            for kind, rows in found.items()
        },
    )


def _finite(found: Reach) -> dict[str, object]:
    mean = None if np.isnan(found.mean_path) else found.mean_path
    return {**found._asdict(), "mean_path": mean, "layers": found.layers}
