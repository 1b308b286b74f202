"""How long does a training step of a Transformer take, compared with PyTorch?

A decoder-only Transformer on text, with bytes as tokens; every layer is causal with a
window of 256. A step is forward, loss, backward and AdamW, with `attnlab.nn` or with
PyTorch's scaled_dot_product_attention, which gets the window as a boolean mask. All
start from the same weights, and only contenders whose losses agree are timed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from attnlab import masks, nn
from attnlab._src.bench.cases import WINDOW, Spec, build
from attnlab._src.bench.contenders import Implementation
from attnlab._src.bench.packing import pack
from attnlab._src.bench.peers import PEERS
from attnlab._src.bench.text import load_documents
from attnlab._src.bench.timing import Repeats, interleave
from benchmarks.common import caption, parser, write
from benchmarks.problems import OURS

RATE, DECAY = 3e-4, 0.01
#: Relative differences of the losses that are allowed, by step. Before the first update
#: losses differ by rounding alone. Adam turns even a gradient that is only rounding
#: error into a step of full size, so later losses differ by more.
ALLOWED = (2e-6, 2e-5, 2e-5)


class Sizes(NamedTuple):
    """Sizes of the model and its batch."""

    batch: int = 1
    length: int = 2048
    layers: int = 4
    features: int = 256
    heads: int = 8
    vocabulary: int = 256


Step = Callable[[], Any]


def make_model(sizes: Sizes, implementation: str | None = None) -> nn.Decoder:
    return nn.Decoder.standard(
        sizes.vocabulary,
        features=sizes.features,
        num_heads=sizes.heads,
        num_layers=sizes.layers,
        mask=masks.sliding_window(WINDOW - 1, 0),
        residual=nn.PreNorm,
        attention=functools.partial(
            nn.MultiHeadAttention, implementation=implementation
        ),
        rngs=nnx.Rngs(0),
    )


def attnlab_step(sizes: Sizes, tokens: np.ndarray, implementation: str) -> Step:
    """Each call is one step and returns the loss before it."""
    structure, params, rest = nnx.split(
        make_model(sizes, implementation), nnx.Param, ...
    )
    optimiser = optax.adamw(RATE, weight_decay=DECAY)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rest: Any, tokens: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(structure, params, rest)(tokens[:, :-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            )
            return losses.mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    held = [params, optimiser.init(params)]
    given = jnp.asarray(tokens, jnp.int32)

    def call() -> jax.Array:
        *held[:], value = step(*held, rest, given)
        return value

    return call


def torch_model(sizes: Sizes) -> Any:
    """The same model as PyTorch users write it, with the same weights."""
    import torch
    from torch.nn import functional

    features, heads = sizes.features, sizes.heads

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.LayerNorm(features, eps=1e-6)
            self.qkv = torch.nn.Linear(features, 3 * features)
            self.out = torch.nn.Linear(features, features)
            self.second = torch.nn.LayerNorm(features, eps=1e-6)
            self.up = torch.nn.Linear(features, 4 * features)
            self.down = torch.nn.Linear(4 * features, features)

        def forward(self, x: Any, mask: Any) -> Any:
            parts = self.qkv(self.first(x)).chunk(3, -1)
            q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
            seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.out(seen.transpose(1, 2).flatten(-2))
            return x + self.down(functional.relu(self.up(self.second(x))))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(sizes.vocabulary, features)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(sizes.layers))
            self.norm = torch.nn.LayerNorm(features, eps=1e-6)
            positions = nn.sinusoids(jnp.arange(sizes.length), features)
            self.register_buffer("positions", torch.from_numpy(np.array(positions)))
            where = torch.arange(sizes.length)
            back = where[:, None] - where
            self.register_buffer("mask", (back >= 0) & (back < WINDOW))

        def forward(self, tokens: Any) -> Any:
            x = self.table(tokens) * features**0.5 + self.positions
            for layer in self.layers:
                x = layer(x, self.mask)
            return self.norm(x) @ self.table.weight.T

    model, source = Model(), make_model(sizes)

    def copy(target: Any, *arrays: Any) -> None:
        with torch.no_grad():
            joined = np.concatenate([np.array(a[...]) for a in arrays], -1)
            target.copy_(torch.from_numpy(joined))

    def norm(target: Any, own: Any) -> None:
        copy(target.weight, own.scale)
        copy(target.bias, own.bias)

    def linear(target: Any, *own: Any) -> None:
        size = target.in_features
        kernels = [o.kernel[...].reshape(size, -1) for o in own]
        copy(target.weight.T, *kernels)
        copy(target.bias, *(o.bias[...].reshape(-1) for o in own))

    copy(model.table.weight, source.embedding.table.embedding)
    for layer, block in zip(model.layers, source.stack.blocks, strict=True):
        attention, hidden = block.attention, block.feed_forward
        norm(layer.first, block.attention_residual.norm)
        linear(layer.qkv, attention.query, attention.key, attention.value)
        linear(layer.out, attention.out)
        norm(layer.second, block.feed_forward_residual.norm)
        linear(layer.up, hidden.up)
        linear(layer.down, hidden.down)
    norm(model.norm, source.stack.norm)
    return model


def torch_step(sizes: Sizes, tokens: np.ndarray, compiled: bool) -> Step:
    """See :func:`attnlab_step`."""
    import torch

    model = torch_model(sizes)
    optimiser = torch.optim.AdamW(
        model.parameters(), RATE, weight_decay=DECAY, fused=True
    )
    run = torch.compile(model, dynamic=False) if compiled else model
    given = torch.from_numpy(tokens.astype(np.int64))

    def call() -> Any:
        optimiser.zero_grad()
        logits = run(given[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, given[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        return loss.detach()

    return call


def parameter_counts(sizes: Sizes) -> tuple[int, int]:
    """Numbers of parameters of attnlab's model and of PyTorch's."""
    ours = jax.tree.leaves(nnx.state(make_model(sizes), nnx.Param))
    theirs = torch_model(sizes).parameters()
    return sum(x.size for x in ours), sum(p.numel() for p in theirs)


def disagreement(losses: list[float], expected: list[float]) -> str | None:
    """The first step whose loss differs by more than is allowed, in words, or None."""
    for step, (found, wanted, allowed) in enumerate(
        zip(losses, expected, ALLOWED, strict=True)
    ):
        if not abs(found - wanted) <= allowed * abs(wanted):
            return f"loss {found:.7g} instead of {wanted:.7g} after {step} updates"
    return None


def contenders(sizes: Sizes, documents: list[bytes]) -> dict[str, str | None]:
    """By name: why the contender is left out; None if it takes part."""
    head_size = sizes.features // sizes.heads
    spec = Spec("causal_window", length=sizes.length, head_size=head_size)
    case = build(spec, documents)
    refusals = {name: Implementation(name).refusal(case) for name in OURS}
    refusals["torch"] = PEERS["torch"].refusal(case)
    refusals["torch.compile"] = PEERS["flex"].refusal(case)
    return refusals


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--repeats", type=int, default=9, help="timed steps of each, at least (9)"
    )
    given = options.parse_args()
    sizes = Sizes(length=512, layers=2) if given.quick else Sizes()
    documents = load_documents()
    tokens = pack(documents, sizes.batch, sizes.length + 1).tokens
    rows: list[dict[str, Any]] = []
    steps: dict[str, Step] = {}
    expected: list[float] | None = None
    for name, refusal in contenders(sizes, documents).items():
        row: dict[str, Any] = {"contender": name, "status": "refused"}
        rows.append(row)
        if refusal:
            row["reason"] = refusal
            continue
        print(f"{name}: compiling, {len(ALLOWED)} steps", flush=True)
        if name.startswith("torch"):
            step = torch_step(sizes, tokens, name == "torch.compile")
        else:
            step = attnlab_step(sizes, tokens, name)
        row["losses"] = [float(step()) for _ in ALLOWED]
        expected = expected or row["losses"]
        wrong = disagreement(row["losses"], expected)
        row |= {"status": "failed" if wrong else "ok", "reason": wrong or ""}
        if not wrong:
            steps[name] = step
    least = 2 if given.quick else given.repeats
    timings = interleave(steps, Repeats(least, 10 * least, 10.0, 0.5), warm=True)
    for row in rows:
        if row["contender"] in timings:
            row["timing"] = timings[row["contender"]]._asdict()
    content: dict[str, Any] = {"sizes": sizes._asdict(), "rows": rows}
    if any(name.startswith("torch") for name in steps):
        ours, theirs = parameter_counts(sizes)
        if ours != theirs:
            raise SystemExit(f"{ours:,} parameters, but PyTorch's model has {theirs:,}")
        content["parameters"] = ours
    show(content, sizes.batch * sizes.length)
    write(given.out, "training_step", content)


def show(content: dict[str, Any], tokens: int) -> None:
    """Prints a table; ``tokens`` is the number of tokens of a step."""
    numbers = ", ".join(f"{name} {n}" for name, n in content["sizes"].items())
    made = Table(title=f"{numbers}\n{caption()}", title_justify="left")
    made.add_column("runs on")
    for name in ("ms a step [dim]20-80 %[/]", "tokens a second", "over ours"):
        made.add_column(name, justify="right")
    made.add_column("loss of the first steps, or why not")
    ours = None
    for row in content["rows"]:
        if "timing" not in row:
            made.add_row(row["contender"], row["status"], "", "", row["reason"])
            continue
        median, low, high, _ = row["timing"].values()
        ours = ours or median
        made.add_row(
            row["contender"],
            f"{1e3 * median:,.0f} [dim]{1e3 * low:,.0f}-{1e3 * high:,.0f}[/]",
            f"{tokens / median:,.0f}",
            f"{median / ours:.2f}",
            ", ".join(f"{loss:.6f}" for loss in row["losses"]),
        )
    Console(width=None if Console().is_terminal else 120).print(made)


if __name__ == "__main__":
    main()
