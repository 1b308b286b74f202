"""Trains models to test a claim about attention, and writes a page with the answer."""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from rich.console import Console

    from attnlab._src.bench.machine import cores
    from attnlab._src.bench.options import text_folder
    from attnlab._src.bench.wheels import TextUnavailable
    from benchmarks.common import ROOT, parser
    from benchmarks.studies.machinery.check import TOLERANCE, committed, differences
    from benchmarks.studies.machinery.context import Context
    from benchmarks.studies.machinery.errors import Interrupted, StudyError
    from benchmarks.studies.machinery.page import write_page
    from benchmarks.studies.machinery.parallel import ask_for_devices, make_mesh
    from benchmarks.studies.machinery.training import resuming
    from benchmarks.studies.registry import STUDIES
except KeyboardInterrupt:
    sys.stderr.write("interrupted\n")
    sys.exit(130)
except ModuleNotFoundError as missing:
    sys.exit(
        f"benchmarks.studies: needs {missing.name}, which comes with "
        'pip install -e ".[studies]"'
    )

RESULTS = ROOT / "benchmarks" / "studies" / "results"
#: Committed results of the quick forms; a run of them writes into ``quick`` instead.
EXPECTED = RESULTS / "expected"


def whole(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, got {text!r}"
        )
    return int(text)


def arguments(given: Sequence[str]) -> argparse.Namespace:
    options = parser(__doc__ or "", RESULTS)
    options.prog = "python -m benchmarks.studies"
    options.add_argument(
        "study",
        choices=list(STUDIES),
        metavar="NAME",
        help=f"the study: {', '.join(STUDIES)}",
    )
    options.add_argument(
        "--resume",
        action="store_true",
        help="continue interrupted runs, and do not repeat finished ones",
    )
    options.add_argument(
        "--check",
        action="store_true",
        help="run the quick form, and compare its numbers with the committed ones",
    )
    options.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="RUN",
        help="train only these runs or groups; other finished runs are read",
    )
    options.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE.tsv",
        help="your own sentence pairs: source, tab, target (default: French verses "
        "and their English translations, downloaded once)",
    )
    options.add_argument(
        "--text",
        type=text_folder,
        metavar="FOLDER",
        help="your own .txt files, a long document each (default: the State of the "
        "Union addresses, downloaded once)",
    )
    options.add_argument(
        "--devices",
        type=whole,
        default=min(cores(), 8),
        metavar="N",
        help="devices that the CPU is divided into; each gets its share of every batch "
        "(default: one for each core, up to 8)",
    )
    read = options.parse_args(given)
    if read.check and (read.only or read.pairs or read.text):
        options.error(
            "argument --check: expected no --only, --pairs or --text: the committed "
            "numbers are those of all runs, on the downloaded texts"
        )
    return read


def check(given: argparse.Namespace, console: Console) -> None:
    """Runs the quick form in a temporary folder, and compares its numbers.

    Raises:
        StudyError: if a number differs from the committed one.
    """
    name = f"{given.study}.json"
    old = committed(EXPECTED / name)
    with tempfile.TemporaryDirectory() as folder:
        changed = {"quick": True, "resume": False, "devices": old["devices"]}
        changed["out"] = Path(folder)
        run(argparse.Namespace(**{**vars(given), **changed}), console)
        new = committed(Path(folder) / "quick" / name)
    found = differences(old, new)
    if found:
        raise StudyError(
            f"--check: differs from the committed results: {'; '.join(found)}"
        )
    console.print(
        f"{given.study}: equal to the committed results within {TOLERANCE:.1%}"
    )


def run(given: argparse.Namespace, console: Console) -> None:
    ask_for_devices(given.devices)
    context = Context(
        name=given.study,
        # Quick results never overwrite full ones.
        out=given.out / "quick" if given.quick else given.out,
        mesh=make_mesh(given.devices),
        console=console,
        quick=given.quick,
        resume=given.resume,
        only=given.only,
        pairs=given.pairs,
        text=given.text,
    )
    page = STUDIES[given.study](context)
    context.expect_only()
    if page is None:
        context.say("no page yet: runs that --only left out are missing")
        return
    path = write_page(
        context.out,
        given.study,
        page,
        quick=given.quick,
        devices=given.devices,
        runs=context.best,
    )
    context.say(f"written: {path}, {path.with_suffix('.json').name}")


def main(given: Sequence[str]) -> int:
    """Returns the exit status."""
    options = arguments(given)
    console, messages = Console(), Console(stderr=True)
    nothing_kept = "interrupted: a check keeps no results"

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        messages.print(f"warning: {message}", style="yellow", soft_wrap=True)

    warnings.showwarning = show
    try:
        (check if options.check else run)(options, console)
    except Interrupted as error:
        said = nothing_kept if options.check else error
        messages.print(str(said), style="yellow", soft_wrap=True)
        return 128 + error.signal
    except KeyboardInterrupt:
        said = f"interrupted; continue with: {resuming()}"
        messages.print(nothing_kept if options.check else said, style="yellow")
        return 130
    except (StudyError, TextUnavailable, OSError) as error:
        messages.print(f"{options.study}: {error}", style="red", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
