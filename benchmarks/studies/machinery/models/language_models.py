"""Language models that read long contexts through sparse patterns."""

import functools
from collections.abc import Callable, Iterator, Sequence
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
    """Sizes of a model.

    Attributes:
        features: size of the residual stream.
        heads: number of heads.
        layers: number of layers.
    """

    features: int = 128
    heads: int = 4
    layers: int = 4


class Budget(NamedTuple):
    """Data and training that all runs of a comparison share.

    Attributes:
        steps: number of updates.
        length: tokens in a context.
        rows: contexts in a batch.
        pieces: size of the vocabulary.
        limit: number of documents to read; None: all.
        test: number of documents held out for the test.
        dev: number of documents held out for choices, such as of the learning rate.
        sizes: sizes of the model.
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
        """As JSON, for the config of a run."""
        return self._asdict() | {"sizes": self.sizes._asdict()}

    def reads(self) -> str:
        """How many tokens a run is trained on, and the length of its contexts."""
        read = self.steps * self.rows * self.length
        return f"{read:,} subwords in contexts of {self.length:,}"

    def read(self, context: Context) -> Addresses:
        """Reads the documents."""
        return context.addresses(
            pieces=self.pieces, test=self.test, dev=self.dev, limit=self.limit
        )


#: By name: ``pattern(unit, rng)``, the mask of one layer. A unit is a 64th of the
#: context. Except for "full", a query sees about six units on average.
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
#: "window+anchor" with separate projections for the anchors, as in Longformer.
OWN = "own projections"
UNITS = 64


def anchors_of_own(length: int) -> int:
    """How many anchors "window+anchor" has, for their separate projections."""
    return 3 * (length // UNITS) // 2


def _window(size: int) -> Mask:
    return masks.sliding_window(size, size)


def _random(count: int, unit: int, rng: Any) -> Mask:
    return masks.random_blocks(rng, count, unit, UNITS)


def layer_masks(
    name: str, length: int, layers: int, causal: bool, seed: int = 0
) -> list[Mask]:
    """The masks of a model's layers; random blocks are drawn for each layer.

    Args:
        name: one of :data:`PATTERNS`.
        length: T, a multiple of 64.
        layers: number of layers.
        causal: whether to combine the masks with a causal one.
        seed: seed of the random blocks.
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
    """A pre-norm Transformer with rotary positions, unless ``options`` differ.

    Args:
        vocabulary_size: V.
        sizes: sizes of the model.
        mask: the mask of each layer.
        causal: True: the model predicts the next token; False: the hidden tokens.
        own_projections: number of anchors with separate projections (Longformer).
        last_norm: whether to normalise the features before the logits where the kind of
            residual does not imply it.
        rngs: Flax's.
        **options: options of :func:`attnlab.nn.make_blocks`.
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
    """Copies the parameters that both models have.

    Separate projections of anchors become copies of the ordinary ones.

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1 (the initial values).
    """

    # Copies, because a training step donates each array.
    def copied(module: nnx.Module) -> nnx.State:
        return jax.tree.map(jnp.copy, nnx.state(module, nnx.Param))

    nnx.update(target, copied(source))
    for _, module in nnx.iter_modules(target):
        if isinstance(module, nn.AnchoredAttention):
            for name in ("query", "key", "value"):
                own = getattr(module.anchors, name)
                nnx.update(own, copied(getattr(module, name)))


class Passed(NamedTuple):
    """A block of a model, and what passed through it, ``[B, T, features]``.

    Attributes:
        block: the block.
        before: what it was given.
        read: what its attention read of it.
        after: what it made.
    """

    block: nn.Block
    before: jax.Array
    read: jax.Array
    after: jax.Array


def blocks_of(model: Any, tokens: jax.Array) -> Iterator[Passed]:
    """Passes tokens ``[B, T]`` through an encoder or decoder, block by block."""
    x = model.embedding(tokens)
    for block in model.stack.each():
        read: list[jax.Array] = []

        def listen(y: jax.Array, read: list[jax.Array] = read) -> jax.Array:
            read.append(y)
            return jnp.zeros_like(y)

        block.attention_residual(x, listen)
        after = block(x)
        yield Passed(block, x, read[0], after)
        x = after


def losses_and_hits(model: Any, batch: Stretch) -> tuple[jax.Array, jax.Array]:
    """For each label its cross-entropy, and whether it is the most probable token.

    Returns:
        Two arrays ``[B, T]``, 0 where ``batch.counted`` is False.
    """
    logits = model(batch.tokens).astype(jnp.float32)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    hits = (logits.argmax(-1) == batch.labels).astype(jnp.float32)
    return jnp.where(batch.counted, found, 0), jnp.where(batch.counted, hits, 0)


def hits_of_rows(model: Any, batch: Stretch) -> jax.Array:
    """``[B, 2]``: for each row the numbers of right predictions and of labels."""
    _, hits = losses_and_hits(model, batch)
    return jnp.stack([hits.sum(1), batch.counted.sum(1)], 1)


def loss(model: Any, batch: Stretch, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross-entropies, and the number of labels."""
    return losses_and_hits(model, batch)[0].sum(), batch.counted.sum()
