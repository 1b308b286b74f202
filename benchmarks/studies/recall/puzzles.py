"""Long-range puzzles that need no language: recall, and nested lists."""

from collections.abc import Sequence
from random import Random

import numpy as np

from benchmarks.studies.machinery.data.stretches import Stretch

#: What follows a question, and whom it is asked of: tokens 0 to 15 are fillers.
FILLERS, KEYS, VALUES = 16, 16, 16


class Recall:
    """Somewhere a key and its value; far behind, the key again: which value?

    A row has some questions for each pair, each at a distance of its own; keys differ,
    so there is one answer. The value stands right behind its key; a question for a key
    is another sign than the key itself.

    Attributes:
        vocabulary_size: V.
    """

    vocabulary_size = FILLERS + 2 * KEYS + VALUES

    def __init__(
        self,
        *,
        length: int,
        rows: int,
        distances: tuple[int, int],
        pairs: int = 8,
        questions: int = 1,
        seed: int = 0,
    ):
        """A task.

        Args:
            length: T.
            rows: B, a multiple of the number of devices.
            distances: the least and the greatest number of positions from a value to
                the question for it; each question draws one, its logarithm uniform.
            pairs: in a row, at most ``KEYS``.
            questions: for each pair, at most: those that find no place are left out.
            seed: of everything drawn.
        """
        low, high = distances
        if not 1 <= low <= high <= length - 2:
            raise ValueError(
                f"distances: expected 1 <= least <= most <= {length - 2}, got "
                f"{distances}"
            )
        self._length, self._rows = length, rows
        self._pairs, self._questions = pairs, questions
        self._distances, self._seed = distances, seed

    def batch_at(self, step: int) -> Stretch:
        """New data at each step: a pure function of the seed and the step."""
        random = np.random.default_rng((self._seed, 0, step))
        return self._make(random, self._distances)

    def apart(
        self, distances: tuple[int, int], batches: int, *, purpose: str
    ) -> list[Stretch]:
        """Batches of some distances alone, drawn apart from those of every step.

        Args:
            distances: the least and the greatest.
            batches: how many.
            purpose: another one, other batches.
        """
        random = np.random.default_rng((self._seed, 1, *purpose.encode(), *distances))
        return [self._make(random, distances) for _ in range(batches)]

    def _make(self, random: np.random.Generator, distances: tuple[int, int]) -> Stretch:
        shape = (self._rows, self._length)
        tokens = random.integers(0, FILLERS, shape, np.int32)
        labels, counted = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row in range(self._rows):
            self._fill(random, distances, tokens[row], labels[row], counted[row])
        return Stretch(tokens, labels, counted)

    def _fill(
        self,
        random: np.random.Generator,
        distances: tuple[int, int],
        tokens: np.ndarray,
        labels: np.ndarray,
        counted: np.ndarray,
    ) -> None:
        free = np.ones(self._length, bool)
        keys = random.permutation(KEYS)[: self._pairs]
        values = random.integers(0, VALUES, self._pairs)
        low, high = np.log(distances)
        for key, value in zip(keys, values, strict=True):
            # The first question finds the pair a place, others are for it where it is.
            places = free[:-1] & free[1:]
            for _ in range(self._questions):
                distance = round(float(np.exp(random.uniform(low, high))))
                (starts,) = np.nonzero(places[:-distance] & free[distance + 1 :])
                # Where a long distance finds no place any more, one question less.
                if not starts.size:
                    continue
                start = int(random.choice(starts))
                ask = start + 1 + distance
                free[[start, start + 1, ask]] = False
                places = np.arange(len(places)) == start
                tokens[start] = FILLERS + key
                tokens[start + 1] = FILLERS + 2 * KEYS + value
                tokens[ask] = FILLERS + KEYS + key
                labels[ask], counted[ask] = tokens[start + 1], True


def _sum_modulo(values: Sequence[int]) -> int:
    return sum(values) % 10


def _median(values: Sequence[int]) -> int:
    return int(np.median(values))


#: Tokens 0 to 9 are the digits; then what opens a list, what closes it, and padding.
OPERATORS = {10: min, 11: max, 12: _median, 13: _sum_modulo}
CLOSE, EMPTY = 14, 15
DEPTH, ARGUMENTS, LIST_SHARE = 10, 10, 0.25


def draw_list(random: Random, longest: int) -> list[int] | None:
    """The tokens of a nested list; None where they are more than ``longest``.

    Each argument is a list with probability ``LIST_SHARE``, else a digit, as all are at
    ``DEPTH``; a list has 2 to ``ARGUMENTS`` of them.

    References:
        Nangia and Bowman, "ListOps", 2018, and its generator (5 arguments, depth 20);
        Tay et al., "Long Range Arena", 2021, section 2.2.1 (10 and 10, as here).
    """
    tokens: list[int] = []

    def build(depth: int) -> bool:
        """Whether there was room."""
        tokens.append(random.choice(tuple(OPERATORS)))
        for _ in range(random.randint(2, ARGUMENTS)):
            if len(tokens) >= longest:
                return False
            if depth + 1 < DEPTH and random.random() < LIST_SHARE:
                if not build(depth + 1):
                    return False
            else:
                tokens.append(random.randrange(10))
        tokens.append(CLOSE)
        return len(tokens) <= longest

    return tokens if build(1) else None


def value(tokens: Sequence[int]) -> int:
    """What a list comes to.

    Example:
        >>> value([11, 2, 13, 7, 4, 14, 0, 14])  # [MAX 2 [SM 7 4] 0]
        2
    """
    waiting: list[tuple[int, list[int]]] = [(EMPTY, [])]
    for token in tokens:
        if token in OPERATORS:
            waiting.append((token, []))
        elif token == CLOSE:
            operator, arguments = waiting.pop()
            waiting[-1][1].append(OPERATORS[operator](arguments))
        else:
            waiting[-1][1].append(token)
    ((_, (result,)),) = waiting
    return result


class ListOps:
    """What does a nested list come to? Asked at the last position, its closing sign.

    Attributes:
        vocabulary_size: V.
    """

    vocabulary_size = EMPTY + 1

    def __init__(
        self, *, length: int, rows: int, shortest: int | None = None, seed: int = 0
    ):
        """A task.

        Args:
            length: T; shorter lists have padding before them.
            rows: B, a multiple of the number of devices.
            shortest: tokens of a list; a quarter of ``length`` if not given.
            seed: of everything drawn.
        """
        self._length, self._rows, self._seed = length, rows, seed
        self._shortest = length // 4 if shortest is None else shortest

    def batch_at(self, step: int) -> Stretch:
        """New data at each step: a pure function of the seed and the step."""
        return self._make(Random(f"{self._seed} train {step}"))

    def apart(self, batches: int, *, purpose: str) -> list[Stretch]:
        """Batches drawn apart from those of every step, others for each purpose."""
        random = Random(f"{self._seed} {purpose}")
        return [self._make(random) for _ in range(batches)]

    def _make(self, random: Random) -> Stretch:
        shape = (self._rows, self._length)
        tokens = np.full(shape, EMPTY, np.int32)
        labels, counted = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row in range(self._rows):
            drawn = draw_list(random, self._length)
            while drawn is None or len(drawn) < self._shortest:
                drawn = draw_list(random, self._length)
            tokens[row, -len(drawn) :] = drawn
            labels[row, -1], counted[row, -1] = value(drawn), True
        return Stretch(tokens, labels, counted)
