"""Word alignment by IBM model 1, which only counts which words occur together."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from benchmarks.studies.machinery.data.pairs import Pair

#: An extra source word, for target words that translate no source word.
NULL = ""


class Word(NamedTuple):
    """A word without case or punctuation.

    Attributes:
        text: the word.
        place: index into ``text.split()``; "qu'il" is two words with the same place.
    """

    text: str
    place: int


def words_of(text: str) -> list[Word]:
    """The words of a sentence."""
    return [
        Word(word, place)
        for place, part in enumerate(text.split())
        for word in re.findall(r"\w+", part.casefold())
    ]


class Ibm1:
    """Translation probabilities of target words given a source word.

    References:
        Brown et al., "The Mathematics of Statistical Machine Translation", 1993,
        section 4.2.
    """

    def __init__(self, pairs: Sequence[Pair], iterations: int = 5):
        """Learns by expectation maximisation, from equal probabilities.

        Args:
            pairs: sentences to learn from.
            iterations: of expectation maximisation.
        """
        sides = [
            [[w.text for w in words_of(text)] for text in texts]
            for texts in zip(*((p.source, p.target) for p in pairs), strict=True)
        ]
        self._source, self._target = (
            {word: i for i, word in enumerate(sorted({NULL, *chain(*side)}))}
            for side in sides
        )
        # For each co-occurrence: the code of its word pair, and its target occurrence.
        codes, places, count = [], [], 0
        for source, target in zip(*sides, strict=True):
            s = np.array([self._source[w] for w in (*source, NULL)], np.int64)
            t = np.array([self._target[w] for w in target], np.int64)
            codes.append((s[:, None] * len(self._target) + t).ravel())
            places.append(np.tile(np.arange(count, count + len(t)), len(s)))
            count += len(t)
        self._codes, which = np.unique(np.concatenate(codes), return_inverse=True)
        place = np.concatenate(places)
        given = self._codes // len(self._target)
        table = np.ones(len(self._codes))
        for _ in range(iterations):
            joint = table[which]
            share = joint / np.bincount(place, joint)[place]
            counts = np.bincount(which, share, len(table))
            table = counts / np.bincount(given, counts)[given]
        self._table = table

    def probability(self, target: str, source: str) -> float:
        """Of a target word given a source word; 0 if they never occur together."""
        if source not in self._source or target not in self._target:
            return 0.0
        code = self._source[source] * len(self._target) + self._target[target]
        at = int(np.searchsorted(self._codes, code))
        known = at < len(self._codes) and self._codes[at] == code
        return float(self._table[at]) if known else 0.0

    def place_of(self, target: str, sentence: str) -> int:
        """The place of the source word that a target word most probably translates.

        Args:
            target: the target word.
            sentence: the source sentence.

        Returns:
            An index into ``sentence.split()``.
        """
        words = words_of(sentence)
        return max(words, key=lambda word: self.probability(target, word.text)).place
