"""Parallel text, split, with a vocabulary learnt from its training part."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.studies.machinery.data.batches import Example
from benchmarks.studies.machinery.data.pairs import (
    Pair,
    fingerprint,
    read_table,
    within_ratio,
)
from benchmarks.studies.machinery.data.splits import Split, split
from benchmarks.studies.machinery.data.verses import load_verses
from benchmarks.studies.machinery.data.vocabulary import Vocabulary, learn
from benchmarks.studies.machinery.record import Json


class Corpus(NamedTuple):
    """Parallel text.

    Attributes:
        split: its pairs, for training, development and test.
        vocabulary: of both languages, learnt from ``split.train`` alone.
        counts: numbers of pairs, for the page.
        fingerprint: a hash of text, split and vocabulary, for a run's config.
    """

    split: Split
    vocabulary: Vocabulary
    counts: Json
    fingerprint: str

    def encode(self, pairs: Iterable[Pair]) -> list[Example]:
        """Pairs as tokens."""
        encode = self.vocabulary.encode
        return [(encode(p.source), encode(p.target)) for p in pairs]


def read_pairs(
    path: Path | None,
    *,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[Split, Json]:
    """Reads, filters and splits.

    Args:
        path: path of a table of pairs; None: French and English Bible verses.
        limit: number of pairs, from the beginning; None: all.
        say: called with a message about the lines that were left out.

    Returns:
        The pairs, and how many were read and left out.
    """
    if path is None:
        found = load_verses()
        pairs = within_ratio(found)
        counts: Json = {"read": len(found), "out_of_ratio": len(found) - len(pairs)}
    else:
        table = read_table(path)
        pairs = table.pairs
        problems = {what: len(lines) for what, lines in table.problems.items()}
        counts = {"read": len(pairs), "left_out": problems}
        if table.problems and say is not None:
            say(f"{path}: left out: {table.report()}")
    return split(pairs[:limit]), counts


def load_corpus(
    path: Path | None,
    cache: Path,
    *,
    pieces: int = 4000,
    kind: Literal["bpe", "unigram"] = "bpe",
    **options: Any,
) -> Corpus:
    """Reads, filters, splits, and learns a vocabulary.

    Args:
        path: see :func:`read_pairs`.
        cache: folder for the vocabulary.
        pieces: see ``learn``.
        kind: see ``learn``.
        **options: further options of :func:`read_pairs`.
    """
    parts, counts = read_pairs(path, **options)
    texts = [side for pair in parts.train for side in (pair.source, pair.target)]
    vocabulary = learn(texts, pieces=pieces, kind=kind, cache=cache)
    counts |= {
        "train": len(parts.train),
        "dev": len(parts.dev),
        "test": len(parts.test),
        "duplicates_dropped": parts.duplicates,
        "vocabulary": vocabulary.size,
    }
    everything = [*parts.train, *parts.dev, *parts.test]
    mark = f"{fingerprint(everything)}-{vocabulary.fingerprint}"
    return Corpus(parts, vocabulary, counts, mark)
