"""Charts of measured time and memory, as PNG and SVG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from attnlab._src.bench.runner import Row
from attnlab._src.files import write_atomically

# Writes files and never opens a window.
mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

#: Colours that colour-blind readers can distinguish (Okabe and Ito, 2008).
COLOURS = {
    "native": "#000000",
    "tiled": "#0072B2",
    "batched": "#F0E442",
    "jax_nn": "#E69F00",
    "reference": "#999999",
    "jax.nn": "#D55E00",
    "flax.nnx": "#CC79A7",
    "torch": "#009E73",
    "flex": "#56B4E9",
}
_MORE = ("#777777", "#AA4499", "#882255")


def colour(name: str, names: Sequence[str]) -> str:
    """The same colour for the same contender in every chart."""
    unknown = [n for n in names if n not in COLOURS]
    return COLOURS.get(name) or _MORE[unknown.index(name) % len(_MORE)]


def save(
    figure: Figure, folder: Path, name: str, kinds: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Writes a figure atomically in each format, and closes it."""
    paths = []
    for kind in kinds:
        buffer = io.BytesIO()
        # Without a date and with fixed ids, the same numbers give the same file.
        with mpl.rc_context({"svg.hashsalt": "attnlab", "svg.fonttype": "none"}):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
        paths.append(folder / f"{name}.{kind}")
        write_atomically(paths[-1], buffer.getvalue())
    plt.close(figure)
    return paths


def draw(rows: Sequence[Row], folder: Path, caption: str) -> list[Path]:
    """Draws time and memory of the rows with status "ok", if there are any.

    Args:
        rows: what was measured.
        folder: folder for the charts ``time`` and ``memory``, each as PNG and SVG.
        caption: text below the charts: machine and versions.

    Returns:
        The files written.
    """
    passed = [row for row in rows if row.status == "ok"]
    if not passed:
        return []
    paths = _bars(passed, folder, "time", caption)
    if any(r.both and r.both.temporary_bytes is not None for r in passed):
        paths += _bars(passed, folder, "memory", caption)
    return paths


def plain_log(axis: Any) -> None:
    """Makes an axis logarithmic with plain numbers as ticks: 1, 2, 5, 10, 20, ..."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.9g}"))
    axis.set_minor_formatter(NullFormatter())


def _value(row: Row, direction: str, what: str) -> tuple[float, float, float] | None:
    """Median, 20 % and 80 % quantile in ms; or megabytes, repeated three times."""
    measured = getattr(row, direction)
    if what == "memory":
        if measured.temporary_bytes is None:
            return None
        size = measured.temporary_bytes / 1e6
        return size, size, size
    timing = measured.timing
    return 1e3 * timing.median, 1e3 * timing.low, 1e3 * timing.high


def _bars(rows: list[Row], folder: Path, what: str, caption: str) -> list[Path]:
    shown = [r for r in rows if _value(r, "both", what)]
    names = list(dict.fromkeys(r.contender for r in rows))
    places, labels, place = [], {}, 0.0
    for index, row in enumerate(shown):
        if index and row.spec != shown[index - 1].spec:
            place += 0.8
        labels.setdefault(row.spec, []).append(place)
        places.append(place)
        place += 1
    height = 1.4 + 0.2 * place
    figure, axes = plt.subplots(
        1, 2, figsize=(11, height), sharey=True, layout="constrained"
    )
    for axis, direction in zip(axes, ("forward", "both"), strict=True):
        for place, row in zip(places, shown, strict=True):
            value = _value(row, direction, what)
            if value is None:
                continue
            median, low, high = value
            axis.barh(place, median, 0.9, color=colour(row.contender, names))
            if what == "time":
                axis.plot([low, high], [place, place], color="black", linewidth=1)
            axis.annotate(
                f"{median:,.0f}" if median >= 10 else f"{median:,.1f}",
                (max(high, median), place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        plain_log(axis.xaxis)
        axis.margins(x=0.12, y=0.02)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title("forward" if direction == "forward" else "forward and backward")
        unit = "ms, median and 20-80 %" if what == "time" else "MB of temporaries"
        axis.set_xlabel(unit + ", log scale")
    many_types = len({r.spec.dtype for r in rows}) > 1
    axes[0].set_yticks(
        [sum(p) / len(p) for p in labels.values()],
        [s.label + (f" {s.dtype}" if many_types else "") for s in labels],
    )
    axes[0].invert_yaxis()
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    present = [n for n in names if any(r.contender == n for r in shown)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour(n, names)) for n in present]
    figure.legend(
        handles, present, loc="outside upper center", ncols=len(present), frameon=False
    )
    figure.supxlabel(caption, fontsize=8, color="0.35")
    return save(figure, folder, what)
