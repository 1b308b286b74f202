"""Long-range puzzles that need no language: recall, and nested lists."""

from collections.abc import Sequence
from random import Random

import numpy as np

from benchmarks.studies.machinery.data.stretches import Stretch

#: Numbers of filler tokens, keys and values. Tokens 0 to 15 are fillers; then come
#: keys, questions for keys, and values.
FILLERS, KEYS, VALUES = 16, 16, 16


class Recall:
    """Recall of the value of a key that stands at some distance before the question.

    A row is fillers, pairs of a key and the value after it, and questions. The question
    for a key is another token than the key. Keys of a row differ, so each question has
    one answer.

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
                the question for it; distances are drawn log-uniformly.
            pairs: pairs in a row, at most ``KEYS``.
            questions: questions for each pair; those without a free place are left out.
            seed: seed of all random numbers.
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
        """Batches drawn independently of the training batches.

        Args:
            distances: the least and the greatest distance.
            batches: number of batches.
            purpose: purposes, such as "dev" and "test", get different batches.
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
            # The first question places the pair; further ones use that place.
            places = free[:-1] & free[1:]
            for _ in range(self._questions):
                distance = round(float(np.exp(random.uniform(low, high))))
                (starts,) = np.nonzero(places[:-distance] & free[distance + 1 :])
                # No free place at this distance: the question is left out.
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


#: Tokens 0 to 9 are digits; then come the operators, which open a list, the token that
#: closes it, and padding.
OPERATORS = {10: min, 11: max, 12: _median, 13: _sum_modulo}
CLOSE, EMPTY = 14, 15
DEPTH, ARGUMENTS, LIST_SHARE = 10, 10, 0.25


def draw_list(random: Random, longest: int) -> list[int] | None:
    """The tokens of a random nested list; None if there are more than ``longest``.

    A list has 2 to ``ARGUMENTS`` arguments. Each is a list with probability
    ``LIST_SHARE``, otherwise a digit; at ``DEPTH`` all are digits.

    References:
        Nangia and Bowman, "ListOps", 2018, and its generator (5 arguments, depth 20);
        Tay et al., "Long Range Arena", 2021, section 2.2.1 (10 and 10, as here).
    """
    tokens: list[int] = []

    def build(depth: int) -> bool:
        """Adds a list; returns whether it is short enough."""
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
    """The value of a list.

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
    """Evaluation of nested lists; the answer is predicted at the last position.

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
            shortest: the least tokens of a list; a quarter of ``length`` if not given.
            seed: seed of all random numbers.
        """
        self._length, self._rows, self._seed = length, rows, seed
        self._shortest = length // 4 if shortest is None else shortest

    def batch_at(self, step: int) -> Stretch:
        """New data at each step: a pure function of the seed and the step."""
        return self._make(Random(f"{self._seed} train {step}"))

    def apart(self, batches: int, *, purpose: str) -> list[Stretch]:
        """Batches drawn independently of training, different for each ``purpose``."""
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
