"""Training runs of translators, which several studies share."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.batches import LENGTHS
from benchmarks.studies.machinery.data.corpus import Corpus
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.losses import forced
from benchmarks.studies.machinery.models.translation import translate
from benchmarks.studies.machinery.models.translators import (
    TRANSLATORS,
    Sizes,
    best_of_beams,
    logits,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.sweep import Chosen, train_at_best_rate
from benchmarks.studies.machinery.training import Run

#: ``make(vocabulary size, sizes, rngs)`` makes an untrained translator.
Make = Callable[[int, Sizes, nnx.Rngs], Any]


class Budget(NamedTuple):
    """Data and training that all translators of a comparison share.

    Attributes:
        steps: number of updates.
        tokens: the most padded tokens of a batch, on one side.
        pieces: size of the vocabulary.
        limit: number of sentence pairs to read; None: all.
        evaluate_every: steps between evaluations.
        smoothing: label smoothing.
    """

    steps: int
    tokens: int = 4096
    pieces: int = 4000
    limit: int | None = None
    evaluate_every: int = 250
    smoothing: float = 0.1


#: About eight epochs; a run takes twenty minutes to half an hour on two cores.
BUDGET = Budget(steps=2800, evaluate_every=200)
SIZES = Sizes(features=192, hidden_size=192, layers=2)
#: Learning rates that are tried, each with a tenth of the steps.
RATES = {
    "plain": (1e-3, 2e-3, 4e-3),
    "additive": (1e-3, 2e-3, 4e-3),
    "transformer": (5e-4, 1e-3, 2e-3),
}
#: For ``--quick``.
QUICK = Budget(steps=6, tokens=512, pieces=400, limit=1500, evaluate_every=3)
QUICK_SIZES = Sizes(features=16, hidden_size=16, layers=1, heads=2)


class Task:
    """Translation of one corpus under one budget."""

    def __init__(self, context: Context, budget: Budget, sizes: Sizes):
        """Reads the corpus.

        Args:
            context: context of the study.
            budget: replaced by a tiny one for ``--quick``.
            sizes: sizes of the models; replaced by tiny ones for ``--quick``.
        """
        if context.quick:
            budget, sizes = QUICK, QUICK_SIZES
        self.context, self.budget, self.sizes = context, budget, sizes
        # One shape compiles faster than several.
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
            name: name of the run, which must identify ``make``.
            make: makes the model.
            rate: the highest learning rate.
            steps: number of updates; the budget's if not given.
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
        """Translations of all sources of the test set, by beam search."""
        vocabulary = self.corpus.vocabulary
        sources = [vocabulary.encode(p.source) for p in self.corpus.split.test]

        def batch(source: np.ndarray, lengths: np.ndarray) -> Any:
            return self._translate(model, source, lengths)

        devices = self.context.mesh.size
        found = translate(
            sources, batch, tokens=2048, lengths=self._lengths, devices=devices
        )
        return [vocabulary.decode(tokens) for tokens in found]


def translators(
    task: Task, names: Iterable[str] = tuple(TRANSLATORS)
) -> dict[str, Chosen] | None:
    """The trained translators by name, each at its best rate.

    None if ``--only`` left out runs that are not finished.
    """
    shared = task.context.shared("translators")
    short_steps = max(task.budget.steps // 10, 3)

    def train(name: str) -> Chosen | None:
        def run(rate: float, short: bool) -> Run:
            steps = short_steps if short else None
            return task.run(name, TRANSLATORS[name], rate, steps=steps)

        rates = RATES[name][:1] if task.context.quick else RATES[name]
        return train_at_best_rate(shared, run, rates)

    # All are asked for first, so that --only is checked against all names.
    found = {name: train(name) for name in names}
    done = {name: chosen for name, chosen in found.items() if chosen is not None}
    return done if len(done) == len(found) else None


def counts_of(task: Task) -> str:
    """The sizes of the data, as text for a page."""
    c = task.corpus.counts
    return (
        f"{c['train'] - task.too_long:,} sentence pairs to train on, {c['dev']:,} to "
        f"choose by and {c['test']:,} to report, in a joint vocabulary of "
        f"{c['vocabulary']:,} pieces"
    )
