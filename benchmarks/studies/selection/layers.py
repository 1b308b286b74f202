"""The attention layers that are compared, and what they see."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab import nn
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.machinery.models.language_models import (
    UNITS,
    blocks_of,
    copy_parameters,
    losses_and_hits,
)
from benchmarks.studies.machinery.optimisers import adam
from benchmarks.studies.machinery.training import Run

#: Patterns that do not depend on the data.
FIXED = ("full", "window", "window+anchor", "random")
MIXTURE, NATIVE, INDEXED = "mixture of blocks", "native sparse", "indexed"
CHOSEN = (MIXTURE, NATIVE, INDEXED)
#: Layers whose weights tell what they choose.
TOLD = (nn.MixtureOfBlocks, nn.IndexedAttention)
#: The share of the steps in which an indexer learns from attention to all.
FIRST = 0.1
#: Of an indexer.
HEADS, SIZE = 4, 32


class Reach(NamedTuple):
    """Numbers of keys that make a query see about three units: 3/64 of the context.

    Attributes:
        block: keys in a block, half a unit.
        blocks: that a mixture of blocks sees, the own included: two and three quarter
            units on average.
        selected: blocks that native sparse attention selects, the own included.
        window: keys of its window; its compressed blocks are one unit on average.
        keys: that an indexer chooses.
    """

    block: int
    blocks: int
    selected: int
    window: int
    keys: int


def reach(length: int) -> Reach:
    """For contexts of some length."""
    unit = length // UNITS
    return Reach(max(unit // 2, 1), 6, 3, 3 * unit // 4, 3 * unit)


def layer(pattern: str, length: int, learn: Any = None) -> Callable[..., Any]:
    """A function that makes attention layers, for ``attention=``."""
    sizes = reach(length)
    if pattern == MIXTURE:
        return functools.partial(
            nn.MixtureOfBlocks, block_size=sizes.block, count=sizes.blocks
        )
    if pattern == INDEXED:
        return functools.partial(
            nn.IndexedAttention,
            count=sizes.keys,
            index_heads=HEADS,
            index_size=SIZE,
            learn=learn,
        )
    if pattern != NATIVE:
        return nn.MultiHeadAttention

    def make(features: int, heads: int, *, mask: Any, **options: Any) -> nnx.Module:
        made = nn.NativeSparseAttention(
            features,
            heads,
            block_size=sizes.block,
            count=sizes.selected,
            first=0,
            local=1,
            window=sizes.window,
            **options,
        )
        bias: Any = made.gates.bias
        # The gates of the three branches are a third each at first.
        bias[...] = jnp.full(bias.shape, -np.log(2), bias.dtype)
        return made

    return make


def seen_keys(pattern: str, length: int) -> np.ndarray:
    """``[T]``: how many keys each query sees in a layer that chooses."""
    sizes, at = reach(length), np.arange(length)
    own, before = at % sizes.block + 1, at // sizes.block
    if pattern == INDEXED:
        return np.minimum(at + 1, sizes.keys)
    if pattern == MIXTURE:
        return own + np.minimum(before, sizes.blocks - 1) * sizes.block
    chosen = own + np.minimum(before, sizes.selected - 1) * sizes.block
    return (at + 1) // sizes.block + chosen + np.minimum(at + 1, sizes.window)


def products_of_choosing(pattern: str, length: int, heads: int, size: int) -> float:
    """Products that choosing takes for a query, on average: numbers multiplied."""
    sizes = reach(length)
    if pattern == INDEXED:
        return (length + 1) / 2 * HEADS * SIZE
    return length / sizes.block / 2 * heads * size if pattern in CHOSEN else 0.0


def copy(source: nnx.Module, target: nnx.Module) -> None:
    """Copies parameters; branches of native sparse attention begin alike."""
    layers = [m for _, m in nnx.iter_modules(target) if isinstance(m, nn.Block)]
    if not any(isinstance(b.attention, nn.NativeSparseAttention) for b in layers):
        copy_parameters(source, target)
        return
    heads: Any = layers[0].attention.num_heads
    given = dict(nnx.to_flat_state(nnx.state(source, nnx.Param)))
    for path, variable in nnx.to_flat_state(nnx.state(target, nnx.Param)):
        if path not in given:
            continue
        value = given[path][...]
        if value.shape != variable.shape:  # keys or values: [..., heads, size]
            assert variable.shape[-2] == 3 * heads == 3 * value.shape[-2]
            value = jnp.concatenate([value] * 3, -2)
        variable[...] = jnp.copy(value)


def loss(model: Any, batch: Stretch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As of other language models, plus that of indexers, which learn."""
    capture: Any = nnx.capture(losses_and_hits, nn.IndexLoss)
    (losses, _), own = capture(model, batch)
    count = batch.counted.sum()
    # A batch's losses are sums: the mean over queries counts for each label.
    more = sum(jax.tree.leaves(own), jnp.float32(0)) * count.astype(jnp.float32)
    return losses.sum() + more, count


