"""Inserts each fault into a copy of the repository, and runs the tests that must fail.

    python -m tests.mutants [--list] [--only NAME ...]

A mutant is killed if one of its tests fails. It counts as an error, not as killed, if
its old text does not occur exactly once, if one of its tests does not pass without the
fault, or if pytest gives no result. The exit status is 0 if all are killed. An
interrupted run prints the results so far.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tests.mutants import MUTANTS, Mutant
from tests.mutants.mutant import ROOT

_COPIED = ("attnlab", "tests", "benchmarks", "pyproject.toml", "README.md")
#: Time limit of a mutant's tests, in seconds.
_LIMIT = 900


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list the mutants")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these")
    asked = parser.parse_args(argv)
    names = [m.name for m in MUTANTS]
    if unknown := set(asked.only or ()) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; see --list")
    chosen = [m for m in MUTANTS if not asked.only or m.name in asked.only]
    if asked.list:
        for m in chosen:
            _say(f"{m.name:36} {m.file}\n    {m.fault}")
        return 0
    found: dict[str, str] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="attnlab-mutants-") as folder:
            copy = _copied(Path(folder) / "repository")
            for m, outcome, seconds in _outcomes(chosen, copy):
                found[m.name] = outcome
                place = f"[{len(found):2}/{len(chosen)}]"
                _say(f"{place} {m.name:36} {outcome} ({seconds:.0f} s)")
    except KeyboardInterrupt:
        _say(f"interrupted after {len(found)} of {len(chosen)}")
    return _summed_up(chosen, found)


def _summed_up(chosen: Sequence[Mutant], found: dict[str, str]) -> int:
    """Prints a table, and returns the exit status."""
    done = [m for m in chosen if m.name in found]
    _say("")
    for m in done:
        _say(f"{m.name:36} {m.file:42} {found[m.name]}")
        if found[m.name] != "killed":
            _say(f"    {m.fault}")
    killed, survived = (
        sum(outcome == kind for outcome in found.values())
        for kind in ("killed", "SURVIVED")
    )
    errors = len(found) - killed - survived
    _say(
        f"{killed} killed, {survived} survived" + (f", {errors} errors" * bool(errors))
    )
    if len(done) < len(chosen):
        return 130
    return int(killed < len(chosen))


def _outcomes(
    chosen: Sequence[Mutant], copy: Path
) -> Iterator[tuple[Mutant, str, float]]:
    """Each mutant, its outcome, and the seconds that it took."""
    tests = sorted({test for m in chosen for test in m.tests})
    _say(f"{len(chosen)} mutants; first the {len(tests)} tests without them ...")
    passing = _passing(tests, copy)
    for m in chosen:
        start = time.monotonic()
        yield m, _outcome(m, passing, copy), time.monotonic() - start


def _outcome(m: Mutant, passing: Collection[str], copy: Path) -> str:
    if failing := [test for test in m.tests if test not in passing]:
        return f"ERROR: does not pass without it: {', '.join(failing)}"
    file = copy / "attnlab/_src" / m.file
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(m.planted(text), encoding="utf-8")
        status = _pytest(m.tests, copy, "-x", limit=_LIMIT).returncode
    except (ValueError, subprocess.TimeoutExpired) as error:
        return f"ERROR: {error}"
    finally:
        file.write_text(text, encoding="utf-8")
    known = {0: "SURVIVED", 1: "killed"}
    return known.get(status, f"ERROR: pytest ended with status {status}")


def _passing(tests: Sequence[str], copy: Path) -> set[str]:
    """The tests all of whose cases pass; skipped tests do not."""
    report = copy / "report.xml"
    done = _pytest(tests, copy, f"--junitxml={report}")
    said = done.stdout + done.stderr
    if missing := [t for t in tests if f"not found: {copy / t}\n" in said]:
        return _passing([t for t in tests if t not in missing], copy)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with status {done.returncode}:\n{said}")
    cases: dict[str, bool] = {}
    for case in ET.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/")
        cases[f"{file}.py::{case.get('name')}"] = len(case) == 0

    def passes(test: str) -> bool:
        own = [ok for name, ok in cases.items() if name == test or f"{test}[" in name]
        return bool(own) and all(own)

    return {test for test in tests if passes(test)}


def _pytest(
    tests: Sequence[str], copy: Path, *options: str, limit: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs tests on the copy, in one process."""
    run = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    # No bytecode: a stale file may have the time and size of a changed source.
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*run, *options, *tests],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=limit,
    )


def _copied(to: Path) -> Path:
    """Copies what the tests need; the checkout itself is never changed."""
    to.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", ".*")
    for name in _COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=skipped)
        else:
            shutil.copy(ROOT / name, to / name)
    ask = [sys.executable, "-c", "import attnlab; print(attnlab.__file__)"]
    where = subprocess.run(ask, cwd=to, capture_output=True, text=True, check=True)
    if not Path(where.stdout.strip()).is_relative_to(to):
        raise SystemExit(f"attnlab is imported from {where.stdout.strip()}, not {to}")
    return to


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
