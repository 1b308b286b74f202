"""Does the attention weight of *he* fall on *il*?"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attnlab._src.bench.charts import plt
from benchmarks.studies.align.word_alignment import Ibm1, words_of
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.batches import Batch, pad
from benchmarks.studies.machinery.data.pairs import Pair
from benchmarks.studies.machinery.data.vocabulary import Vocabulary
from benchmarks.studies.machinery.models.translation import padded_length
from benchmarks.studies.machinery.models.translation_runs import (
    BUDGET,
    SIZES,
    Task,
    translators,
)
from benchmarks.studies.machinery.page import Page, cost_of, table
from benchmarks.studies.machinery.parallel import over_batch

#: Target words, and the source words that they should attend to.
LINKS = {"he": ("il",), "she": ("elle",), "we": ("nous",), "who": ("qui",)}
#: The most words of a sentence that is drawn.
LONGEST_SHOWN = 14


def weights_of(model: Any, batch: Batch) -> jax.Array:
    """Attention weights ``[B, T, S]`` with the reference translation as target."""
    return model.with_weights(
        batch.source, batch.target[:, :-1], source_lengths=batch.source_lengths
    )[1]


class Words(NamedTuple):
    """The attention weights of one sentence pair, by words instead of tokens.

    Attributes:
        pair: the sentences.
        weights: ``[target words, source words + 1]``: means over the tokens of a target
            word of the sums over the tokens of a source word; the last column is END.
    """

    pair: Pair
    weights: np.ndarray


def by_words(pair: Pair, weights: np.ndarray, vocabulary: Vocabulary) -> Words | None:
    """Weights by words, from weights ``[T, S]`` by tokens.

    None if the tokens do not have the same words as ``text.split()``.
    """
    source, target = vocabulary.encode(pair.source), vocabulary.encode(pair.target)
    columns = np.array(vocabulary.words(source))
    rows = np.array(vocabulary.words(target))
    # SentencePiece and ``split`` take different characters for spaces.
    for text, found in ((pair.source, columns), (pair.target, rows)):
        if sorted({*found.tolist()}) != list(range(len(text.split()))):
            return None
    across = np.stack(
        [
            *(
                weights[:, : len(source)][:, columns == word].sum(1)
                for word in range(len(pair.source.split()))
            ),
            weights[:, len(source)],
        ],
        1,
    )
    down = [
        across[: len(target)][rows == word].mean(0)
        for word in range(len(pair.target.split()))
    ]
    return Words(pair, np.stack(down))


def look(task: Task, model: Any, pairs: list[Pair]) -> list[Words | None]:
    """For each sentence pair the result of :func:`by_words`."""
    vocabulary, devices = task.corpus.vocabulary, task.context.mesh.size
    run = over_batch(weights_of, task.context.mesh)
    encoded = task.corpus.encode(pairs)
    groups: dict[int, list[int]] = {}
    for i, sides in enumerate(encoded):
        groups.setdefault(padded_length(max(map(len, sides)) + 1), []).append(i)
    found: dict[int, Words | None] = {}
    rows = 8 * devices
    for length, members in groups.items():
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            batch = pad([encoded[i] for i in part], rows, length)
            weights = np.asarray(run(model, batch))
            for i, one in zip(part, weights, strict=False):
                found[i] = by_words(pairs[i], one, vocabulary)
    return [found[i] for i in range(len(pairs))]


class Rate(NamedTuple):
    """How often three ways to choose a source word find the right one, as shares.

    Attributes:
        attention: the word of the strongest weight, which may be END.
        chance: a random word of the sentence.
        ibm1: the word that IBM model 1 chooses.
        count: number of target words, at least one.
    """

    attention: float
    chance: float
    ibm1: float
    count: int


def hit_rate(
    seen: Iterable[Words], word: str, wanted: tuple[str, ...], ibm1: Ibm1
) -> Rate | None:
    """Shares over all occurrences of ``word`` whose source has one of ``wanted``.

    Returns:
        None if there is no such occurrence.
    """
    hits = []
    for pair, weights in seen:
        source = words_of(pair.source)
        right = {w.place for w in source if w.text in wanted}
        if not right:
            continue
        for found in words_of(pair.target):
            if found.text == word:
                hits.append((
                    int(weights[found.place].argmax()) in right,
                    len(right) / len(pair.source.split()),
                    ibm1.place_of(word, pair.source) in right,
                ))
    if not hits:
        return None
    attention, chance, model = (float(np.mean(x)) for x in zip(*hits, strict=True))
    return Rate(attention, chance, model, len(hits))


def heatmaps(seen: list[Words]) -> Any:
    """A figure of weights: source across, target down, a panel for each pair."""
    columns = 2
    rows = max(-(-len(seen) // columns), 1)
    figure, axes = plt.subplots(
        rows, columns, figsize=(13, 5.6 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(seen) :]:
        axis.set_visible(False)
    image = None
    for axis, (pair, weights) in zip(axes.flat, seen, strict=False):
        image = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        across, down = [*pair.source.split(), "END"], pair.target.split()
        axis.set_xticks(range(len(across)), across, rotation=60, ha="left")
        axis.xaxis.tick_top()
        axis.set_yticks(range(len(down)), down)
        axis.tick_params(length=0, labelsize=9)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.5, label="weight")
    return figure


def chosen(pairs: list[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """Short pairs with *il* and *he*, and random other short pairs."""
    short = [
        p
        for p in pairs
        if all(5 <= len(s.split()) <= LONGEST_SHOWN for s in (p.source, p.target))
    ]

    def has(text: str, word: str) -> bool:
        return word in {w.text for w in words_of(text)}

    both = [p for p in short if has(p.source, "il") and has(p.target, "he")]
    random = np.random.default_rng(0).permutation(len(short))
    rest = [short[i] for i in random if short[i] not in both[:count]]
    return both[:count], rest[:count]


def study(context: Context) -> Page | None:
    """Measures the alignments of the translator with additive attention."""
    task = Task(context, BUDGET, SIZES)
    found = translators(task, ["additive"])
    if found is None:
        return None
    model, pairs = found["additive"].trained.model, task.corpus.split.test
    seen = [words for words in look(task, model, pairs) if words is not None]
    if len(seen) < len(pairs):
        context.say(f"{len(pairs) - len(seen)} pairs with unusual spaces are left out")
    ibm1 = Ibm1(task.corpus.split.train)
    found_rates = {w: hit_rate(seen, w, wanted, ibm1) for w, wanted in LINKS.items()}
    rates = {word: rate for word, rate in found_rates.items() if rate is not None}
    by_pair = {words.pair: words for words in seen}
    with_he, at_random = chosen(list(by_pair), 2)
    parts = {"he": with_he, "random": at_random}
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "cost": cost_of(found["additive"].summaries),
            "rates": table(
                ["target", "source", "places", "attention", "chance", "IBM model 1"],
                [
                    [
                        word,
                        " / ".join(LINKS[word]),
                        rate.count,
                        *(f"{x:.1%}" for x in (rate.attention, rate.chance, rate.ibm1)),
                    ]
                    for word, rate in rates.items()
                ],
            ),
        },
        charts={
            name: heatmaps([by_pair[p] for p in part]) for name, part in parts.items()
        },
        results={
            "rates": {word: rate._asdict() for word, rate in rates.items()},
            "runs": {"additive": found["additive"].trained.summary},
        },
    )
