"""Batches of pairs of similar length, in few shapes; pure functions of the step.

The special tokens of every vocabulary here are :data:`PADDING`, :data:`UNKNOWN`,
:data:`START`, :data:`END`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

PADDING, UNKNOWN, START, END = range(4)
#: The lengths that sentences are padded to.
LENGTHS = (20, 32, 48, 72, 144)

#: Tokens of a source and of its target, without special tokens.
Example = tuple[Sequence[int], Sequence[int]]


class Batch(NamedTuple):
    """Pairs of sequences, padded.

    Attributes:
        source: ``[B, S]`` int32: tokens, ``END``, padding.
        source_lengths: ``[B]`` int32, ``END`` included; at least 1.
        target: ``[B, S + 1]`` int32: ``START``, tokens, ``END``, padding. A model reads
            ``target[:, :-1]`` and predicts ``target[:, 1:]``, both ``[B, S]``.
        target_lengths: ``[B]`` int32, ``START`` and ``END`` included; 1 in rows without
            an example. ``target_lengths - 1`` tokens count in the loss.
    """

    source: np.ndarray | jax.Array
    source_lengths: np.ndarray | jax.Array
    target: np.ndarray | jax.Array
    target_lengths: np.ndarray | jax.Array


def pad(examples: Sequence[Example], rows: int, length: int) -> Batch:
    """A batch of a given shape.

    Args:
        examples: at most ``rows``, each with less than ``length`` tokens a side.
        rows: B; rows without an example do not count in the loss.
        length: S.
    """
    source = np.full((rows, length), PADDING, np.int32)
    target = np.full((rows, length + 1), PADDING, np.int32)
    # Rows without an example have one END: many models divide by 0 for empty rows.
    source[:, 0], target[:, 0] = END, START
    source_lengths, target_lengths = np.ones((2, rows), np.int32)
    for row, (one, other) in enumerate(examples):
        source[row, : len(one) + 1] = [*one, END]
        target[row, : len(other) + 2] = [START, *other, END]
        source_lengths[row], target_lengths[row] = len(one) + 1, len(other) + 2
    return Batch(source, source_lengths, target, target_lengths)


class Batches:
    """Examples in batches of few shapes; an epoch has each example once.

    Attributes:
        kept: number of examples.
        dropped: number of examples that are longer than the longest length.
        steps: batches in an epoch.
        shapes: the ``(rows, length)`` that occur.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        tokens: int = 4096,
        lengths: Sequence[int] = LENGTHS,
        devices: int = 1,
        seed: int = 0,
    ):
        """Sorts examples by length.

        Args:
            examples: token sequences; END is added to both sides, which then must fit
                the longest of ``lengths``.
            tokens: the most padded tokens of a batch on one side, but at least one row
                for each device.
            lengths: the lengths that examples are padded to, ascending.
            devices: the number of rows is a multiple of it.
            seed: seed of the order.
        """
        if list(lengths) != sorted(set(lengths)):
            raise ValueError(f"lengths: expected ascending numbers, got {lengths}")
        longest = [max(len(one), len(other)) + 1 for one, other in examples]
        buckets = np.searchsorted(np.asarray(lengths), longest)
        self._examples, self._seed = examples, seed
        self._members = {
            length: np.flatnonzero(buckets == i) for i, length in enumerate(lengths)
        }
        self._rows = {
            length: max(tokens // length // devices, 1) * devices for length in lengths
        }
        self.kept = int((buckets < len(lengths)).sum())
        self.dropped = len(examples) - self.kept
        if not self.kept:
            raise ValueError(
                f"examples: expected some of at most {max(lengths) - 1} tokens, got "
                f"none in {len(examples)}"
            )
        self.shapes = [(self._rows[n], n) for n, m in self._members.items() if len(m)]
        self.steps = sum(
            -(-len(members) // self._rows[n]) for n, members in self._members.items()
        )
        # Keeps two epochs: steps around the border of an epoch do not shuffle again.
        self._order = functools.lru_cache(2)(self._shuffle)

    def _shuffle(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        random = np.random.default_rng((self._seed, epoch))
        plan = [
            (length, part)
            for length, members in self._members.items()
            for part in self._cut(length, random.permutation(members))
        ]
        return [plan[i] for i in random.permutation(len(plan))]

    def _cut(self, length: int, members: np.ndarray) -> list[np.ndarray]:
        rows = self._rows[length]
        return [members[i : i + rows] for i in range(0, len(members), rows)]

    def _make(self, length: int, members: np.ndarray) -> Batch:
        chosen = [self._examples[i] for i in members]
        return pad(chosen, self._rows[length], length)

    def batch_at(self, step: int) -> Batch:
        """The batch of a step: a pure function of the seed and the step."""
        epoch, place = divmod(step, self.steps)
        return self._make(*self._order(epoch)[place])

    def all(self) -> list[Batch]:
        """All examples once, shortest first, for evaluation."""
        return [
            self._make(length, part)
            for length, members in self._members.items()
            for part in self._cut(length, members)
        ]
