"""The page of the study of what the last step looks at."""

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attnlab._src.bench.charts import plt
from benchmarks.studies.machinery.page import (
    Page,
    cost_of,
    dots,
    interval,
    lines,
    shown,
    table,
)
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.next_word.inside import DISTANCES
from benchmarks.studies.next_word.words import KINDS, Sentence, Text

#: Summaries of the runs, by text, then by model, then by seed.
Found = Mapping[str, Mapping[str, Sequence[Json]]]
#: Kinds of target words by which losses are shown.
GROUPS = {"all tokens": KINDS, "content words": ("content",)}
#: The models that attention is compared with.
OTHERS = ("no attention", "previous state")
#: Where a chart draws each distance but "never": about the middle of the class.
MIDDLES = (3, 17, 65, 180)


def _measured(runs: Sequence[Json]) -> list[Json]:
    return [run["measured"] for run in runs]


def _loss(measured: Json, kinds: Sequence[str], distance: int) -> float:
    """The mean loss of targets of some kinds at one distance."""
    sums = np.array(measured["sums"])[[KINDS.index(k) for k in kinds], distance]
    total, count = sums.sum(0)
    return float(total / max(count, 1))


def _against(
    runs: Sequence[Json], others: Sequence[Json], loss: Any
) -> tuple[float, float | None]:
    """Difference of a loss between two models, over the seeds that both have."""
    pairs = zip(_measured(runs), _measured(others), strict=False)
    return interval([loss(one) - loss(other) for one, other in pairs])


def results_of(found: Found) -> Json:
    """The numbers of the page, by text."""
    return {name: _results(runs) for name, runs in found.items()}


def _results(runs: Mapping[str, Sequence[Json]]) -> Json:
    whole = lambda measured: measured["loss"]
    models = {
        kind: {
            "seeds": len(each),
            "parameters": each[0]["parameters"],
            "loss": interval([m["loss"] for m in _measured(each)]),
            "perplexity": interval([float(np.exp(m["loss"])) for m in _measured(each)]),
            "against_none": _against(each, runs["no attention"], whole),
            "against_previous": _against(each, runs["previous state"], whole),
        }
        for kind, each in runs.items()
    }
    sums = np.array(runs["attention"][0]["measured"]["sums"])
    distances = {
        group: [
            {
                "distance": distance,
                "share": float(
                    sums[[KINDS.index(k) for k in kinds], i, 1].sum()
                    / sums[..., 1].sum()
                ),
                **{
                    kind: interval([_loss(m, kinds, i) for m in _measured(each)])
                    for kind, each in runs.items()
                },
                **{
                    f"against {other}": _against(
                        runs["attention"],
                        runs[other],
                        lambda m, kinds=kinds, i=i: _loss(m, kinds, i),
                    )
                    for other in OTHERS
                },
            }
            for i, distance in enumerate(DISTANCES)
        ]
        for group, kinds in GROUPS.items()
    }
    looks = [m["looks"] for m in _measured(runs["attention"])]

    def shares(*path: str) -> Json:
        """Share of the weights over seeds, and that of equal weights."""
        pairs = [functools.reduce(operator.getitem, path, each) for each in looks]
        return {"share": interval([p[0] for p in pairs]), "equal": pairs[0][1]}

    return {
        "models": models,
        "distances": distances,
        "looks": {
            part: {name: shares(part, name) for name in looks[0][part]}
            for part in ("kinds", "back", "same")
        },
        "repeated": {
            name: {what: shares("repeated", name, what) for what in ("word", "before")}
            for name in looks[0]["repeated"]
        },
    }


def models_table(results: Json) -> str:
    return table(
        ["text", "model", "seeds", "parameters", "test loss", "perplexity",
         "minus no attention", "minus previous state"],
        [
            [
                name,
                kind,
                row["seeds"],
                row["parameters"],
                shown(row["loss"]),
                shown(row["perplexity"], 1),
                "-" if kind == "no attention" else shown(row["against_none"]),
                "-" if kind == "previous state" else shown(row["against_previous"]),
            ]
            for name, found in results.items()
            for kind, row in found["models"].items()
        ],
    )  # fmt: skip


def distance_table(results: Json, group: str) -> str:
    perplexity = lambda loss: float(np.exp(loss[0]))
    return table(
        ["text", "last stood ... back", "share of all tokens",
         "perplexity without attention", "of previous state", "with attention",
         "loss minus no attention", "loss minus previous state"],
        [
            [
                name,
                row["distance"],
                f"{row['share']:.1%}",
                *(perplexity(row[kind]) for kind in (*OTHERS, "attention")),
                *(shown(row[f"against {other}"]) for other in OTHERS),
            ]
            for name, found in results.items()
            for row in found["distances"][group]
        ],
    )  # fmt: skip


