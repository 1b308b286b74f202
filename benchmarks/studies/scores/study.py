"""Which function should compare decoder and encoder, and how large should it be?"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import Score, nn, scores
from attnlab._src.nn.parameters import as_arrays, as_params
from attnlab._src.types import pytree, static
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.batches import Batch
from benchmarks.studies.machinery.models.scoring import Score as Quality
from benchmarks.studies.machinery.models.scoring import score
from benchmarks.studies.machinery.models.translation_runs import Budget, Task, counts_of
from benchmarks.studies.machinery.models.translators import Sizes
from benchmarks.studies.machinery.page import Page, cost_of, lines, table
from benchmarks.studies.machinery.parallel import over_batch
from benchmarks.studies.machinery.record import Json, gradient_norm
from benchmarks.studies.machinery.training import Run

#: A run takes five to sixteen minutes of one core.
BUDGET = Budget(steps=2000, tokens=2048, evaluate_every=250)
SIZES = Sizes(features=128, hidden_size=128, dropout_rate=0.0)
#: Learning rates. The study `translate` chose the higher one for similar decoders.
#: Every score at every size is trained at both, and the better run counts.
RATES = (2e-3, 4e-3)
#: Sizes of the space in which decoder and encoder states are compared.
ATTENTION_SIZES = (64, 256, 1024)
#: Units of the second hidden layer of the perceptron.
SECOND = 32
#: Logits are computed back from weights. So that no weight is rounded to 0, logits are
#: first divided by the first of these numbers that suffices; a larger one would round
#: small logits.
HEATS = (64.0, 8192.0)

Make = Callable[[Any, int, int, int], Any]

#: By name: ``make(rng, query features, key features, attention size)``, which makes a
#: score, and whether query and key are projected to the attention size before it.
#: "general" has no attention size.
SCORES: dict[str, tuple[Make, bool]] = {
    "dot": (lambda rng, q, k, a: scores.dot(), True),
    "scaled dot": (lambda rng, q, k, a: scores.scaled_dot(), True),
    "general": (lambda rng, q, k, a: scores.bilinear.init(rng, q, k), False),
    "concat": (
        lambda rng, q, k, a: scores.concat.init(rng, q, k, hidden_size=a),
        False,
    ),
    "additive": (
        lambda rng, q, k, a: scores.additive.init(rng, q, k, hidden_size=a),
        False,
    ),
    "mlp": (
        lambda rng, q, k, a: scores.mlp.init(
            rng, q, k, hidden_sizes=(a, SECOND), activation=jnp.tanh
        ),
        False,
    ),
}


def alignment(name: str, attention_size: int, sizes: Sizes, rngs: nnx.Rngs) -> Any:
    """The attention of a decoder whose encoder is bidirectional."""
    make, projected = SCORES[name]
    query, key = sizes.hidden_size, 2 * sizes.hidden_size
    made = make(rngs.params(), query, key, attention_size)
    if not projected:
        return nn.Alignment(made)
    return nn.Alignment.projected(query, key, attention_size, score=made, rngs=rngs)


def model_maker(name: str, attention_size: int) -> Callable[..., Any]:
    """Makers of Luong's decoder without input feeding: all steps attend at once."""

    def make(vocabulary: int, sizes: Sizes, rngs: nnx.Rngs) -> Any:
        return nn.RecurrentEncoderDecoder.luong(
            vocabulary,
            features=sizes.features,
            hidden_size=sizes.hidden_size,
            attention=alignment(name, attention_size, sizes, rngs),
            bidirectional=True,
            cell=nn.GRU,
            rngs=rngs,
        )

    return make


@pytree
class Heated(Score):
    """A score divided by a number."""

    score: Score
    heat: float = static()

    def project_query(self, query: jax.Array) -> jax.Array:
        query = self.score.project_query(query)
        return query / self.heat if self.is_inner_product else query

    def project_key(self, key: jax.Array) -> jax.Array:
        return self.score.project_key(key)

    def pair_params(self) -> Any:
        return self.score.pair_params()

    def compare(self, params: Any, query: jax.Array, key: jax.Array) -> jax.Array:
        return self.score.compare(params, query, key) / self.heat

    @property
    def is_inner_product(self) -> bool:
        return self.score.is_inner_product


def heated(model: Any, heat: float) -> Any:
    """A copy of the model whose attention logits are divided by ``heat``."""
    model = nnx.clone(model)
    attention = model.decoder.attention
    attention.score = nnx.data(as_params(Heated(as_arrays(attention.score), heat)))
    return model


def shape_of(model: Any, batch: Batch) -> jax.Array:
    """How sharp attention is: three sums over the target tokens of a row, ``[B, 3]``.

    The standard deviation of the logits over the source, the entropy of the weights
    over that of equal weights, and 1, so that the last is the number of tokens.
    """

    def weights_of(model: Any) -> jax.Array:
        return model.with_weights(
            batch.source, batch.target[:, :-1], source_lengths=batch.source_lengths
        )[1]

    weights = weights_of(model)
    length = batch.source_lengths[:, None]
    places = jnp.arange(weights.shape[-1], dtype=jnp.int32)[None]
    seen = (places < length)[:, None]
    spread = jnp.full(weights.shape[:-1], -jnp.inf)
    for heat in HEATS:
        flat = jnp.where(seen, weights_of(heated(model, heat)), 1)
        # The logits less a constant for each row; -inf if a weight is 0.
        logits = heat * jnp.log(flat)
        found = jnp.where(flat.min(-1) > 0, logits.std(-1, where=seen), -jnp.inf)
        spread = jnp.where(jnp.isfinite(spread), spread, found)
    entropy = jax.scipy.special.entr(weights).sum(-1) / jnp.log(jnp.maximum(length, 2))
    real = jnp.arange(spread.shape[1])[None] < batch.target_lengths[:, None] - 1
    return jnp.stack(
        [*(jnp.where(real, x, 0).sum(-1) for x in (spread, entropy)), real.sum(-1)], -1
    )


