"""What does a training step of a very long sequence cost each chip of a TPU slice?

A decoder with a causal window of 4,096 and 64 anchors, in bfloat16, with AdamW. Its
sequence is sharded over all chips; each gets the keys that the plan of the mask names.
The TPU's own compiler, which needs no TPU (``pip install -e ".[tpu-aot]"``), tells the
memory of a chip and what chips send. Nothing is run.

Draws which keys devices need of each other under some masks, too; ``--slice`` without
names does only that.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from rich.console import Console
from rich.table import Table

from attnlab import masks, nn, sharding
from attnlab._src.bench.charts import plt, save
from attnlab._src.ops.sequence.needs import Lengths, needs_of
from attnlab.bench import collectives
from benchmarks.common import parser, write

MASK = masks.causal() & (masks.sliding_window(4095, 0) | masks.prefix(64))


#: What :func:`draw` shows, 8 devices with 128 tokens each.
DEVICES, TOKENS = 8, 128
DRAWN = {
    "causal window of 96": masks.causal() & masks.sliding_window(95, 0),
    "the same and 16 anchors": masks.causal()
    & (masks.sliding_window(95, 0) | masks.prefix(16)),
    "documents of 200 to 360 tokens": masks.documents(
        np.repeat(np.arange(4), [200, 300, 164, 360])
    ),
    "Longformer, 3 anchors": masks.longformer(window=64, anchors=[0, 1, 2]),
    "causal": masks.causal(),
}


class Sizes(NamedTuple):
    """Sizes of the model and its sequence."""

    length: int = 2**20
    layers: int = 2
    features: int = 1024
    heads: int = 8
    vocabulary: int = 256


#: Slices, by the name that the compiler takes.
SLICES = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v6e:16x16", "v5p:4x8x8")


def mesh_of(topology: str) -> Mesh:
    described: Any = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    )
    devices = np.array(described.devices)
    return Mesh(devices, ("sequence",), axis_types=(AxisType.Auto,))


def make_model(sizes: Sizes) -> nn.Decoder:
    rngs = nnx.Rngs(0)
    return nn.Decoder.standard(
        sizes.vocabulary,
        features=sizes.features,
        num_heads=sizes.heads,
        num_layers=sizes.layers,
        mask=MASK,
        embedding=nn.Embedding(
            sizes.vocabulary, sizes.features, dtype=jnp.bfloat16, rngs=rngs
        ),
        position=nn.Rotary,
        residual=nn.PreNorm,
        rngs=rngs,
    )


def study(topology: str, sizes: Sizes) -> dict[str, Any]:
    """Compiles the step for a slice, and reads what the compiler tells."""
    mesh = mesh_of(topology)
    structure, params, rest = nnx.split(
        nnx.eval_shape(lambda: make_model(sizes)), nnx.Param, ...
    )
    optimiser = optax.adamw(3e-4)

    def on(tree: Any, spec: Spec) -> Any:
        place = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
        )

    def step(params: Any, state: Any, rest: Any, tokens: Any, targets: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
            model = nnx.merge(structure, half, rest, copy=True)
            with sharding.use(mesh, sequence="sequence"):
                logits = model(tokens).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.eval_shape(optimiser.init, params)
    tokens = jax.ShapeDtypeStruct((1, sizes.length), jnp.int32)
    given = (
        *(on(x, Spec()) for x in (params, state, rest)),
        *[on(tokens, Spec(None, "sequence"))] * 2,
    )
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*given)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    text = str(compiled.as_text())
    sent = collectives(compiled)
    by_kind: dict[str, int] = {}
    for each in sent:
        received = round(each.received(mesh.size))
        by_kind[each.kind] = by_kind.get(each.kind, 0) + received
    return {
        "slice": topology,
        "chips": mesh.size,
        "seconds_to_compile": round(seconds, 1),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "received": by_kind,
        "operations": len(sent),
        "asynchronous": sum(each.is_async for each in sent),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "predicted": predicted(sizes, mesh),
    }


def predicted(sizes: Sizes, mesh: Mesh) -> dict[str, Any]:
    """What ``sharding.cost`` says of the attention of all layers, both passes."""
    shape = jax.ShapeDtypeStruct(
        (1, sizes.length, sizes.heads, sizes.features // sizes.heads), jnp.bfloat16
    )
    cost = sharding.cost(*[shape] * 3, mask=MASK, mesh=mesh, sequence="sequence")
    chosen = cost.strategies[str(cost.strategy)]
    both = chosen.bytes_forward + chosen.bytes_backward
    return {"strategy": cost.strategy, "received": sizes.layers * both}


def show(sizes: Sizes, rows: list[dict[str, Any]]) -> None:
    numbers = ", ".join(f"{name} {n:,}" for name, n in sizes._asdict().items())
    made = Table(title=numbers, title_justify="left")
    for name in (
        "slice", "chips", "tokens a chip", "MB arguments", "MB temporary",
        "MB permuted", "MB summed", "of them asynchronous", "s to compile",
    ):  # fmt: skip
        made.add_column(name, justify="right")
    for row in rows:
        sent = row["received"]
        made.add_row(
            row["slice"],
            f"{row['chips']}",
            f"{sizes.length // row['chips']:,}",
            f"{row['arguments'] / 1e6:,.0f}",
            f"{row['temporary'] / 1e6:,.0f}",
            f"{sent.get('collective-permute', 0) / 1e6:,.1f}",
            f"{sent.get('all-reduce', 0) / 1e6:,.1f}",
            f"{row['asynchronous']} of {row['operations']}",
            f"{row['seconds_to_compile']:.0f}",
        )
    Console(width=None if Console().is_terminal else 120).print(made)


def draw(folder: Path) -> Path:
    """A picture: rows are devices, columns are those whose keys they need."""
    figure, panels = plt.subplots(1, len(DRAWN), figsize=(13, 3.2))
    for panel, (name, mask) in zip(panels, DRAWN.items(), strict=True):
        total = DEVICES * TOKENS
        needs = needs_of(mask, Lengths(DEVICES, total, total), queries_move=True)
        keys = np.zeros((DEVICES, DEVICES), int)
        for owner in range(DEVICES):
            mine = needs.owners == owner
            keys[:, owner] = (needs.by[:, mine] * needs.sizes[mine]).sum(1)
        shown = np.where(np.eye(DEVICES) > 0, 2 * TOKENS, keys)  # its own: darkest
        panel.imshow(shown, cmap="Blues", vmin=0, vmax=2 * TOKENS)
        for (device, owner), count in np.ndenumerate(keys):
            if count and device != owner:
                panel.text(owner, device, f"{count}", ha="center", va="center", size=7)
        sent = keys.sum() - np.trace(keys)
        title = f"{name}\n{sent:,} keys are sent"
        if len(needs.wide):
            title += f", and {len(needs.wide)} queries"
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("keys of device", fontsize=8)
        panel.set_xticks(range(DEVICES))
        panel.set_yticks(range(DEVICES))
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("needed by device", fontsize=8)
    figure.tight_layout()
    (path,) = save(figure, folder, "devices", ("svg",))
    return path


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument(
        "--slice", nargs="*", default=SLICES, metavar="NAME", help="slices of TPUs"
    )
    given = options.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles, and finds no TPU
    print(draw(given.out))
    sizes, slices = Sizes(), given.slice
    if given.quick:
        sizes, slices = Sizes(2**14, 1, 256, 2), ("v5e:2x2",)
    rows: list[dict[str, Any]] = []
    for topology in slices:
        print(f"{topology}: compiling", flush=True)
        rows.append(study(topology, sizes))
        write(
            given.out,
            "devices",
            {"sizes": sizes._asdict(), "rows": rows},
            quiet=topology != slices[-1],
        )
    if rows:
        show(sizes, rows)


if __name__ == "__main__":
    main()
