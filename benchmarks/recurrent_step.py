"""How long does a training step of a recurrent translator take, compared with PyTorch?

A bidirectional GRU encodes French verses, a GRU with additive attention decodes English
translations. A step is forward, loss, backward, clipping and Adam. attnlab's is the
step of the studies, with the batch divided among processor cores; PyTorch's is the same
model with `nn.GRU`, `nn.GRUCell` and packed sequences. Both start from the same
weights, and only contenders whose losses agree are timed.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax
from flax import nnx

from attnlab import nn
from attnlab._src.bench.machine import cores
from attnlab._src.bench.timing import Repeats, interleave
from attnlab._src.files import cache_folder
from benchmarks.common import parser, write
from benchmarks.studies.machinery.data.batches import Batch, Batches
from benchmarks.studies.machinery.data.corpus import load_corpus
from benchmarks.studies.machinery.losses import forced
from benchmarks.studies.machinery.models.translators import logits
from benchmarks.studies.machinery.optimisers import Optimiser
from benchmarks.studies.machinery.parallel import ask_for_devices, make_mesh
from benchmarks.studies.machinery.step import Step
from benchmarks.training_step import ALLOWED, disagreement, show

RATE, SMOOTHING, CLIP = 3e-4, 0.1, 1.0


class Sizes(NamedTuple):
    """Sizes of the model and its batch."""

    batch: int = 64
    length: int = 48
    features: int = 256
    hidden_size: int = 256
    pieces: int = 4000


def make_model(sizes: Sizes, vocabulary: int) -> nn.RecurrentEncoderDecoder:
    return nn.RecurrentEncoderDecoder.bahdanau(
        vocabulary,
        features=sizes.features,
        hidden_size=sizes.hidden_size,
        rngs=nnx.Rngs(0),
    )


def attnlab_step(
    model: nn.RecurrentEncoderDecoder, batch: Batch, devices: int
) -> Callable[[], Any]:
    """Each call is one step and returns the loss before it."""
    transform = optax.chain(
        optax.clip_by_global_norm(CLIP), optax.adam(RATE, b2=0.98, eps=1e-9)
    )
    optimiser = Optimiser(transform, optax.constant_schedule(RATE), {})
    loss = forced(logits, SMOOTHING)
    step = Step(model, loss, optimiser, 0, make_mesh(devices))
    return lambda: step(batch, 0).loss


def torch_model(sizes: Sizes, source: nn.RecurrentEncoderDecoder) -> Any:
    """The same model as PyTorch users write it, with the same weights."""
    import torch
    from torch.nn.utils import rnn

    features, hidden = sizes.features, sizes.hidden_size
    both: Any = source.encoder.layers[0]
    own: Any = source.decoder
    vocabulary = own.readout.out.out_features

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = torch.nn.Linear
            self.source = torch.nn.Embedding(vocabulary, features)
            self.target = torch.nn.Embedding(vocabulary, features)
            self.encoder = torch.nn.GRU(
                features, hidden, batch_first=True, bidirectional=True
            )
            self.first = linear(hidden, hidden)
            self.query = linear(hidden, hidden)
            self.key = linear(2 * hidden, hidden, bias=False)
            self.weight = linear(hidden, 1, bias=False)
            self.cell = torch.nn.GRUCell(features + 2 * hidden, hidden)
            self.maxout = linear(3 * hidden + features, hidden)
            self.out = linear(hidden // 2, vocabulary)

        def forward(self, source: Any, lengths: Any, target: Any) -> Any:
            scale = features**0.5
            packed = rnn.pack_padded_sequence(
                self.source(source) * scale,
                lengths,
                batch_first=True,
                enforce_sorted=False,
            )
            states, last = self.encoder(packed)
            states, _ = rnn.pad_packed_sequence(
                states, batch_first=True, total_length=source.shape[1]
            )
            state = torch.tanh(self.first(last[1]))
            keys = self.key(states)
            hidden_keys = torch.arange(source.shape[1]) >= lengths[:, None]
            embedded = self.target(target) * scale
            outputs, contexts = [], []
            for step in range(target.shape[1]):
                mixed = torch.tanh(self.query(state)[:, None] + keys)
                score = self.weight(mixed)[..., 0]
                score = score.masked_fill(hidden_keys, -torch.inf)
                context = (torch.softmax(score, 1)[:, None] @ states)[:, 0]
                state = self.cell(torch.cat([embedded[:, step], context], 1), state)
                outputs.append(state)
                contexts.append(context)
            known = [torch.stack(outputs, 1), torch.stack(contexts, 1), embedded]
            one, other = self.maxout(torch.cat(known, -1)).chunk(2, -1)
            return self.out(torch.maximum(one, other))

    model = Model()

    def copy(target: Any, *arrays: Any) -> None:
        with torch.no_grad():
            parts = [np.array(a[...]) for a in arrays]
            joined = np.concatenate([x.reshape(-1, x.shape[-1]) for x in parts])
            target.copy_(torch.from_numpy(joined.T.reshape(target.shape)))

    def recurrent(target: Any, cell: Any, suffix: str, *more: Any) -> None:
        def part(name: str) -> Any:
            return getattr(target, f"{name}{suffix}")

        copy(part("weight_ih"), cell.input.kernel, *more)
        copy(part("weight_hh"), cell.recurrent)
        with torch.no_grad():
            part("bias_ih").copy_(torch.from_numpy(np.array(cell.input.bias)))
            part("bias_hh").zero_()
            part("bias_hh")[-hidden:] = torch.from_numpy(np.array(cell.bias[...]))

    def linear(target: Any, kernel: Any, bias: Any = None) -> None:
        copy(target.weight, kernel)
        if bias is not None:
            copy(target.bias, bias[...][None])

    with torch.no_grad():
        for target, embedding in (
            (model.source, source.encoder.embedding),
            (model.target, own.embedding),
        ):
            target.weight.copy_(torch.from_numpy(np.array(embedding.table.embedding)))
    recurrent(model.encoder, both.forward.cell, "_l0")
    recurrent(model.encoder, both.backward.cell, "_l0_reverse")
    recurrent(model.cell, own.cell, "", own.context.kernel)
    score = own.attention.score
    linear(model.first, own.first.kernel, own.first.bias)
    linear(model.query, score.query_weight, score.bias)
    linear(model.key, score.key_weight)
    copy(model.weight.weight, score.weight[...].T)
    linear(model.maxout, own.readout.hidden.kernel, own.readout.hidden.bias)
    linear(model.out, own.readout.out.kernel, own.readout.out.bias)
    return model


def torch_step(model: Any, batch: Batch) -> Callable[[], Any]:
    """See :func:`attnlab_step`."""
    import torch

    optimiser = torch.optim.Adam(
        model.parameters(), RATE, betas=(0.9, 0.98), eps=1e-9, fused=True
    )
    source, lengths, target, target_lengths = (
        torch.from_numpy(np.asarray(x, np.int64)) for x in batch
    )
    labels = target[:, 1:].clone()
    labels[torch.arange(labels.shape[1]) >= target_lengths[:, None] - 1] = -100

    def call() -> Any:
        optimiser.zero_grad()
        found = model(source, lengths, target[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            found.flatten(0, 1), labels.flatten(), label_smoothing=SMOOTHING
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        return loss.detach()

    return call


def make_batch(sizes: Sizes) -> tuple[Batch, int]:
    """A full batch of verses, and the size of their vocabulary."""
    corpus = load_corpus(None, cache_folder(), pieces=sizes.pieces)
    examples = corpus.encode(corpus.split.train)
    longest = [max(map(len, sides)) for sides in examples]
    some = [
        e
        for e, n in zip(examples, longest, strict=True)
        if 3 * sizes.length // 4 <= n + 1 <= sizes.length
    ]
    batches = Batches(some, tokens=sizes.batch * sizes.length, lengths=(sizes.length,))
    return batches.batch_at(0), corpus.vocabulary.size


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--repeats", type=int, default=9, help="timed steps of each, at least (9)"
    )
    given = options.parse_args()
    sizes = Sizes(batch=8, length=16, pieces=1000) if given.quick else Sizes()
    # Each device has the same share of the batch.
    devices = math.gcd(cores(), sizes.batch)
    ask_for_devices(devices)
    batch, vocabulary = make_batch(sizes)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {}
    for count in sorted({1, devices}):
        makers[f"attnlab, {count} device{'s' * (count > 1)}"] = functools.partial(
            attnlab_step, make_model(sizes, vocabulary), batch, count
        )
    rows: list[dict[str, Any]] = []
    if importlib.util.find_spec("torch") is None:
        reason = "PyTorch is not installed"
        rows.append({"contender": "torch", "status": "refused", "reason": reason})
    else:
        model = torch_model(sizes, make_model(sizes, vocabulary))
        makers["torch"] = functools.partial(torch_step, model, batch)
    steps: dict[str, Callable[[], Any]] = {}
    expected: list[float] | None = None
    for name, make in makers.items():
        print(f"{name}: compiling, {len(ALLOWED)} steps", flush=True)
        step = make()
        losses = [float(step()) for _ in ALLOWED]
        expected = expected or losses
        wrong = disagreement(losses, expected)
        status = "failed" if wrong else "ok"
        rows.append({
            "contender": name,
            "status": status,
            "reason": wrong or "",
            "losses": losses,
        })
        if not wrong:
            steps[name] = step
    least = 2 if given.quick else given.repeats
    timings = interleave(steps, Repeats(least, 10 * least, 10.0, 0.5), warm=True)
    for row in rows:
        if row["contender"] in timings:
            row["timing"] = timings[row["contender"]]._asdict()
    tokens = int((np.asarray(batch.target_lengths) - 1).sum())
    content = {"sizes": sizes._asdict(), "tokens": tokens, "rows": rows}
    show(content, tokens)
    write(given.out, "recurrent_step", content)


if __name__ == "__main__":
    main()
