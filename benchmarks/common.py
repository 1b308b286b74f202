"""What the scripts share: options, writing results, a chart of lines."""

import argparse
import datetime as dt
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab.bench.charts import plain_log, plt, save
from attnlab.bench.files import write_atomically
from attnlab.bench.machine import machine_line, versions
from attnlab.bench.options import writable_folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
    """What makes these results again; where they went is nobody's business."""
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


def lines(
    folder: Path,
    name: str,
    panels: dict[str, dict[str, list[tuple[float, float]]]],
    across: str,
) -> None:
    """Draws points joined by lines on two logarithmic axes, one panel a quantity."""
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels), 4),
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, series) in zip(axes[0], panels.items(), strict=True):
        for label, points in series.items():
            axis.plot(*zip(*points, strict=True), "o-", label=label, markersize=4)
        plain_log(axis.xaxis)
        plain_log(axis.yaxis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(across)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.supxlabel(caption(), fontsize=8, color="0.35")
    save(figure, folder, name, kinds=("svg",))
