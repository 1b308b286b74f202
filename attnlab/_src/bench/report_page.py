"""The command ``attnlab report``: runs as one page that needs nothing else."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnlab._src.bench.options import writable_folder
from attnlab._src.bench.report_charts import charts_of, contenders_of, cycles
from attnlab._src.bench.runs import (
    BOUNDS,
    OURS,
    Estimate,
    Line,
    Run,
    differences,
    read_run,
)
from attnlab._src.view.page import Page, render

DESCRIPTION = """\
Writes one HTML page from files of attnlab bench, attnlab static, scripts in benchmarks
or studies: tables that sort and filter, charts; of two files, what became slower."""


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what is shown.
        value: what the column is sorted by.
        kind: a class of the style sheet: ``"slower"``, ``"faster"``, ``"best"``, ...
    """

    text: str
    value: Any
    kind: str = ""


class Table(NamedTuple):
    """A table of the page."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "run", nargs="+", type=Path, metavar="FILE", help="JSON of a run or a study"
    )
    parser.add_argument(
        "--out",
        type=writable_folder,
        default="attnlab-report",
        metavar="DIR",
        help="folder for report.html (attnlab-report)",
    )


def command(given: argparse.Namespace) -> int:
    """Runs ``attnlab report``.

    Returns:
        The exit status: 0; 1 if a file cannot be read or is something else.
    """
    from rich.console import Console

    try:
        runs = [read_run(path) for path in given.run]
        if len({run.name for run in runs}) < len(runs):
            paths = map(str, given.run)
            runs = [r._replace(name=n) for r, n in zip(runs, paths, strict=True)]
    except ValueError as error:
        Console(stderr=True).print(
            f"attnlab report: {error}",
            style="red",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return 1
    path = page_of_runs(runs).save(given.out / "report.html")
    Console().print(f"written: {path}", highlight=False, markup=False)
    return 0


def page_of_runs(runs: Sequence[Run]) -> Page:
    """The page of one or several runs; two are compared."""
    sections = [_section(run) for run in runs]
    compared = None
    if len(runs) == 2:
        compared = _compared(*runs)
    names = ", ".join(run.name for run in runs)
    return render(
        "report",
        f"attnlab report: {names}",
        scripts=("report.js",),
        sections=sections,
        compared=compared,
    )


def _section(run: Run) -> Mapping[str, Any]:
    tables, charts = [], []
    for direction, title in (("forward", "Forward"), ("both", "Forward and backward")):
        lines = [x for x in run.lines if x.direction == direction]
        if any(x.median for x in lines):
            tables.append(_times(title, lines))
            charts += charts_of(title, lines)
    if run.estimates:
        tables.append(_estimates(run.estimates))
        charts += cycles(run.estimates)
    tables += [_table(*each) for each in run.tables]
    checked = {
        (x.problem, x.contender, x.error): None
        for x in run.lines
        if x.error is not None
    }
    if checked:
        columns = ["problem", "contender", "greatest error over the allowed one"]
        tables.append(_table("Checked against the reference", columns, [*checked]))
    # A reason holds for both passes.
    refused = {
        (x.problem, x.contender, x.status, x.reason): None
        for x in run.lines
        if x.status != "ok"
    }
    if refused:
        columns = ["problem", "contender", "status", "why"]
        tables.append(_table("Without a time", columns, [*refused]))
    return {"name": run.name, "facts": run.facts, "tables": tables, "charts": charts}


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    return Table(title, columns, [[*map(_cell, row)] for row in rows])


def _cell(value: Any) -> Cell:
    if value is None:
        return Cell("-", "")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Cell(str(value), str(value))
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return Cell(text, value, "number")


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _times(title: str, lines: Sequence[Line]) -> Table:
    """Milliseconds by problem and contender, and ratios to attnlab's best."""
    names = contenders_of(lines)
    rows = []
    for problem in dict.fromkeys(x.problem for x in lines):
        by = {x.contender: x for x in lines if x.problem == problem}
        medians = {n: x.median for n, x in by.items() if x.median}
        if not medians:
            continue
        ours = [median for name, median in medians.items() if name in OURS]
        first = min((x for n, x in medians.items() if n not in BOUNDS), default=None)
        density = next(iter(by.values())).density
        cells = [_cell(problem), _cell(None)]
        if density is not None:
            cells[1] = Cell(f"{density:.2%}", density, "number")
        for name in names:
            if name not in medians:
                cells.append(Cell(by[name].status if name in by else "-", ""))
                continue
            line, median = by[name], medians[name]
            text = _milliseconds(median)
            if line.low and line.high:
                text += f" ({_milliseconds(line.low)} to {_milliseconds(line.high)})"
            if ours and name not in (*OURS, *BOUNDS):
                text += f" {median / min(ours):.2f}x"
            kind = "number best" if median == first else "number"
            cells.append(Cell(text, median, kind))
        rows.append(cells)
    columns = ["problem", "visible", *names]
    about = "ms: median (20 to 80 %), and times attnlab's best"
    return Table(f"{title}, {about}", columns, rows)


def _estimates(found: Sequence[Estimate]) -> Table:
    rows = []
    for each in found:
        share = None
        if each.cycles and each.least is not None:
            share = each.least / each.cycles
        cells = [each.problem, each.cycles, each.least, each.binds, share]
        rows.append([*cells, *each.cells.values()])
    columns = ["problem", "cycles", "at least", "bound by", "share of the bound"]
    title = "Static estimates: cycles of one core, for ratios, not times"
    return _table(title, [*columns, *found[0].cells], rows)


def _compared(before: Run, after: Run) -> Table:
    passes = {"forward": "forward", "both": "forward and backward"}
    rows = [
        [
            _cell(each.after.problem),
            _cell(passes[each.after.direction]),
            _cell(each.after.contender),
            Cell(_milliseconds(each.seconds[0]), each.seconds[0], "number"),
            Cell(_milliseconds(each.seconds[1]), each.seconds[1], "number"),
            Cell(f"{each.ratio:.3f}", each.ratio, f"number {each.verdict}"),
            Cell(each.verdict, each.verdict, each.verdict),
        ]
        for each in differences(before.lines, after.lines)
    ]
    columns = ["problem", "pass", "contender"]
    columns += [before.name, after.name, "ratio", "verdict"]
    return Table("Both runs: ms, and the second over the first", columns, rows)
