"""Contexts cut from one long text, for causal or masked language models."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.studies.machinery.errors import StudyError

#: Share of the tokens that a masked language model must predict; of these, shares that
#: are hidden and replaced by random tokens. The rest of them is left as it is.
CHOSEN, HIDDEN, REPLACED = 0.15, 0.8, 0.1


class Stretch(NamedTuple):
    """A batch of text of one length.

    Attributes:
        tokens: ``[B, T]`` int32, the input.
        labels: ``[B, T]`` int32, the token to predict at each position.
        counted: ``[B, T]`` bool, the positions that count in the loss.
    """

    tokens: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array
    counted: np.ndarray | jax.Array


class Stretches:
    """Batches of stretches; an epoch has each token about once.

    Attributes:
        steps: batches in an epoch.
        vocabulary_size: V, including the mask token of a masked model.
    """

    def __init__(
        self,
        stream: np.ndarray,
        *,
        length: int,
        rows: int,
        vocabulary_size: int,
        causal: bool,
        seed: int = 0,
    ):
        """Cuts a text.

        Args:
            stream: tokens of the text.
            length: T.
            rows: B, a multiple of the number of devices.
            vocabulary_size: V without a mask token.
            causal: True: predict every next token; False: predict 15 % of the tokens.
            seed: seed of the order, and of the choice of these tokens.

        Raises:
            StudyError: if the text is too short for one batch.

        References:
            Devlin et al., "BERT", 2019, section 3.1, task 1 (choice of tokens).
        """
        self._stream, self._length, self._rows = stream, length, rows
        self._hide, self._causal, self._seed = vocabulary_size, causal, seed
        self.vocabulary_size = vocabulary_size + (not causal)
        # One stretch less, because each epoch starts at another offset.
        self._count = (len(stream) - 1) // length - 1
        self.steps = self._count // rows
        if self.steps < 1:
            raise StudyError(
                f"expected a text of at least {(rows + 1) * length + 1:,} tokens for "
                f"{rows} stretches of {length:,}, got {len(stream):,}"
            )
        self._order = functools.lru_cache(2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng((self._seed, epoch))
        first = random.integers(self._length)
        return first + self._length * random.permutation(self._count)

    def batch_at(self, step: int) -> Stretch:
        """The batch of a step: a pure function of the seed and the step."""
        epoch, place = divmod(step, self.steps)
        starts = self._order(epoch)[place * self._rows : (place + 1) * self._rows]
        random = np.random.default_rng((self._seed, 1, step))
        return self._make(starts, random)

    def all(self) -> list[Stretch]:
        """All stretches once, in order, for evaluation; the last batch is padded."""
        starts = np.arange(self._count + 1) * self._length
        batches = []
        for i in range(0, len(starts), self._rows):
            chosen = starts[i : i + self._rows]
            filled = np.resize(chosen, self._rows)
            batch = self._make(filled, np.random.default_rng((self._seed, 2, i)))
            real = np.arange(self._rows) < len(chosen)
            counted = batch.counted & real[:, None]
            batches.append(batch._replace(counted=counted))
        return batches

    def _make(self, starts: np.ndarray, random: np.random.Generator) -> Stretch:
        read = self._stream[starts[:, None] + np.arange(self._length + 1)]
        tokens, following = read[:, :-1], read[:, 1:]
        if self._causal:
            return Stretch(tokens, following, np.ones(tokens.shape, bool))
        draw, other = random.random(tokens.shape), random.random(tokens.shape)
        chosen = draw < CHOSEN
        replaced = random.integers(0, self._hide, tokens.shape, np.int32)
        shown = np.where(other < HIDDEN + REPLACED, replaced, tokens)
        shown = np.where(other < HIDDEN, self._hide, shown)
        return Stretch(np.where(chosen, shown, tokens).astype(np.int32), tokens, chosen)
