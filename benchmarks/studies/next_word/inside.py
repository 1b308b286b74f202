"""What a trained model predicts, and where its attention looks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from attnlab import masks
from benchmarks.studies.machinery.data.batches import END, PADDING
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.machinery.models.language_models import losses_and_hits
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.next_word.words import KINDS, Sentence, Words

#: The greatest distance of each class of earlier places but the last.
NEAR = (8, 32, 128)
DISTANCES = ("1-8", "9-32", "33-128", "over 128", "never")
#: The same for states by their distance from the last step.
BACK = (1, *NEAR)
STEPS_BACK = ("1", "2-8", "9-32", "33-128", "over 128")
#: Words that are listed as the most probable ones.
BEST = 5


def attention_weights(model: Any, tokens: Any) -> jax.Array:
    """Weights ``[B, T, T]`` of each step on the states of earlier steps."""
    x = model.embedding(jnp.asarray(tokens))
    for layer in model.layers:
        x, _ = layer(x)
    earlier = masks.causal() & ~masks.sliding_window(0, 0)
    return model.attention.with_stats(x, x, mask=earlier, top_k="all").weights[:, 0]


def last_places(batch: Stretch) -> np.ndarray:
    """``[B, T]``: where each label stands last among the tokens read, -1 if nowhere."""
    found = np.full(batch.tokens.shape, -1, np.int32)
    for row, (tokens, labels) in enumerate(
        zip(np.asarray(batch.tokens), np.asarray(batch.labels), strict=True)
    ):
        last: dict[int, int] = {}
        for at, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            last[int(token)] = at
            found[row, at] = last.get(int(label), -1)
    return found


def _losses(model: Any, batch: Stretch) -> jax.Array:
    return losses_and_hits(model, batch)[0]


def _shares(
    weights: jax.Array, tokens: jax.Array, kinds: jax.Array, places: jax.Array
) -> jax.Array:
    """``[B, T, K]``: where the weights ``[B, T, T]`` of each step are.

    By kind of word, by distance of the state, on states after the word that the step
    has read, on ``places``, and on the states just before these.
    """
    steps = np.arange(weights.shape[1])
    classes = np.searchsorted(BACK, steps[:, None] - steps[None])[None]
    masks = [
        *(classes == i for i in range(len(STEPS_BACK))),
        tokens[:, :, None] == tokens[:, None],
    ]
    summed = [(weights * mask).sum(-1) for mask in masks]
    on = [
        jnp.take_along_axis(weights, jnp.maximum(at, 0)[..., None], -1)[..., 0]
        for at in (places, places - 1)
    ]
    by_kind = weights @ jax.nn.one_hot(kinds, len(KINDS))
    return jnp.concatenate([by_kind, jnp.stack([*summed, *on], -1)], -1)


def _looks(
    model: Any, batch: Stretch, kinds: jax.Array, places: jax.Array
) -> jax.Array:
    """``[B, T, 2, K]``: :func:`_shares` of the model's weights, and of equal ones."""
    weights = attention_weights(model, batch.tokens)
    seen = np.tri(weights.shape[1], k=-1, dtype=np.float32)
    equal = seen / np.maximum(seen.sum(-1, keepdims=True), 1)
    both = [weights, jnp.broadcast_to(equal[None], weights.shape)]
    tokens = jnp.asarray(batch.tokens)
    return jnp.stack([_shares(each, tokens, kinds, places) for each in both], 2)


def measure(model: Any, batches: Sequence[Stretch], words: Words, mesh: Mesh) -> Json:
    """Losses on the test text, and where attention looks.

    Returns:
        ``loss``: the mean per token. ``sums``: for each of :data:`KINDS` (of the
        target) and of :data:`DISTANCES` the sum of losses and their number. With
        attention, ``looks``: for ``kinds``, ``back``, ``same`` and ``repeated`` pairs
        of a share of the weights and the share that equal weights have. ``repeated``
        has for each distance but "never" the shares of the content word that comes
        next, where it stood last, and of the state before that.
    """
    losses_of, looks_of = over_batch(_losses, mesh), over_batch(_looks, mesh)
    sums = np.zeros((len(KINDS), len(DISTANCES), 2))
    shares = np.zeros((2, len(KINDS) + len(STEPS_BACK) + 3))
    repeated = np.zeros((len(NEAR) + 1, 2, 2))
    steps, times = 0, np.zeros(len(NEAR) + 1)
    for batch in batches:
        places = last_places(batch)
        here = np.arange(places.shape[1])[None]
        distances = np.searchsorted(NEAR, here + 1 - places)
        distances = np.where(places < 0, len(DISTANCES) - 1, distances)
        counted = np.asarray(batch.counted)
        losses = np.asarray(losses_of(model, batch), np.float64)
        kinds = words.kinds[np.asarray(batch.labels)]
        at = kinds[counted], distances[counted]
        np.add.at(sums, at, np.stack([losses, counted], -1)[counted])
        if model.attention is None:
            continue
        read = words.kinds[np.asarray(batch.tokens)]
        found = np.asarray(looks_of(model, batch, read, places), np.float64)
        # The first step sees no earlier state.
        seeing = counted & (here > 0)
        shares += found[seeing].sum(0)
        steps += int(seeing.sum())
        # A step does not see its own state, nor one before the first.
        again = seeing & (places > 0) & (places < here)
        again &= kinds == KINDS.index("content")
        np.add.at(repeated, distances[again], found[again][..., -2:])
        np.add.at(times, distances[again], 1)
    result: Json = {
        "loss": float(sums[..., 0].sum() / sums[..., 1].sum()),
        "sums": sums.tolist(),
    }
    if steps:
        mean = (shares / steps).T.tolist()
        again = repeated / np.maximum(times, 1)[:, None, None]
        result["looks"] = {
            "kinds": dict(zip(KINDS, mean, strict=False)),
            "back": dict(zip(STEPS_BACK, mean[len(KINDS) :], strict=False)),
            "same": {"as the last one": mean[-3]},
            "repeated": {
                name: {"word": pair[:, 0].tolist(), "before": pair[:, 1].tolist()}
                for name, pair in zip(DISTANCES, again, strict=False)
            },
        }
    return result


def read(model: Any, sentences: Sequence[Sentence], words: Words) -> list[Json]:
    """What a model does with the beginnings of sentences.

    The model reads the end of a paragraph first.

    Returns:
        For each sentence ``best``: the most probable next words, with their
        probabilities; ``next``: the probability of the word that comes next, or None;
        with attention, ``weights``: for each step those on the earlier states.
    """
    tokens = [[END, *words.encode(s.words)] for s in sentences]
    longest = max(map(len, tokens))
    padded = np.array([[*t, *[PADDING] * (longest - len(t))] for t in tokens], np.int32)
    chances = np.asarray(jax.nn.softmax(model(padded)))
    weights = None
    if model.attention is not None:
        weights = np.asarray(attention_weights(model, padded))
    found: list[Json] = []
    for i, (sentence, own) in enumerate(zip(sentences, tokens, strict=True)):
        last = chances[i, len(own) - 1]
        best = np.argsort(-last, kind="stable")[:BEST]
        known = sentence.next is not None and sentence.next in words
        entry: Json = {
            "best": [[words.labels[w], float(last[w])] for w in best],
            "next": float(last[words.encode([sentence.next])[0]]) if known else None,
        }
        if weights is not None:
            entry["weights"] = [
                [round(float(w), 5) for w in weights[i, step, :step]]
                for step in range(len(own))
            ]
        found.append(entry)
    return found
