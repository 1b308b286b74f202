"""Parallel text: sentence pairs from a TSV file, or verses of two translations."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.machinery.errors import StudyError

#: Characters of a side; a longer line is no sentence.
LONGEST = 4000
#: Share of the lines of a file that must be pairs.
LEAST_GOOD = 0.9
#: Neighbours in a file tend to be of one text, and stay on one side of a split.
LINES_A_GROUP = 25


class Pair(NamedTuple):
    """A sentence and its translation.

    Attributes:
        source: in one language.
        target: in the other.
        group: what is held out together: a chapter.
    """

    source: str
    target: str
    group: str


def fingerprint(pairs: Iterable[Pair]) -> str:
    """The same for the same text in the same order: for a run's config."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\x1f".join(pair).encode() + b"\x1e")
    return digest.hexdigest()[:16]


def word_ratio(pair: Pair) -> float:
    """Words of the target for each of the source."""
    return len(pair.target.split()) / max(len(pair.source.split()), 1)


def within_ratio(
    pairs: Sequence[Pair], low: float = 0.4, high: float = 2.5
) -> list[Pair]:
    """Pairs of which neither side is much longer than the other, in words."""
    return [pair for pair in pairs if low <= word_ratio(pair) <= high]


def _problem(line: bytes) -> str | tuple[str, str]:
    """What is wrong with a line, or its two sides."""
    try:
        text = line.decode("utf-8").strip("\r")
    except UnicodeDecodeError:
        return "not UTF-8"
    if not text.strip():
        return "empty"
    columns = [column.strip() for column in text.split("\t")]
    if len(columns) != 2:
        return "one column" if len(columns) == 1 else "more than two columns"
    if not all(columns):
        return "an empty column"
    if max(map(len, columns)) > LONGEST:
        return f"more than {LONGEST:,} characters"
    return columns[0], columns[1]


class Table(NamedTuple):
    """What a file holds.

    Attributes:
        pairs: in its order.
        problems: by what is wrong, the numbers of the lines, from 1.
    """

    pairs: list[Pair]
    problems: dict[str, list[int]]

    def report(self) -> str:
        """How many lines are left out, and why; empty if none."""
        parts = []
        for what, lines in self.problems.items():
            shown = ", ".join(map(str, lines[:5])) + (", ..." if lines[5:] else "")
            word = "line" if len(lines) == 1 else "lines"
            parts.append(f"{len(lines):,} {what} ({word} {shown})")
        return "; ".join(parts)


def read_table(path: Path) -> Table:
    """Reads pairs, one a line, two columns with a tab between them.

    Lines that are no pair are left out and counted.

    Raises:
        StudyError: if there is no such file, or less than :data:`LEAST_GOOD` of its
            lines are pairs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StudyError(
            f"--pairs: expected a file of two columns, got {path} ({error.strerror})"
        ) from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    table = Table([], {})
    for number, line in enumerate(lines, 1):
        found = _problem(line)
        if isinstance(found, str):
            table.problems.setdefault(found, []).append(number)
        else:
            group = str((number - 1) // LINES_A_GROUP)
            table.pairs.append(Pair(*found, group))
    if not lines or len(table.pairs) < LEAST_GOOD * len(lines):
        raise StudyError(
            f"--pairs: expected lines of two columns with a tab between them, and at "
            f"least {LEAST_GOOD:.0%} of them good, got {len(table.pairs):,} of "
            f"{len(lines):,} in {path}: {table.report() or 'it is empty'}"
        )
    return table
