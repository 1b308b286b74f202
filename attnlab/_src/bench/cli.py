"""The command line: ``attnlab bench``, ``report``, ``show``, ``static``, ``tune``."""

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Sequence

from attnlab._src.bench import report_page, show, static_cli, tune
from attnlab._src.bench.options import Options, add_arguments, read
from attnlab._src.bench.targets import CompilerMissing

_DESCRIPTION = """\
Measures attention on this machine, on real text: every pattern, score and
implementation, and other libraries for comparison. The output and all gradients of each
are first checked against the reference; failing contenders are not timed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: without the program's name; those of the process if not given.

    Returns:
        The exit status: 0; 1 if something is missing or failed its check; 130 if
        interrupted.
    """
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("attnlab: interrupted\n")
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="attnlab", description="Attention with any score, any mask, any backend."
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    bench = commands.add_parser(
        "bench", help="measure attention on this machine", description=_DESCRIPTION
    )
    add_arguments(bench)
    reporter = commands.add_parser(
        "report",
        help="make a page of runs, or compare two",
        description=report_page.DESCRIPTION,
    )
    report_page.add_arguments(reporter)
    shower = commands.add_parser(
        "show", help="draw masks and their statistics", description=show.DESCRIPTION
    )
    show.add_arguments(shower)
    static = commands.add_parser(
        "static",
        help="estimate the cost of attention on a TPU, without having one",
        description=static_cli.DESCRIPTION,
    )
    static_cli.add_arguments(static)
    tuner = commands.add_parser(
        "tune", help="find the best block sizes on a TPU", description=tune.DESCRIPTION
    )
    tune.add_arguments(tuner)
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    needs = {
        "bench": ("jinja2", "matplotlib", "rich"),
        "report": ("jinja2", "matplotlib", "rich"),
        "show": ("jinja2", "matplotlib", "rich"),
    }
    of_this = needs.get(given.command, ("rich",))
    missing = [m for m in of_this if importlib.util.find_spec(m) is None]
    if missing:
        parser.exit(
            1,
            f"attnlab {given.command}: needs {' and '.join(missing)}: "
            'pip install "attnlab[bench]"\n',
        )
    try:
        if given.command == "report":
            return report_page.command(given)
        if given.command == "show":
            return show.command(given)
        if given.command == "static":
            return static_cli.command(given, ["attnlab", *arguments])
        if given.command == "tune":
            return tune.command(given)
        return bench_command(read(bench, given), ["attnlab", *arguments])
    except CompilerMissing as error:
        parser.exit(1, f"attnlab {given.command}: {error}\n")


def bench_command(options: Options, command: Sequence[str]) -> int:
    """Runs ``attnlab bench``: measures, prints and writes; see :func:`main`."""
    # Imported here, so that --help works without the extra "bench".
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from attnlab._src.bench.machine import Peaks, measure_peaks
    from attnlab._src.bench.runner import Row, run
    from attnlab._src.bench.selection import select
    from attnlab._src.bench.text import load_documents
    from attnlab._src.bench.timing import Repeats
    from attnlab._src.bench.wheels import TextUnavailable

    started = time.perf_counter()
    messages = Console(stderr=True)
    nothing = "interrupted: nothing was measured"
    try:
        documents = load_documents(options.text)
    except TextUnavailable as error:
        messages.print(f"attnlab bench: {error}", style="red", highlight=False)
        return 1
    except KeyboardInterrupt:
        messages.print(nothing, style="yellow")
        return 130
    repeats = Repeats(seconds=1.5) if options.quick else Repeats()
    if options.repeats:
        repeats = Repeats(options.repeats, options.repeats)
    chosen = options.full or options.patterns or options.scores
    budget = None if chosen else 31.0 if options.quick else 150.0
    groups = select(options)
    rows: list[Row] = []
    peaks: Peaks | None = None
    complete = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeElapsedColumn(), console=messages, transient=True)
    with progress:
        task = progress.add_task("peaks of this machine", total=len(groups))
        with contextlib.suppress(KeyboardInterrupt):
            size = 1024 if options.quick else 2048
            peaks = measure_peaks(options.dtypes, size)
            if budget is not None:
                budget -= time.perf_counter() - started
            for measured in run(
                groups,
                documents,
                repeats,
                budget=budget,
                report=lambda doing: progress.update(task, description=doing),
            ):
                rows += measured
                progress.advance(task)
            if not options.quick:
                progress.update(task, description="peaks of this machine, again")
                peaks = peaks.higher(measure_peaks(options.dtypes, size))
            complete = True
    if peaks is None or not rows:
        messages.print(nothing, style="yellow")
        return 130
    if not complete:
        messages.print("interrupted: keeping what was measured", style="yellow")
    _present(rows, peaks, options, command, complete)
    if not complete:
        return 130
    return 1 if any(row.status == "failed" for row in rows) else 0


def _present(
    rows: Sequence, peaks, options: Options, command: Sequence[str], complete: bool
) -> None:
    from rich.console import Console

    from attnlab._src.bench.charts import draw
    from attnlab._src.bench.report import document, notes, table, write_json
    from attnlab._src.bench.runs import read_run

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    content = document(rows, peaks, command, complete=complete)
    path = options.out / "bench.json"
    write_json(path, content)
    console.print(table(rows, peaks, content["machine"]))
    for line in notes(rows, peaks):
        console.print(line, style="dim", highlight=False, markup=False)
    known = content["versions"]
    caption = f"{content['machine']}; jax {known.get('jax')}; {content['date']}"
    page = report_page.page_of_runs([read_run(path)])
    written = [
        path,
        page.save(options.out / "report.html"),
        *draw(rows, options.out, caption),
    ]
    console.print(
        f"written: {', '.join(str(p) for p in written)}", highlight=False, markup=False
    )
