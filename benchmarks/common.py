"""Shared by the scripts: options, writing results, line charts."""

import argparse
import datetime as dt
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab._src.bench.charts import plain_log, plt, save
from attnlab._src.bench.machine import machine_line, versions
from attnlab._src.bench.options import writable_folder
from attnlab._src.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


#: Points ``(x, y)`` of each line, in order of x, by label.
Series = Mapping[str, Sequence[tuple[float, float]]]

#: With more lines than this the legend stands beside the panels, not inside them.
CROWDED = 5


def parser(description: str, results: Path = RESULTS) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--out",
        type=writable_folder,
        default=str(results),
        metavar="DIR",
        help=f"where the results go ({results.relative_to(ROOT)})",
    )
    made.add_argument("--quick", action="store_true", help="small sizes, in seconds")
    return made


def command(name: str, arguments: Sequence[str]) -> str:
    """The command that reproduces these results, without ``--out``."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--out":
            next(rest, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{name}", *kept])


def write(
    folder: Path, name: str, results: dict[str, Any], *, quiet: bool = False
) -> None:
    content = {
        "command": command(name, sys.argv[1:]),
        "machine": machine_line(),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **results,
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(folder / f"{name}.json", (text + "\n").encode())
    if not quiet:
        print(f"written: {folder / name}.json")


def caption() -> str:
    return f"{machine_line()}; jax {versions()['jax']}"


def side_by_side(titles: Iterable[str], width: float, height: float) -> tuple[Any, Any]:
    """A figure of panels in a row, and their axes.

    Args:
        titles: the title of each panel.
        width: of a panel, in inches.
        height: of a panel, in inches.
    """
    named = list(titles)
    figure, axes = plt.subplots(
        1,
        len(named),
        figsize=(width * len(named), height),
        layout="constrained",
        squeeze=False,
    )
    for axis, title in zip(axes[0], named, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def lines(
    panels: Mapping[str, Series], across: str, *, marker: str = "o", log: str = ""
) -> Any:
    """A figure of points joined by lines, with a panel for each quantity.

    Args:
        panels: the lines of each panel, by title.
        across: label of the horizontal axis.
        marker: Matplotlib's marker of the points; empty: none.
        log: the logarithmic axes: ``x``, ``y``, or ``xy``.
    """
    figure, axes = side_by_side(panels, 5, 4)
    names = {tuple(series) for series in panels.values()}
    beside = len(names) == 1 and len(min(names)) > CROWDED
    for axis, series in zip(axes, panels.values(), strict=True):
        for number, (label, points) in enumerate(series.items()):
            if points:
                style = {"color": f"C{number}", "marker": marker, "ms": 4}
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_xlabel(across)
        if "x" not in log:
            axis.locator_params(axis="x", integer=True)
        for name in log:
            plain_log(getattr(axis, f"{name}axis"))
        if any(series.values()) and not beside:
            axis.legend(fontsize=8, frameon=False)
    if beside:
        found = {
            label: handle
            for axis in axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            found.values(),
            found,
            loc="outside right center",
            fontsize=8,
            frameon=False,
        )
    return figure


def save_lines(
    folder: Path, name: str, panels: Mapping[str, Series], across: str
) -> None:
    """Saves :func:`lines` with logarithmic axes and the machine as a caption."""
    figure = lines(panels, across, log="xy")
    figure.supxlabel(caption(), fontsize=8, color="0.35")
    save(figure, folder, name, kinds=("svg",))
