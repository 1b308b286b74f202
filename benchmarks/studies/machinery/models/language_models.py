"""Language models that read long contexts through sparse patterns."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnlab import masks, nn
from attnlab.masks import Mask
from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data.addresses import Addresses
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.machinery.record import Json


class Sizes(NamedTuple):
    """Of a model.

    Attributes:
        features: of the residual stream.
        heads: N.
        layers: blocks.
    """

    features: int = 128
    heads: int = 4
    layers: int = 4


class Budget(NamedTuple):
    """What every run of a comparison gets.

    Attributes:
        steps: updates.
        length: T.
        rows: contexts in a batch.
        pieces: of the vocabulary.
        limit: documents read; None: all.
        test: documents held out to report.
        dev: documents held out to choose by.
        sizes: of the model.
    """

    steps: int
    length: int
    rows: int
    pieces: int = 2000
    limit: int | None = None
    test: int = 16
    dev: int = 10
    sizes: Sizes = Sizes()

    def config(self) -> Json:
        """For that of a run."""
        return self._asdict() | {"sizes": self.sizes._asdict()}

    def read(self, context: Context) -> Addresses:
        """The documents."""
        return context.addresses(
            pieces=self.pieces, test=self.test, dev=self.dev, limit=self.limit
        )


#: ``pattern(unit, rng)``: a mask of one layer. A unit is a 64th of the context; all of
#: them show about six units to a query on average, but for the full one.
PATTERNS: dict[str, Callable[[int, Any], Mask]] = {
    "full": lambda u, rng: masks.full(),
    "window": lambda u, rng: _window(3 * u),
    "anchor": lambda u, rng: masks.anchor(3 * u),
    "random": lambda u, rng: _random(6, u, rng),
    "window+random": lambda u, rng: _window(3 * u // 2) | _random(3, u, rng),
    "window+anchor": lambda u, rng: _window(3 * u // 2) | masks.anchor(3 * u // 2),
    "anchor+random": lambda u, rng: masks.anchor(3 * u // 2) | _random(3, u, rng),
    "all three": lambda u, rng: masks.big_bird(
        window=u, anchors=u, random_blocks=2, rng=rng, block_size=u
    ),
    "dilated": lambda u, rng: masks.dilated_window(12 * u, 12 * u, 4),
}
#: "window+anchor", but anchors project as Longformer's do: with weights of their own.
OWN = "own projections"
UNITS = 64


def anchors_of_own(length: int) -> int:
    """How many anchors "window+anchor" has: Longformer's project them apart."""
    return 3 * (length // UNITS) // 2


def _window(size: int) -> Mask:
    return masks.sliding_window(size, size)


def _random(count: int, unit: int, rng: Any) -> Mask:
    return masks.random_blocks(rng, count, unit, UNITS)


def layer_masks(
    name: str, length: int, layers: int, causal: bool, seed: int = 0
) -> list[Mask]:
    """The masks of a model's layers; random ones are drawn for each layer.

    Args:
        name: one of :data:`PATTERNS`.
        length: T, a multiple of 64.
        layers: how many.
        causal: whether later positions are hidden, too.
        seed: of random blocks.
    """
    keys = jax.random.split(jax.random.key(seed), layers)
    drawn = [PATTERNS[name](length // UNITS, key) for key in keys]
    return [masks.causal() & mask for mask in drawn] if causal else drawn


def language_model(
    vocabulary_size: int,
    sizes: Sizes,
    mask: Sequence[Mask],
    *,
    causal: bool,
    own_projections: int = 0,
    last_norm: bool = False,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Module:
    """A pre-norm Transformer with rotary positions, if ``options`` say nothing else.

    Args:
        vocabulary_size: V.
        sizes: of the model.
        mask: of each layer.
        causal: whether it says what follows, or what is hidden.
        own_projections: anchors that have projections of their own (Longformer).
        last_norm: whether logits are made of normalised features where the residuals'
            kind does not imply it.
        rngs: Flax's.
        **options: as of :func:`attnlab.nn.make_blocks`.
    """
    made: dict[str, Any] = {
        "features": sizes.features,
        "num_heads": sizes.heads,
        "num_layers": sizes.layers,
        "mask": list(mask),
        "position": nn.Rotary,
        "residual": nn.PreNorm,
        **options,
    }
    if own_projections:
        made["attention"] = functools.partial(_with_anchors, own_projections)
    kind = nn.Decoder if causal else nn.Encoder
    read = kind.standard(vocabulary_size, rngs=rngs, **made)
    if last_norm:
        norm = nnx.LayerNorm(sizes.features, rngs=rngs)
        read.stack = nn.Stack(read.stack.each(), norm=norm)
    return read if isinstance(read, nn.Decoder) else nn.MaskedLanguageModel(read)


def _with_anchors(
    count: int, features: int, heads: int, *, rngs: nnx.Rngs, **options: Any
) -> nn.MultiHeadAttention:
    own = nn.AnchorProjections(
        features, heads, features // heads, positions=count, rngs=rngs
    )
    return nn.AnchoredAttention(features, heads, anchors=own, rngs=rngs, **options)


def copy_parameters(source: nnx.Module, target: nnx.Module) -> None:
    """Those that both have; projections of anchors begin as the ordinary ones.

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1 (the initial values).
    """

    # Copies: what is trained is donated, each array once.
    def copied(module: nnx.Module) -> nnx.State:
        return jax.tree.map(jnp.copy, nnx.state(module, nnx.Param))

    nnx.update(target, copied(source))
    for _, module in nnx.iter_modules(target):
        if isinstance(module, nn.AnchoredAttention):
            for name in ("query", "key", "value"):
                own = getattr(module.anchors, name)
                nnx.update(own, copied(getattr(module, name)))


def losses_and_hits(model: Any, batch: Stretch) -> tuple[jax.Array, jax.Array]:
    """Of each label its cross-entropy, and whether it is the most probable.

    Returns:
        Two arrays ``[B, T]``, 0 where nothing is asked for.
    """
    logits = model(batch.tokens).astype(jnp.float32)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    hits = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
    return jnp.where(batch.counted, found, 0), jnp.where(batch.counted, hits, 0)


def loss(model: Any, batch: Stretch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Their sum, and how many are asked for."""
    return losses_and_hits(model, batch)[0].sum(), batch.counted.sum()
