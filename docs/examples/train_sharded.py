"""Trains a decoder on one device, several devices, or several processes, by flags.

    python train_sharded.py --data 2 --sequence 4         # eight devices
    python train_sharded.py --sequence 4 --processes 2 --process 0   # on one host ...
    python train_sharded.py --sequence 4 --processes 2 --process 1   # ... on another

With ``--folder`` (that all processes see) it saves a checkpoint every few steps, and
continues from the last one, on whatever mesh it runs then: the losses are the same.
If a process dies, the others end with an error within ``--patience`` seconds; start
again with the devices that are left.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnlab import masks, nn, sharding

TEXT = Path(__file__).read_bytes()
BATCH, LENGTH = 4, 256
OPTIMISER = optax.adamw(3e-3)


def make_model() -> nn.Decoder:
    seen = masks.sliding_window(31, 0) | masks.prefix(4)
    return nn.Decoder.standard(
        256,
        features=32,
        num_heads=4,
        num_layers=2,
        mask=masks.causal() & seen,
        position=nn.Rotary,
        residual=nn.PreNorm,
        rngs=nnx.Rngs(0),
    )


def batch(step: int, place: NamedSharding) -> jax.Array:
    """Pieces of the text, ``[BATCH, LENGTH + 1]``; they depend on the step alone."""
    starts = np.random.default_rng(step).integers(0, len(TEXT) - LENGTH - 1, BATCH)
    pieces = np.frombuffer(TEXT, np.uint8)[starts[:, None] + np.arange(LENGTH + 1)]
    pieces = pieces.astype(np.int32)
    return jax.make_array_from_callback(pieces.shape, place, lambda at: pieces[at])


def make_step(structure: Any, rest: Any, mesh: Mesh) -> Any:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(structure, params, rest, copy=True)
            with sharding.use(mesh, batch="data", sequence="sequence"):
                logits = model(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            ).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = OPTIMISER.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def train(given: argparse.Namespace) -> None:
    automatic = (AxisType.Auto,) * 2
    axes = (given.data, given.sequence), ("data", "sequence")
    mesh = jax.make_mesh(*axes, axis_types=automatic)
    # Tokens are sharded by examples; shards of the sequence follow in the model.
    rows = NamedSharding(mesh, PartitionSpec("data"))
    structure, params, rest = nnx.split(make_model(), nnx.Param, ...)
    first, state = 0, OPTIMISER.init(params)
    whole = NamedSharding(mesh, PartitionSpec())
    params, state = jax.device_put((params, state), whole)
    rest = jax.tree.map(np.asarray, rest)
    saved = None
    if given.folder is not None:
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=given.every, enable_async_checkpointing=False
        )
        saved = ocp.CheckpointManager(given.folder.absolute(), options=options)
        if (last := saved.latest_step()) is not None:
            like = ocp.args.StandardRestore((params, state))
            params, state = saved.restore(last, args=like)
            first = last + 1
    step = make_step(structure, rest, mesh)
    for number in range(first, given.steps):
        params, state, loss = step(params, state, batch(number, rows))
        if jax.process_index() == 0:
            print(f"step {number}: {float(loss):.5f} nats", flush=True)
        if saved is not None:
            saved.save(number, args=ocp.args.StandardSave((params, state)))


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--data", type=int, default=1, help="shards of the batch")
    options.add_argument("--sequence", type=int, default=1, help="of the sequence")
    options.add_argument("--folder", type=Path, help="of checkpoints")
    options.add_argument("--every", type=int, default=5, help="steps a checkpoint")
    options.add_argument("--processes", type=int, default=1)
    options.add_argument("--process", type=int, default=0, help="number of this one")
    options.add_argument("--coordinator", default="127.0.0.1:9911", help="process 0")
    options.add_argument("--patience", type=int, default=30, help="seconds")
    given = options.parse_args(arguments)
    if given.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            given.coordinator,
            given.processes,
            given.process,
            heartbeat_timeout_seconds=given.patience,
        )
    train(given)


if __name__ == "__main__":
    main()