def sharpness(task: Task, model: Any) -> tuple[float, float]:
    """Means over target tokens: deviation of logits, relative entropy of weights."""
    run = over_batch(shape_of, task.context.mesh)
    batches = task.dev[:: max(len(task.dev) // 8, 1)]
    rows = np.concatenate([np.asarray(run(model, b), np.float64) for b in batches])
    spread, entropy, count = rows.sum(0)
    return float(spread / count), float(entropy / count)


def run_of(task: Task, name: str, size: int, rate: float) -> Run:
    """The training run of a score of one size, at one learning rate."""
    folder = f"{name.replace(' ', '-')}/{size}/rate-{rate:g}"

    def measure(model: Any, log: list[Json]) -> Json:
        references = [p.target for p in task.corpus.split.test]
        bleu = score(task.translate(model), references)["bleu"]
        return {
            "bleu": bleu._asdict(),
            "sharpness": sharpness(task, model),
            "gradient_norm": [gradient_norm(log, s) for s in (0.1, -0.1)],
        }

    run = task.run(folder, model_maker(name, size), rate)
    return dataclasses.replace(run, measure=measure)


def study(context: Context) -> Page | None:
    """Trains each score at each size and rate, one run each, and compares them."""
    task = Task(context, BUDGET, SIZES)
    rates = RATES[-1:] if context.quick else RATES
    attention_sizes = (16,) if context.quick else ATTENTION_SIZES
    states = 2 * task.sizes.hidden_size
    each = [
        (name, size)
        for name in SCORES
        for size in ((states,) if name == "general" else attention_sizes)
    ]
    runs = {
        (name, size): [run_of(task, name, size, rate) for rate in rates]
        for name, size in each
    }
    found = context.train_all(run for at in runs.values() for run in at)
    if found is None:
        return None
    step_seconds = context.step_seconds(at[0] for at in runs.values())
    rows, results = [], []
    for ((name, size), at), seconds in zip(
        runs.items(), step_seconds.values(), strict=True
    ):
        summary = min(
            (found[run.name].summary for run in at), key=lambda s: s["best"]["loss"]
        )
        make, sizes = model_maker(name, size), task.sizes
        new = make(task.corpus.vocabulary.size, sizes, nnx.Rngs(0))
        new.eval()
        before, measured = sharpness(task, new), summary["measured"]
        after = measured["sharpness"]
        own = new.decoder.attention
        price = scores.cost(
            as_arrays(own.score), size if SCORES[name][1] else sizes.hidden_size
        )
        result = {
            "score": name,
            "attention_size": size,
            "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(own))),
            "flops_per_pair": price.flops_per_pair,
            "milliseconds_per_step": 1e3 * seconds,
            "rate": summary["config"]["rate"],
            "dev_loss": summary["best"]["loss"],
            "bleu": measured["bleu"],
            "logit_deviation": [before[0], after[0]],
            "relative_entropy": [before[1], after[1]],
            "gradient_norm": measured["gradient_norm"],
        }
        results.append(result)
        rows.append([
            name,
            size,
            result["parameters"],
            price.flops_per_pair,
            result["milliseconds_per_step"],
            f"{result['rate']:g}",
            result["dev_loss"],
            str(Quality(**measured["bleu"])),
            " → ".join(f"{x:.2f}" for x in result["logit_deviation"]),
            " → ".join(f"{x:.2f}" for x in result["relative_entropy"]),
            " → ".join(f"{x:.2f}" for x in result["gradient_norm"]),
        ])

    def of(name: str, key: str, at: int | None = None) -> list[tuple[float, float]]:
        chosen = [r for r in results if r["score"] == name]
        return [
            (r["attention_size"], r[key] if at is None else r[key][at]) for r in chosen
        ]

    large = attention_sizes[-1]
    unscaled, scaled = (
        next(r for r in results if (r["score"], r["attention_size"]) == (n, large))
        for n in ("dot", "scaled dot")
    )
    ranked = sorted(results, key=lambda r: r["dev_loss"])
    header = (
        "score, size, parameters, FLOPs a pair, ms a step, rate, dev loss, BLEU, logit "
        "deviation, entropy, gradient norm"
    )
    return Page(
        Path(__file__).with_name("page.md"),
        {
            "first": ranked[0],
            "last": ranked[-1],
            "large": large,
            "unscaled": unscaled,
            "scaled": scaled,
            "rates": ", ".join(f"{r:g}" for r in rates),
            "tokens": next(iter(found.values())).summary["tokens"],
            "counts": counts_of(task),
            "cost": cost_of(t.summary for t in found.values()),
            "scores": table(header.split(", "), rows),
        },
        charts={
            "size": lines(
                {
                    "dev loss": {n: of(n, "dev_loss") for n in SCORES},
                    "logit deviation, untrained": {
                        n: of(n, "logit_deviation", 0) for n in SCORES
                    },
                    "gradient norm, first tenth": {
                        n: of(n, "gradient_norm", 0) for n in SCORES
                    },
                },
                "attention size",
                log="x",
            ),
        },
        results={
            "scores": results,
            "runs": {name: t.summary for name, t in found.items()},
        },
    )
