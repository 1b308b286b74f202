"""Long documents: the State of the Union addresses as one stream of subwords."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from attnlab._src.bench.text import load_texts, paragraphs
from benchmarks.studies.machinery.data.batches import END, START
from benchmarks.studies.machinery.data.vocabulary import Vocabulary, learn
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import Json

#: A training document is left out if more than a share COPIED of its sequences of GRAM
#: words is also in a document that is held out, for example in another version of it.
GRAM, COPIED = 12, 0.01


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


def load_addresses(
    cache: Path,
    *,
    folder: Path | None = None,
    pieces: int = 2000,
    test: int = 16,
    dev: int = 10,
    limit: int | None = None,
    seed: int = 0,
) -> Addresses:
    """Reads, splits by whole documents, and learns a vocabulary.

    Args:
        cache: folder for the vocabulary.
        folder: folder of ``.txt`` files; None: the addresses, 1790-2026.
        pieces: see ``learn``.
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
    order = np.random.default_rng(seed).permutation(len(names))[:limit]
    drawn = [paragraphs(texts[names[i]]) for i in order]
    # A random order: language changes over time, and each part needs some of each time.
    parts = {"test": drawn[:test], "dev": drawn[test : test + dev]}
    parts["train"] = drawn[test + dev :]
    read = {
        part: [[_plain(p) for p in document] for document in documents]
        for part, documents in parts.items()
    }
    held_out = {g for part in ("test", "dev") for d in read[part] for g in _grams(d)}
    alike = [d for d in read["train"] if _share(d, held_out) > COPIED]
    read["train"] = [d for d in read["train"] if d not in alike]
    flat = [p for document in read["train"] for p in document]
    vocabulary = learn(flat, pieces=pieces, cache=cache)
    streams = {part: _stream(found, vocabulary) for part, found in read.items()}
    digest = hashlib.sha256()
    for part, stream in streams.items():
        digest.update(part.encode() + stream.tobytes())
    counts: Json = {
        "documents": {part: len(found) for part, found in read.items()},
        "left_out": len(alike),
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
