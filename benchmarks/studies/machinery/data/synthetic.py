"""Synthetic tasks: copy or reverse random symbols."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from benchmarks.studies.machinery.data.batches import END, START, Batch, Example, pad

#: The first token that is a symbol; lower ones are special tokens.
FIRST_SYMBOL = max(START, END) + 1


class Symbols:
    """Random symbols as source, and the same or the reversed ones as target.

    Attributes:
        vocabulary_size: V, special tokens included.
    """

    def __init__(
        self,
        task: Literal["copy", "reverse"],
        *,
        symbols: int,
        lengths: tuple[int, int],
        rows: int,
        padded: int | None = None,
        seed: int = 0,
    ):
        """A task.

        Args:
            task: how the target follows from the source.
            symbols: number of different symbols.
            lengths: the least and the greatest length; lengths are drawn uniformly.
            rows: B, a multiple of the number of devices.
            padded: S; the greatest length and END if not given.
            seed: seed of all random numbers.
        """
        if task not in {"copy", "reverse"}:
            raise ValueError(f"task: expected copy or reverse, got {task!r}")
        low, high = lengths
        if not 1 <= low <= high:
            raise ValueError(f"lengths: expected 1 <= least <= most, got {lengths}")
        padded = high + 1 if padded is None else padded
        if padded <= high:
            raise ValueError(f"padded: expected more than {high}, got {padded}")
        self._task, self._symbols, self._lengths = task, symbols, lengths
        self._rows, self._padded, self._seed = rows, padded, seed
        self.vocabulary_size = FIRST_SYMBOL + symbols

    def _draw(self, random: np.random.Generator, length: int) -> Example:
        source = random.integers(FIRST_SYMBOL, self.vocabulary_size, length).tolist()
        return source, source[::-1] if self._task == "reverse" else source

    def batch_at(self, step: int) -> Batch:
        """New data at each step: a pure function of the seed and the step."""
        random = np.random.default_rng((self._seed, 0, step))
        low, high = self._lengths
        lengths = random.integers(low, high + 1, self._rows)
        examples = [self._draw(random, n) for n in lengths]
        return pad(examples, self._rows, self._padded)

    def test(self, lengths: Sequence[int], batches: int = 1) -> list[Batch]:
        """Batches of one length each, drawn independently of the training batches.

        Args:
            lengths: lengths in symbols; all batches have the same shape, at least that
                of training.
            batches: number of batches of each length.
        """
        padded = max(self._padded, max(lengths) + 1)
        made = []
        for length in lengths:
            random = np.random.default_rng((self._seed, 1, length))
            for _ in range(batches):
                examples = [self._draw(random, length) for _ in range(self._rows)]
                made.append(pad(examples, self._rows, padded))
        return made
