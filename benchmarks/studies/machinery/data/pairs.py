"""Parallel text: sentence pairs from a TSV file, or verses of two translations."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.machinery.errors import StudyError

#: The most characters of a sentence; pairs with longer ones are left out.
LONGEST = 4000
#: The least share of the lines of a file that must be pairs.
LEAST_GOOD = 0.9
#: Successive lines tend to be of one text, so groups of them are not split.
LINES_A_GROUP = 25


class Pair(NamedTuple):
    """A sentence and its translation.

    Attributes:
        source: the sentence.
        target: its translation.
        group: pairs of one group, such as a chapter, are held out together.
    """

    source: str
    target: str
    group: str


def fingerprint(pairs: Iterable[Pair]) -> str:
    """A hash of the text in its order, for a run's config."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\x1f".join(pair).encode() + b"\x1e")
    return digest.hexdigest()[:16]


def word_ratio(pair: Pair) -> float:
    """Number of words of the target over that of the source."""
    return len(pair.target.split()) / max(len(pair.source.split()), 1)


def within_ratio(
    pairs: Sequence[Pair], low: float = 0.4, high: float = 2.5
) -> list[Pair]:
    """The pairs whose :func:`word_ratio` is from ``low`` to ``high``."""
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
    """The content of a file.

    Attributes:
        pairs: the pairs, in the order of the file.
        problems: the numbers of the bad lines, from 1, by problem.
    """

    pairs: list[Pair]
    problems: dict[str, list[int]]

    def report(self) -> str:
        """How many lines are left out, and why; empty if all are good."""
        parts = []
        for what, lines in self.problems.items():
            shown = ", ".join(map(str, lines[:5])) + (", ..." if lines[5:] else "")
            word = "line" if len(lines) == 1 else "lines"
            parts.append(f"{len(lines):,} {what} ({word} {shown})")
        return "; ".join(parts)


def read_table(path: Path) -> Table:
    """Reads pairs from lines of two columns, separated by a tab.

    Lines that are not pairs are left out, and listed in ``problems``.

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
