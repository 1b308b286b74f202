"""The students opened their ...: what does the last step look at?"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import AttentionResult, masks, nn, show_weights
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.stretches import Stretches
from benchmarks.studies.machinery.evaluation import MeanLoss
from benchmarks.studies.machinery.models.language_models import loss
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.page import Page
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.training import Run
from benchmarks.studies.next_word.inside import measure, read
from benchmarks.studies.next_word.page import page
from benchmarks.studies.next_word.words import (
    Sentence,
    Text,
    addresses,
    drawn,
    verses,
)

#: The models. The last one attends to the state of the step before only: it has all
#: layers of the first, and nothing to choose from.
MODELS = ("attention", "no attention", "previous state")
SEEDS = 3
#: Name of longer runs on the verses, with one seed; how many times the steps they have.
LONGER, TIMES = "verses, longer", 3
#: The learning rate of all runs.
RATE = 4e-3
#: Factor of the embeddings beyond that of ``nn.Embedding``. With smaller ones the
#: models with one more layer, whose inputs are small then, learn much more slowly.
LARGER = 8
THE_SENTENCE = Sentence(None, ["the", "students", "opened", "their"], None)


class Budget(NamedTuple):
    """Data and training that all runs share.

    Attributes:
        steps: number of updates.
        length: tokens in a context.
        rows: contexts in a batch.
        features: size of embeddings and states.
        words: size of the vocabulary.
        sentences: number of random sentences of each text.
        documents: options of ``read_documents``.
        verses: number of verses to read; None: all.
    """

    steps: int = 320
    length: int = 256
    rows: int = 4
    features: int = 192
    words: int = 3000
    sentences: int = 10
    documents: Mapping[str, int] = {"test": 6, "dev": 3}
    verses: int | None = None


BUDGET = Budget()
QUICK = Budget(
    steps=6,
    length=144,
    rows=2,
    features=16,
    words=200,
    sentences=2,
    documents={"test": 2, "dev": 2, "limit": 12},
    verses=600,
)


class Task:
    """Both texts under one budget.

    Attributes:
        texts: by name; :data:`LONGER` is the verses again.
        sentences: beginnings of sentences that the models read.
    """

    def __init__(self, context: Context):
        self.budget = budget = QUICK if context.quick else BUDGET
        # The data of a run must not depend on the number of devices.
        self.context = context.dividing(budget.rows)
        self.texts = {
            "addresses": addresses(context, budget.words, **budget.documents),
            "verses": verses(context, budget.words, budget.verses),
        }
        self.sentences = [
            THE_SENTENCE,
            *(s for n, t in self.texts.items() for s in drawn(n, t, budget.sentences)),
        ]
        self.texts[LONGER] = self.texts["verses"]

    def _stretches(self, text: Text, part: str, seed: int = 0) -> Stretches:
        return Stretches(
            getattr(text, part),
            length=self.budget.length,
            rows=self.budget.rows,
            vocabulary_size=text.words.size,
            causal=True,
            seed=seed,
        )

    def _make(self, kind: str, text: Text, seed: int) -> nnx.Module:
        size, rngs = self.budget.features, nnx.Rngs(seed)
        options: dict[str, Any] = {"features": size, "hidden_size": size}
        if kind == "previous state":
            options["attention"] = nn.Alignment(mask=masks.sliding_window(1, 0))
        plain = kind == "no attention"
        make = getattr(nn.RecurrentLanguageModel, "plain" if plain else "standard")
        model = make(text.words.size, cell=nn.GRU, rngs=rngs, **options)
        scale = LARGER * size**0.5
        model.embedding = nn.Embedding(text.words.size, size, scale=scale, rngs=rngs)
        return model

    def run(self, name: str, kind: str, seed: int) -> Run:
        """One training run.

        Args:
            name: name of the text, or :data:`LONGER`.
            kind: one of :data:`MODELS`.
            seed: seed of parameters and of the order of contexts.
        """
        text = self.texts[name]
        steps = self.budget.steps * (TIMES if name == LONGER else 1)
        train = self._stretches(text, "train", seed)
        dev = self._stretches(text, "dev").all()
        return Run(
            name=f"{name}/{kind}/seed-{seed}".replace(", ", "-").replace(" ", "-"),
            config={
                "model": kind,
                "larger": LARGER,
                "budget": self.budget._asdict(),
                "data": text.fingerprint,
                "rate": RATE,
            },
            make_model=lambda: self._make(kind, text, seed),
            loss=loss,
            batch_at=train.batch_at,
            optimiser=adam(RATE, steps=steps, warmup=max(steps // 10, 1)),
            steps=steps,
            evaluate=MeanLoss(loss, dev, self.context.mesh),
            evaluate_every=steps,
            seed=seed,
            measure=lambda model, _: self._measure(text, model, seed),
        )

    def _measure(self, text: Text, model: Any, seed: int) -> Json:
        batches = self._stretches(text, "test").all()
        found = measure(model, batches, text.words, self.context.mesh)
        # The page shows the sentences as the first seed reads them.
        if seed == 0:
            found["sentences"] = read(model, self.sentences, text.words)
        return found


def weights_page(task: Task, read: Mapping[str, list[Json]]) -> Any:
    """A page of the weights of all sentences, one after another; a layer a text."""
    words = [["¶", *sentence.words] for sentence in task.sentences]
    length = sum(map(len, words))
    layers = {}
    for name, entries in read.items():
        weights = np.zeros((1, 1, length, length), np.float32)
        first = 0
        for entry in entries:
            for step, row in enumerate(entry["weights"]):
                weights[0, 0, first + step, first : first + step] = row
            first += len(entry["weights"])
        # The page needs neither output nor log-sum-exp.
        nothing = jnp.zeros((1, length, 1))
        layers[name] = AttentionResult(nothing, nothing, jnp.asarray(weights))
    return show_weights(layers, [word for each in words for word in each])


def study(context: Context) -> Page | None:
    """Trains the models on both texts, and looks at what they attend to.

    It also writes ``next-word-weights.html``, next to the page.
    """
    task = Task(context)
    seeds = 1 if context.quick else SEEDS
    found: dict[str, dict[str, list[Json]]] = {
        name: {kind: [] for kind in MODELS} for name in task.texts
    }
    complete = True
    for seed, name, kind in itertools.product(range(seeds), task.texts, MODELS):
        if name == LONGER and seed > 0:
            continue
        trained = task.context.train(task.run(name, kind, seed))
        complete = complete and trained is not None
        if trained is not None:
            found[name][kind].append(trained.summary)
    if not complete:
        return None
    read_by = {
        name: runs["attention"][0]["measured"]["sentences"]
        for name, runs in found.items()
    }
    weights_page(task, read_by).save(context.out / "next-word-weights.html")
    budget: Json = {"rate": RATE, "larger": LARGER, "times": TIMES}
    return page(task.texts, found, task.sentences, task.budget._asdict() | budget)