def _beside(look: Json) -> list[str]:
    mean, half = look["share"]
    share = shown((100 * mean, None if half is None else 100 * half), 1)
    return [share, f"{100 * look['equal']:.1f}", f"{_ratio(look):.2f}"]


def _ratio(look: Json) -> float:
    return look["share"][0] / max(look["equal"], 1e-9)


def looks_table(results: Json, title: str, *parts: str) -> str:
    return table(
        ["text", title, "weight, %", "equal weights, %", "ratio"],
        [
            [name, label, *_beside(look)]
            for name, found in results.items()
            for part in parts
            for label, look in found["looks"][part].items()
        ],
    )


def repeated_table(results: Json) -> str:
    return table(
        ["text", "last stood ... back", "weight on it, %", "equal weights, %", "ratio",
         "weight on the state before it, %", "equal weights, %", "ratio"],
        [
            [name, distance, *_beside(looks["word"]), *_beside(looks["before"])]
            for name, found in results.items()
            for distance, looks in found["repeated"].items()
        ],
    )  # fmt: skip


def _texts_of(sentence: Sentence, found: Found) -> list[str]:
    """The texts whose models the page shows with a sentence: its own, or all."""
    return [sentence.text] if sentence.text else list(found)


def _best(entry: Json) -> str:
    return " · ".join(f"{word} {100 * p:.0f}" for word, p in entry["best"])


def sentences_table(found: Found, sentences: Sequence[Sentence]) -> str:
    rows = []
    for i, sentence in enumerate(sentences):
        for name in _texts_of(sentence, found):
            own, other = (
                found[name][kind][0]["measured"]["sentences"][i]
                for kind in ("attention", "no attention")
            )
            rows.append([
                name,
                f"{' '.join(sentence.words)} ...",
                sentence.next or "-",
                *(
                    "-" if e["next"] is None else f"{100 * e['next']:.2f}"
                    for e in (own, other)
                ),
                _best(own),
            ])
    return table(
        ["text", "beginning", "next word", "its probability, %", "without attention, %",
         "most probable words with attention, %"],
        rows,
    )  # fmt: skip


def _shown_words(sentence: Sentence, text: Text) -> list[str]:
    """What a model reads, with words in brackets that it does not know."""
    return [w if w in text.words else f"[{w}]" for w in ("¶", *sentence.words)]


def _weights(sentence: Sentence, text: Text, entry: Json) -> str:
    """The weights of the last step, as text."""
    pairs = zip(_shown_words(sentence, text), entry["weights"][-1], strict=False)
    return ", ".join(f"{word} {100 * weight:.0f} %" for word, weight in pairs)


def weights_picture(
    found: Found, texts: Mapping[str, Text], sentences: Sequence[Sentence]
) -> Any:
    """A row for each beginning, its words shaded by the weights of the last step."""
    rows = [
        (name, sentence, found[name]["attention"][0]["measured"]["sentences"][i])
        for i, sentence in enumerate(sentences)
        for name in _texts_of(sentence, found)
    ]
    figure, axis = plt.subplots(
        figsize=(13, 0.34 * len(rows) + 0.7), layout="constrained"
    )
    room = 0.0
    for y, (name, sentence, entry) in enumerate(rows):
        words = _shown_words(sentence, texts[name])
        right = 0.0
        weights = [*entry["weights"][-1], None]
        for word, weight in zip(reversed(words), reversed(weights), strict=True):
            width = len(word) + 1.2
            shade = 0 if weight is None else weight
            axis.barh(
                y,
                width,
                0.84,
                right - width,
                color=str(1 - 0.85 * shade),
                edgecolor="black" if weight is None else "0.85",
                linewidth=0.8,
                # The frame is above the borders of its neighbours.
                zorder=1 if weight is not None else 2,
            )
            axis.text(
                right - width / 2,
                y,
                word,
                ha="center",
                va="center",
                fontsize=7,
                zorder=3,
                color="white" if shade > 0.5 else "black",
            )
            right -= width
        room = max(room, -right)
        axis.text(1, y, _best(entry), va="center", fontsize=7)
    for y, (name, *_) in enumerate(rows):
        axis.text(-room - 1, y, name, ha="right", va="center", fontsize=7)
    axis.set(xlim=(-room - 10, 52), ylim=(len(rows) - 0.4, -0.6))
    axis.axis("off")
    return figure


