"""The command ``attnlab show``: draws masks and how information spreads in layers."""

import argparse
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnlab._src.bench.expression import NAMES, read_mask
from attnlab._src.bench.options import whole, writable_folder
from attnlab._src.files import write_atomically
from attnlab._src.masks.base import Mask
from attnlab._src.masks.graph import (
    LONGEST,
    adjacency,
    distances,
    summary,
    visible_share,
)
from attnlab._src.view.masks import content_of
from attnlab._src.view.page import page_of

DESCRIPTION = """\
Draws masks, as a picture and as a page to zoom into, counts their visible pairs and
live blocks, and computes how many layers it takes until each position depends on every
other one."""

#: Greatest number of cells along a side of a picture.
_CELLS = 128


def mask_argument(text: str) -> tuple[str, Mask]:
    """An argparse type: a mask expression; returns its text and the mask."""
    try:
        return text, read_mask(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add(
        "mask",
        nargs="+",
        type=mask_argument,
        metavar="MASK",
        help="as in Python: 'causal() & (sliding_window(64, 0) | anchor(1))'; made of "
        + ", ".join(NAMES),
    )
    add("--length", type=whole(2), default=1024, help="sequence length (1024)")
    add("--block-size", type=whole(1), default=128, help="size of a block (128)")
    add(
        "--out",
        type=writable_folder,
        default="attnlab-show",
        metavar="DIR",
        help="folder for the page, the picture and the numbers (attnlab-show)",
    )


def command(given: argparse.Namespace) -> int:
    """Runs ``attnlab show``.

    Returns:
        The exit status: 0; 1 if a mask does not fit the length.
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    messages = Console(stderr=True)
    connected = given.length <= LONGEST
    rows, pictures, contents = [], [], []
    for text, mask in track(given.mask, "", console=messages, transient=True):
        try:
            row = _counted(text, mask, given.length, given.block_size)
            if connected:
                more, picture = _connected(mask, given.length)
                row |= more
                pictures.append(picture)
            contents.append(content_of(mask, given.length, given.length))
        except ValueError as error:
            messages.print(f"attnlab show: {text}: {error}", style="red")
            return 1
        rows.append(row)
    table = Table(title=f"{given.length:,} positions, blocks of {given.block_size}")
    table.add_column("mask", overflow="fold")
    names = ["density", "live blocks", "partial"]
    if connected:
        names += ["layers to full reach", "mean path", "never", "gap"]
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [
            row["mask"],
            f"{row['density']:.1%}" if connected else f"{row['density']:.4%}",
            f"{row['blocks_live']:,} of {row['blocks']:,}",
            f"{row['blocks_partial']:,}",
        ]
        if connected:
            mean = row["mean_path"]
            cells += [
                f"{row['layers']:,}",
                "-" if mean is None else f"{mean:.2f}",
                f"{row['unreachable']:.0%}",
                f"{row['gap']:.3f}",
            ]
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    console.print(
        "layers to full reach: number of layers until every pair that can be connected "
        "is; mean path: mean number of layers to connect a pair; never: pairs that "
        "cannot be connected; gap: 1 - the second eigenvalue of a random walk."
        if connected
        else f"How positions are connected is computed up to --length {LONGEST:,}.",
        style="dim",
        highlight=False,
    )
    path = given.out / "show.json"
    content = {"length": given.length, "block_size": given.block_size, "masks": rows}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    written = [path, page_of(contents).save(given.out / "show.html")]
    if connected:
        written += _draw(rows, pictures, given.out)
    console.print(f"written: {', '.join(map(str, written))}", highlight=False)
    return 0


def _counted(text: str, mask: Mask, length: int, block_size: int) -> dict[str, Any]:
    live, full, total = live_blocks(mask, length, block_size)
    return {
        "mask": text,
        "density": float(mask.density(length)),
        "blocks": total,
        "blocks_live": live,
        "blocks_partial": live - full,
    }


def _connected(
    mask: Mask, length: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    edges = adjacency(mask, length)
    found = distances(edges)
    numbers = summary(edges, found)
    row = {
        "layers": numbers.layers,
        "mean_path": None if math.isnan(numbers.mean_path) else numbers.mean_path,
        "unreachable": numbers.unreachable,
        "gap": numbers.gap,
        "shares": numbers.shares,
    }
    # A cell shows the best value of its pairs, so that a single anchor is visible.
    layers = np.where(found < 0, np.inf, found)
    return row, (_cells(visible_share(mask, length)), -_cells(-layers))


def live_blocks(mask: Mask, length: int, block_size: int) -> tuple[int, int, int]:
    """Number of live blocks, of full ones among them, and of all blocks."""
    rows = mask.plan(length, block_size=block_size).rows
    full, partial = (np.asarray(part.per_row()) for part in rows)
    total = full.size * -(-length // block_size)
    return int(full.sum() + partial.sum()), int(full.sum()), total


def _cells(values: np.ndarray) -> np.ndarray:
    """Reduces an array to at most ``_CELLS`` cells a side, by the maximum."""
    size = -(-len(values) // _CELLS)
    padded = np.pad(values, (0, -len(values) % size), mode="edge")
    count = len(padded) // size
    return padded.reshape(count, size, count, size).max((1, 3))


def _draw(
    rows: Sequence[dict[str, Any]],
    pictures: Sequence[tuple[np.ndarray, np.ndarray]],
    folder: Path,
) -> list[Path]:
    from matplotlib.ticker import MaxNLocator

    from attnlab._src.bench.charts import plt, save

    figure, axes = plt.subplots(
        len(rows),
        3,
        figsize=(11, 3.4 * len(rows)),
        layout="constrained",
        squeeze=False,
        width_ratios=(1, 1.2, 1.3),
    )
    for (first, second, third), row, (alive, layers) in zip(
        axes, rows, pictures, strict=True
    ):
        first.imshow(alive, "Greys", vmin=0, vmax=1, interpolation="none")
        name = "\n".join(textwrap.wrap(row["mask"], 44))
        first.set_title(f"{name}\n{row['density']:.1%} alive", fontsize=8)
        first.set_ylabel("query")
        reached = np.where(np.isinf(layers), np.nan, layers)
        shown = second.imshow(reached, "viridis_r", vmin=0, interpolation="none")
        second.set_title("layers until a query knows a key", fontsize=8)
        figure.colorbar(
            shown, ax=second, shrink=0.8, ticks=MaxNLocator("auto", integer=True)
        )
        for axis in (first, second):
            axis.set(xticks=[], yticks=[], xlabel="key")
        steps = range(1, len(row["shares"]) + 1)
        third.plot([0, *steps], [0, *row["shares"]], "o-", ms=3)
        third.set(ylim=(0, 1.03), xlabel="layers")
        third.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        third.set_title("share of pairs connected", fontsize=8)
        third.grid(color="0.9")
        third.spines[["top", "right"]].set_visible(False)
    return save(figure, folder, "show")
