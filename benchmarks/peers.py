"""How fast is attnlab, compared with the other libraries that are installed?

The contenders of each line of `benchmarks/problems.py` are checked against the
reference, then timed in turns. After these lines, `benchmarks/overheads.py` measures
overheads. The results are written after each line; each kind of processor has a file.
"""

import argparse
import dataclasses
import datetime as dt
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from attnlab._src.bench.machine import (
    Peaks,
    machine_line,
    measure_peaks,
    measure_read_rate,
    processor,
    versions,
)
from attnlab._src.bench.report import as_record
from attnlab._src.bench.runner import Group, Row, run
from attnlab._src.bench.text import load_documents
from attnlab._src.bench.timing import Repeats
from attnlab._src.files import write_atomically
from benchmarks.common import caption, command, parser, write
from benchmarks.overheads import OVERHEADS
from benchmarks.problems import OURS, PROBLEMS, Problem, small

Record = dict[str, Any]

#: Enough for every pair of the longest line, 16,384 with 8 heads, so that the timed
#: programs themselves are checked; the reference takes some of the queries at a time.
CHECKED_BYTES = 64 << 30
FORMAT = 2


def now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def measure(
    problem: Problem,
    documents: Sequence[bytes],
    repeats: Repeats,
    report: Callable[[str], None],
    peaks_size: int = 2048,
) -> Record:
    """One line of the table, as JSON."""
    report("peaks of this machine")
    peaks = measure_peaks((problem.spec.dtype,), peaks_size)
    reads = measure_read_rate() if "read" in problem.others else None
    group = Group(problem.spec, problem.contenders, directions=(problem.direction,))
    (rows,) = run(
        [group], documents, repeats, checked_bytes=CHECKED_BYTES, report=report
    )
    return {
        **identity(problem),
        "group": problem.group,
        "date": now(),
        "peaks": {**peaks._asdict(), "read": reads},
        "rows": [row_record(row, problem, peaks, reads) for row in rows],
    }


def identity(problem: Problem) -> Record:
    """Results of an earlier run are kept only if all of this is the same."""
    return {
        "name": problem.name,
        "direction": problem.direction,
        "spec": dataclasses.asdict(problem.spec),
        "contenders": [c.name for c in problem.contenders],
    }


def row_record(row: Row, problem: Problem, peaks: Peaks, reads: float | None) -> Record:
    known = as_record(row, peaks)
    measured = known[problem.direction] or {}
    if measured and reads:
        spec = problem.spec
        held = 2 * spec.batch * spec.length * spec.key_heads * spec.head_size
        size = held * (4 if spec.dtype == "float32" else 2)
        seconds = measured["timing"]["median"]
        measured = {**measured, "of_read_rate": size / seconds / reads}
    kept = ("contender", "status", "reason", "density", "error")
    return {**{name: known[name] for name in kept}, **measured}


def kept(
    content: Record, problems: Iterable[Problem], again: Iterable[str]
) -> dict[str, Record]:
    """Records of an earlier run that are still valid, by name.

    Args:
        content: of the earlier run's file.
        problems: the present lines.
        again: names to measure again in any case.
    """
    if any(content.get(name) != value for name, value in surroundings().items()):
        return {}
    known = {p.name: identity(p) for p in problems} | dict.fromkeys(OVERHEADS, {})
    found = {}
    for record in content["lines"]:
        wanted = known.get(record["name"])
        same = wanted is not None and all(record[k] == v for k, v in wanted.items())
        if same and record["name"] not in again:
            found[record["name"]] = record
    return found


def surroundings() -> Record:
    """What all lines of one file share."""
    return {"format": FORMAT, "machine": machine_line(), "versions": versions()}


def times(record: Record) -> dict[str, float]:
    """Median seconds of the contenders that passed the check."""
    return {
        row["contender"]: row["timing"]["median"]
        for row in record.get("rows", ())
        if row["status"] == "ok"
    }


def yardstick(record: Record) -> float | None:
    """The time of the first of ``OURS`` that passed; None if none did."""
    found = times(record)
    return next((found[name] for name in OURS if name in found), None)


