"""Training translators: the runs that several studies share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from benchmarks.studies.batches import LENGTHS
from benchmarks.studies.context import Context
from benchmarks.studies.corpus import Corpus
from benchmarks.studies.evaluation import MeanLoss
from benchmarks.studies.losses import forced
from benchmarks.studies.optimisers import adam
from benchmarks.studies.parallel import over_batch
from benchmarks.studies.record import Json
from benchmarks.studies.training import Run
from benchmarks.studies.translation import translate
from benchmarks.studies.translators import Sizes, best_of_beams, logits

#: ``make(vocabulary size, sizes, rngs)``: a new translator.
Make = Callable[[int, Sizes, nnx.Rngs], Any]


class Budget(NamedTuple):
    """What every translator of a comparison gets.

    Attributes:
        steps: updates.
        tokens: padded tokens of a batch, on one side.
        pieces: of the vocabulary.
        limit: pairs read; None: all.
        evaluate_every: steps.
        smoothing: of labels.
    """

    steps: int
    tokens: int = 4096
    pieces: int = 4000
    limit: int | None = None
    evaluate_every: int = 250
    smoothing: float = 0.1


#: For ``--quick``.
QUICK = Budget(steps=6, tokens=512, pieces=400, limit=1500, evaluate_every=3)
QUICK_SIZES = Sizes(features=16, hidden_size=16, layers=1, heads=2)


class Task:
    """Translation of one corpus under one budget."""

    def __init__(self, context: Context, budget: Budget, sizes: Sizes):
        """Reads the corpus.

        Args:
            context: of the study.
            budget: of each run.
            sizes: of each model; both are replaced by tiny ones for ``--quick``.
        """
        if context.quick:
            budget, sizes = QUICK, QUICK_SIZES
        self.context, self.budget, self.sizes = context, budget, sizes
        # One shape is compiled in less time than several.
        self._lengths = LENGTHS[-1:] if context.quick else LENGTHS
        self.corpus: Corpus = context.corpus(pieces=budget.pieces, limit=budget.limit)
        self._train = self._batches(self.corpus.split.train)
        self.too_long: int = self._train.dropped
        self.dev = self._batches(self.corpus.split.dev).all()
        self._evaluate = MeanLoss(forced(logits), self.dev, context.mesh)
        self._translate = over_batch(best_of_beams, context.mesh)

    def _batches(self, pairs: Any) -> Any:
        return self.context.batches(
            self.corpus.encode(pairs), tokens=self.budget.tokens, lengths=self._lengths
        )

    def run(
        self, name: str, make: Make, rate: float, *, steps: int | None = None
    ) -> Run:
        """One training run.

        Args:
            name: of the run; ``make`` is decided by it.
            make: of a model.
            rate: of learning, at its highest.
            steps: instead of the budget's.
        """
        steps = self.budget.steps if steps is None else steps
        warmup = max(steps // 10, 1)
        config: Json = {
            "model": name,
            "sizes": self.sizes._asdict(),
            "budget": self.budget._asdict(),
            "data": self.corpus.fingerprint,
            "rate": rate,
            "warmup": warmup,
        }
        return Run(
            name=name,
            config=config,
            make_model=lambda: make(
                self.corpus.vocabulary.size, self.sizes, nnx.Rngs(0)
            ),
            loss=forced(logits, smoothing=self.budget.smoothing),
            batch_at=self._train.batch_at,
            optimiser=adam(rate, steps=steps, warmup=warmup),
            steps=steps,
            evaluate=self._evaluate,
            evaluate_every=min(self.budget.evaluate_every, steps),
            batches_by_devices=True,
        )

    def translate(self, model: Any) -> list[str]:
        """Every source of the test set, by beam search."""
        vocabulary = self.corpus.vocabulary
        sources = [vocabulary.encode(p.source) for p in self.corpus.split.test]

        def batch(source: np.ndarray, lengths: np.ndarray) -> Any:
            return self._translate(model, source, lengths)

        devices = self.context.mesh.size
        found = translate(
            sources, batch, tokens=2048, lengths=self._lengths, devices=devices
        )
        return [vocabulary.decode(tokens) for tokens in found]