def _differences_picture(results: Json, other: str) -> Any:
    """Differences of content words from another model, a panel for each text."""
    figure = dots({
        f"{name}: minus {other}": {
            row["distance"]: row[f"against {other}"]
            for row in found["distances"]["content words"]
        }
        for name, found in results.items()
    })
    for axis in figure.axes:
        axis.axvline(0, color="0.5", linewidth=1, zorder=0)
        axis.set_xlabel("nats")
    return figure


def page(
    texts: Mapping[str, Text],
    found: Found,
    sentences: Sequence[Sentence],
    budget: Json,
) -> Page:
    """The page of the study.

    Args:
        texts: the texts by name.
        found: summaries of the runs.
        sentences: the beginnings of sentences.
        budget: the budget of the runs, and their learning rate.
    """
    results = results_of(found)
    read = {
        name: runs["attention"][0]["measured"]["sentences"]
        for name, runs in found.items()
    }
    by_distance = {
        name: {
            kind: [
                (x, row[kind][0])
                for x, row in zip(MIDDLES, one["distances"]["content words"],
                                  strict=False)
            ]
            for kind in one["models"]
        }
        for name, one in results.items()
    }  # fmt: skip
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "says": {name: _says(one) for name, one in results.items()},
            "models": models_table(results),
            "all_tokens": distance_table(results, "all tokens"),
            "content": distance_table(results, "content words"),
            "kinds": looks_table(results, "words", "kinds", "same"),
            "back": looks_table(results, "steps back", "back"),
            "repeated": repeated_table(results),
            "sentences": sentences_table(found, sentences),
            "sentence": "; ".join(
                f"{name}: {_weights(sentences[0], texts[name], entries[0])}"
                for name, entries in read.items()
            ),
            "drawn": len(sentences) - 1,
            "budget": budget,
            "tokens": budget["steps"] * budget["rows"] * budget["length"],
            "texts": "; ".join(_describe(n, texts[n]) for n in ("addresses", "verses")),
            "cost": cost_of(
                s for runs in found.values() for each in runs.values() for s in each
            ),
        },
        charts={
            "distance": lines(by_distance, "words back", log="x"),
            "against-none": _differences_picture(results, "no attention"),
            "against-previous": _differences_picture(results, "previous state"),
            "weights": weights_picture(found, texts, sentences),
        },
        results={
            **results,
            "counts": {name: text.counts for name, text in texts.items()},
            "sentences": {
                name: [{**e, "weights": e["weights"][-1]} for e in entries]
                for name, entries in read.items()
            },
        },
    )


def _says(results: Json) -> Json:
    """The numbers of one text that the answer names."""
    models, looks = results["models"], results["looks"]
    rows = results["distances"]["content words"]
    share = lambda look: 100 * look["share"][0]
    return {
        "with": shown(models["attention"]["perplexity"], 1),
        "without": shown(models["no attention"]["perplexity"], 1),
        "against_none": shown(models["attention"]["against_none"]),
        "against_previous": shown(models["attention"]["against_previous"]),
        "previous": shown(models["previous state"]["against_none"]),
        "by_distance": ", ".join(
            f"{row['distance']}: {shown(row['against previous state'])}" for row in rows
        ),
        **{
            kind: f"{share(looks['kinds'][kind]):.0f} % are on {kind} words "
            f"({_ratio(looks['kinds'][kind]):.2f} times what equal weights give them)"
            for kind in ("content", "function")
        },
        "same": share(looks["same"]["as the last one"]),
        "same_equal": 100 * looks["same"]["as the last one"]["equal"],
        "near": share(looks["back"]["1"]) + share(looks["back"]["2-8"]),
        "near_equal": 100 * sum(looks["back"][n]["equal"] for n in ("1", "2-8")),
        "repeated": f"{_ratio(results['repeated']['9-32']['word']):.2f}",
        "before": f"{_ratio(results['repeated']['9-32']['before']):.2f}",
    }


def _describe(name: str, text: Text) -> str:
    tokens, documents = text.counts["tokens"], text.counts["documents"]
    return (
        f"{name}: {tokens['train']:,} tokens of {documents['train']} documents for "
        f"training, {tokens['test']:,} of {documents['test']} for the test, "
        f"{text.counts['unknown']:.1%} of which are unknown"
    )
