"""Long documents: the State of the Union addresses, split, as streams of subwords."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnlab._src.bench.text import load_texts, paragraphs
from benchmarks.studies.machinery.data.batches import END, START
from benchmarks.studies.machinery.data.vocabulary import Vocabulary, learn
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import Json

#: A training document is left out if more than a share COPIED of its sequences of GRAM
#: words is also in a document that is held out, for example in another version of it.
GRAM, COPIED = 12, 0.01


class Documents(NamedTuple):
    """Documents for training, development and test, each a list of paragraphs.

    Attributes:
        train: documents to train on.
        dev: documents for choices, such as of the learning rate.
        test: documents for the test.
        left_out: number of documents that were dropped from ``train``, because parts
            of them are held out.
    """

    train: list[list[str]]
    dev: list[list[str]]
    test: list[list[str]]
    left_out: int

    def parts(self) -> dict[str, list[list[str]]]:
        """The three parts by name."""
        return {"test": self.test, "dev": self.dev, "train": self.train}


class Addresses(NamedTuple):
    """Documents for training, development and test, each part a stream of tokens.

    A document is START and its paragraphs, each followed by END.

    Attributes:
        train: tokens to train on, ``[*]`` int32.
        dev: tokens for choices, such as of the learning rate.
        test: tokens for the test.
        vocabulary: learnt from the training documents.
        counts: numbers of documents and tokens, for the page.
        fingerprint: a hash of text, split and vocabulary, for a run's config.
    """

    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray
    vocabulary: Vocabulary
    counts: Json
    fingerprint: str


def read_documents(
    folder: Path | None = None,
    *,
    test: int = 16,
    dev: int = 10,
    limit: int | None = None,
    seed: int = 0,
) -> Documents:
    """Reads documents, and splits them.

    Args:
        folder: folder of ``.txt`` files; None: the addresses, 1790-2026.
        test: number of documents held out for the test.
        dev: number of documents held out for choices.
        limit: number of documents, drawn at random; None: all.
        seed: seed of the draw.

    Raises:
        StudyError: if there are not enough documents.
        TextUnavailable: if the text cannot be read or downloaded.
    """
    texts = load_texts(folder)
    if len(texts) <= test + dev:
        raise StudyError(
            f"expected more than {test + dev} documents, of which {test + dev} are "
            f"held out, got {len(texts)}"
        )
    names = sorted(texts)
    # A random order: language changes over time, and each part needs some of each time.
    order = np.random.default_rng(seed).permutation(len(names))[:limit]
    drawn = [[_plain(p) for p in paragraphs(texts[names[i]])] for i in order]
    tested, chosen, rest = drawn[:test], drawn[test : test + dev], drawn[test + dev :]
    held_out = {g for document in (*tested, *chosen) for g in _grams(document)}
    train = [d for d in rest if _share(d, held_out) <= COPIED]
    return Documents(train, chosen, tested, len(rest) - len(train))


def load_addresses(
    cache: Path,
    *,
    folder: Path | None = None,
    pieces: int = 2000,
    **options: Any,
) -> Addresses:
    """Reads, splits by whole documents, and learns a vocabulary.

    Args:
        cache: folder for the vocabulary.
        folder: see :func:`read_documents`.
        pieces: see ``learn``.
        **options: further options of :func:`read_documents`.

    Raises:
        StudyError: if there are not enough documents.
        TextUnavailable: if the text cannot be read or downloaded.
    """
    read = read_documents(folder, **options)
    flat = [p for document in read.train for p in document]
    vocabulary = learn(flat, pieces=pieces, cache=cache)
    streams = {part: _stream(d, vocabulary) for part, d in read.parts().items()}
    digest = hashlib.sha256()
    for part, stream in streams.items():
        digest.update(part.encode() + stream.tobytes())
    counts: Json = {
        "documents": {part: len(found) for part, found in read.parts().items()},
        "left_out": read.left_out,
        "tokens": {part: len(stream) for part, stream in streams.items()},
        "vocabulary": vocabulary.size,
    }
    mark = f"{digest.hexdigest()[:16]}-{vocabulary.fingerprint}"
    return Addresses(**streams, vocabulary=vocabulary, counts=counts, fingerprint=mark)


def _grams(document: list[str]) -> set[int]:
    words = " ".join(document).casefold().split()
    runs = (words[i:] for i in range(GRAM))
    return {hash(gram) for gram in zip(*runs, strict=False)}


def _share(document: list[str], known: set[int]) -> float:
    grams = _grams(document)
    return len(grams & known) / max(len(grams), 1)


def _plain(paragraph: bytes) -> str:
    return " ".join(paragraph.decode(errors="replace").split())


def _stream(documents: list[list[str]], vocabulary: Vocabulary) -> np.ndarray:
    tokens: list[int] = []
    for document in documents:
        tokens.append(START)
        for paragraph in document:
            tokens += [*vocabulary.encode(paragraph), END]
    return np.asarray(tokens, np.int32)