def milliseconds(seconds: float) -> str:
    digits = 0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 3
    return f"{1e3 * seconds:,.{digits}f}"


def _share(row: Record) -> str:
    for name, words in (
        ("of_read_rate", "memory rate"),
        ("of_tanh_bound", "tanh bound"),
        ("of_matmul_peak", "matmul"),
    ):
        if row.get(name) is not None:
            return f"{row[name]:.0%} {words}"
    return ""


def table(records: Iterable[Record]) -> Table:
    """For the terminal: each contender's time, and its ratio to attnlab's."""
    made = Table(title=caption(), title_justify="left", pad_edge=False)
    for name in ("problem", "runs on"):
        made.add_column(name, no_wrap=True)
    for name in ("ms [dim]20-80 %[/]", "over ours", "error /\nallowed", "of peak"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("remarks", overflow="fold")
    for record in records:
        if "values" in record:
            for what, value in record["values"].items():
                text = value if isinstance(value, str) else ""
                number = "" if text else f"{value:,.3g} {record['unit']}"
                made.add_row(record["name"], what, number, "", "", "", text)
            made.add_section()
            continue
        ours = yardstick(record)
        for i, row in enumerate(record["rows"]):
            first = "" if i else record["name"]
            if row["status"] != "ok":
                style = "bold red" if row["status"] == "failed" else "dim"
                word = f"[{style}]{row['status']}[/]"
                made.add_row(first, row["contender"], word, "", "", "", row["reason"])
                continue
            timing = row["timing"]
            low, high = (milliseconds(timing[n]) for n in ("low", "high"))
            spread = f"{milliseconds(timing['median'])} [dim]{low}-{high}[/]"
            over = f"{timing['median'] / ours:.2f}" if ours else ""
            error = f"{row['error']:.2f}" if row["error"] else ""
            made.add_row(first, row["contender"], spread, over, error, _share(row))
        made.add_section()
    return made


def markdown(records: Iterable[Record]) -> str:
    """A table in Markdown: milliseconds, in brackets the ratio to attnlab's."""
    lines = [r for r in records if times(r)]
    names = [n for n in OURS if any(n in times(r) for r in lines)]
    for record in lines:
        names += [n for n in times(record) if n not in names]
    rows = [["problem", *(f"`{n}`" for n in names)], ["---"] * (len(names) + 1)]
    for record in lines:
        found, ours = times(record), yardstick(record)
        cells = []
        for name in names:
            cell = milliseconds(found[name]) if name in found else "-"
            if name in found and ours and found[name] != ours:
                cell += f" ({found[name] / ours:.2f}x)"
            cells.append(cell)
        rows.append([record["name"], *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def file_name() -> str:
    """For example ``peers-amd-epyc-family-26-model-2``."""
    return "-".join(["peers", *re.findall(r"[a-z0-9]+", processor().lower())])


def chart(folder: Path, records: Iterable[Record]) -> None:
    """A chart of each contender's time over attnlab's, a row for each line."""
    from attnlab._src.bench.charts import colour, plain_log, plt, save

    lines = [r for r in records if yardstick(r) and len(times(r)) > 1]
    if not lines:
        return
    names = list(dict.fromkeys(name for r in lines for name in times(r)))
    figure, axis = plt.subplots(
        figsize=(9, 1.6 + 0.26 * len(lines)), layout="constrained"
    )
    for name in names:
        points = [
            (times(r)[name] / (yardstick(r) or 1.0), place)
            for place, r in enumerate(lines)
            if name in times(r)
        ]
        axis.plot(
            *zip(*points, strict=True), "o", label=name, color=colour(name, names)
        )
    plain_log(axis.xaxis)
    axis.axvline(1, color="0.6", linewidth=1, zorder=0)
    axis.set_xlabel("times as long as attnlab's own (native where it runs), log scale")
    axis.set_yticks(range(len(lines)), [r["name"] for r in lines])
    axis.invert_yaxis()
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(names), frameon=False)
    figure.supxlabel(caption(), fontsize=8, color="0.35")
    save(figure, folder, file_name(), kinds=("svg",))


def overhead(name: str, quick: bool) -> Record:
    """One of ``OVERHEADS``, measured, as JSON."""
    function, unit = OVERHEADS[name]
    values = function(quick)
    return {
        "name": name,
        "group": "overheads",
        "date": now(),
        "unit": unit,
        "values": values,
    }


def summary(record: Record) -> str:
    """A line for the terminal."""
    found = [f"{name} {milliseconds(s)} ms" for name, s in times(record).items()]
    found += [
        f"{name} {value:,.3g} {record['unit']}"
        for name, value in record.get("values", {}).items()
        if not isinstance(value, str)
    ]
    return f"{record['name']}: {', '.join(found) or 'none ran'}"


def arguments() -> argparse.Namespace:
    names = [*(p.name for p in PROBLEMS), *OVERHEADS]
    groups = [*dict.fromkeys(p.group for p in PROBLEMS), "overheads"]
    options = parser(__doc__ or "")
    options.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=[*groups, *names],
        metavar="NAME",
        help="lines or groups; the file keeps its other lines. Groups: "
        f"{', '.join(groups)}. Lines: {', '.join(names)}",
    )
    options.add_argument(
        "--resume", action="store_true", help="measure only what the file lacks"
    )
    options.add_argument(
        "--repeats", type=int, default=5, help="timed calls of each, at least (5)"
    )
    return options.parse_args()


def main() -> None:
    given = arguments()
    problems = {p.name: small(p) if given.quick else p for p in PROBLEMS}
    groups = {p.name: p.group for p in PROBLEMS} | dict.fromkeys(OVERHEADS, "overheads")
    wanted = [
        name
        for name, group in groups.items()
        if not given.only or {name, group} & set(given.only)
    ]
    path = given.out / f"{file_name()}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if old and given.quick and not old.get("quick"):
        raise SystemExit(f"{path} holds results of full size; give another --out")
    done: dict[str, Record] = {}
    if old and (given.only or given.resume):
        done = kept(old, problems.values(), () if given.resume else wanted)
        if not done:
            print(f"{path} has nothing to keep: its lines, versions or machine differ")
    missing = [name for name in wanted if name not in done]
    console = Console(width=None if Console().is_terminal else 140)
    least = given.repeats
    repeats = Repeats(2, 2) if given.quick else Repeats(least, 2 * least, 3.0, 0.25)

    def line(name: str, report: Callable[[str], None]) -> Record:
        if name in OVERHEADS:
            report("timing")
            return overhead(name, given.quick)
        size = 512 if given.quick else 2048
        return measure(problems[name], documents, repeats, report, size)

    def records() -> list[Record]:
        return [done[name] for name in groups if name in done]

    interrupted = False
    columns = TextColumn("{task.description}"), MofNCompleteColumn()
    progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    with progress:
        task = progress.add_task("", total=len(missing))
        try:
            documents = load_documents() if missing else []
            for name in missing:
                done[name] = line(
                    name,
                    lambda doing, name=name: progress.update(
                        task, description=f"{name}: {doing}"
                    ),
                )
                content = {
                    # The command for the whole file, without --only and --resume.
                    "command": command("peers", ["--quick"] if given.quick else []),
                    "format": FORMAT,
                    "quick": given.quick,
                    "lines": records(),
                }
                write(given.out, path.stem, content, quiet=True)
                progress.advance(task)
                console.print(summary(done[name]), highlight=False)
        except KeyboardInterrupt:
            interrupted = True
    if not done:
        console.print("interrupted: nothing was measured", style="yellow")
        raise SystemExit(130)
    console.print(table(records()))
    text = markdown(records())
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    write_atomically(path.with_suffix(".md"), text.encode())
    chart(given.out, records())
    console.print(f"written: {path}, and the same as .md and .svg", highlight=False)
    if interrupted:
        console.print("interrupted; go on with --resume", style="yellow")
        raise SystemExit(130)


if __name__ == "__main__":
    main()