def with_first_part(
    context: Context,
    run: Run,
    rate: float,
    make_model: Callable[[], nnx.Module],
) -> Run:
    """A run of indexers, which learn from attention to all keys first.

    Args:
        context: of the study.
        run: the whole run; its indexers learn from the chosen keys.
        rate: the learning rate of both parts.
        make_model: makes the model of the first part, whose indexers learn from
            attention to all keys.

    Returns:
        The second part, which continues the first. Data are those of ``run``.

    References:
        DeepSeek-V3.2-Exp, 2025, section 2.1 ("dense warm-up", "sparse training").
    """
    first = max(round(FIRST * run.steps), 2)

    def part(steps: int, **changes: Any) -> Run:
        return dataclasses.replace(
            run,
            steps=steps,
            optimiser=adam(rate, steps=steps, warmup=max(steps // 10, 1)),
            evaluate_every=max(steps // 4, min(3, steps)),
            **changes,
        )

    before = part(
        first,
        name=f"{run.name}/first",
        config={**run.config, "learn": "all"},
        make_model=make_model,
        measure=None,
    )
    return part(
        run.steps - first,
        config={**run.config, "first": first},
        batch_at=lambda step: run.batch_at(step + first),
        begin=lambda model: copy(context.model(before), model),
    )


#: Distances that are told apart, in units of a 64th of the context.
BOUNDS = (1, 3, 8, 24)


class Selected(NamedTuple):
    """What the heads of a layer see, means over queries.

    Attributes:
        keys: share of keys at distances up to each of :data:`BOUNDS`, and beyond.
        weight: share of the weights likewise.
        alike: of two heads, keys that both see as a share of those that one sees.
    """

    keys: list[float]
    weight: list[float]
    alike: float


def selected(model: nn.Decoder, tokens: jax.Array) -> list[Selected]:
    """For each layer, on one text ``[1, T]``; the first quarter is left out."""
    blocks = blocks_of(model, tokens)
    return [_selected(passed.block.attention, passed.read) for passed in blocks]


def _selected(attention: Any, x: jax.Array) -> Selected:
    structure, state = nnx.split(attention)
    return Selected(*jax.device_get(_of_weights(structure, state, x)))


@functools.partial(jax.jit, static_argnums=0)
def _of_weights(structure: Any, state: Any, x: jax.Array) -> Any:
    weights = nnx.merge(structure, state).with_stats(x, top_k="all").weights[0]
    length = x.shape[1]
    weights = weights[:, length // 4 :]
    seen = (weights > 0).astype(jnp.float32)
    at = jnp.arange(length)
    distance = at[length // 4 :, None] - at[None]
    bounds = jnp.asarray([*(b * (length // UNITS) for b in BOUNDS), length])
    shares = []
    for of in (seen, weights.astype(jnp.float32)):
        by_distance = jnp.stack([
            jnp.where(distance < bound, of.sum(0), 0).sum() for bound in bounds
        ])
        shares.append(jnp.diff(by_distance, prepend=0) / of.sum())
    both = jnp.einsum("nts,mts->nm", seen, seen)
    each = jnp.diagonal(both)
    alike = both / (each[:, None] + each[None] - both)
    heads = len(each)
    pairs = max(heads * (heads - 1), 1)
    return *shares, (alike.sum() - jnp.trace(alike)) / pairs
