"""The command ``attnlab report``: runs as one page that needs nothing else."""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attnlab._src.bench.options import writable_folder
from attnlab._src.bench.runs import BOUNDS, OURS, Line, Run, differences, read_run
from attnlab._src.view.page import Page, render

DESCRIPTION = """\
Writes one HTML page from files of attnlab bench, of scripts in benchmarks or of
studies: tables that sort and filter, charts, and, of two files, what became slower."""


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


class Chart(NamedTuple):
    """A chart, as SVG; a table of the page has its numbers."""

    title: str
    svg: str


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
            charts.append(_bars(title, lines))
            if (drawn := _against_length(title, lines)) is not None:
                charts.append(drawn)
    tables += [_table(*each) for each in run.tables]
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


def _contenders(lines: Sequence[Line]) -> list[str]:
    """All contenders, attnlab's own first."""
    names = dict.fromkeys(x.contender for x in lines)
    ours = [n for n in OURS if n in names]
    return [*ours, *(n for n in names if n not in ours)]


def _times(title: str, lines: Sequence[Line]) -> Table:
    """Milliseconds by problem and contender, and ratios to attnlab's best."""
    names = _contenders(lines)
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


def _svg(figure: Any) -> str:
    """A figure as SVG text, without a header; ids differ between figures."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": None, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _bars(title: str, lines: Sequence[Line]) -> Chart:
    """Time by problem and contender, with its spread."""
    from attnlab._src.bench.charts import colour, plain_log, plt

    names = _contenders(lines)
    timed = [(x, x.median) for x in lines if x.median]
    problems = [*dict.fromkeys(x.problem for x, _ in timed)]
    height = 1.2 + 0.16 * len(timed) + 0.25 * len(problems)
    figure, axis = plt.subplots(figsize=(9, height), layout="constrained")
    place, ticks = 0.0, []
    for problem in problems:
        group = [each for each in timed if each[0].problem == problem]
        ticks.append(place + (len(group) - 1) / 2)
        for line, median in sorted(group, key=lambda x: names.index(x[0].contender)):
            shade = colour(line.contender, names)
            axis.barh(place, 1e3 * median, 0.9, color=shade)
            if line.low and line.high:
                ends = [1e3 * line.low, 1e3 * line.high]
                axis.plot(ends, [place] * 2, color="0.3", linewidth=1)
            place += 1
        place += 0.8
    plain_log(axis.xaxis)
    axis.set_yticks(ticks, problems)
    axis.invert_yaxis()
    axis.set_xlabel("ms, median and 20 to 80 %, log scale")
    axis.spines[["top", "right"]].set_visible(False)
    present = [n for n in names if any(x.contender == n for x, _ in timed)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour(n, names)) for n in present]
    figure.legend(
        handles,
        present,
        loc="outside upper center",
        ncols=min(len(present), 6),
        frameon=False,
    )
    return Chart(f"{title}: time", _svg(figure))


def _against_length(title: str, lines: Sequence[Line]) -> Chart | None:
    """Time against the length, with guides, if there are at least three lengths."""
    from attnlab._src.bench.charts import colour, plain_log, plt

    timed = [(x, x.median) for x in lines if x.median]
    lengths = sorted({x.length for x, _ in timed})
    if len(lengths) < 3:
        return None
    names = _contenders([x for x, _ in timed])
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in names:
        points: dict[int, float] = {}
        for line, median in timed:
            if line.contender == name:
                known = points.get(line.length, median)
                points[line.length] = min(median, known)
        xs = sorted(points)
        ys = [1e3 * points[x] for x in xs]
        axis.plot(xs, ys, "o-", ms=3, color=colour(name, names), label=name)
    least = 1e3 * min(median for _, median in timed)
    for power, style in ((1, ":"), (2, "--")):
        guide = [least * (n / lengths[0]) ** power for n in lengths]
        label = f"length^{power}"
        axis.plot(lengths, guide, style, color="0.6", linewidth=1, label=label)
    for one in (axis.xaxis, axis.yaxis):
        plain_log(one)
    axis.set(xlabel="length", ylabel="ms, least of the problems of a length")
    axis.legend(frameon=False)
    return Chart(f"{title}: time against the length", _svg(figure))
