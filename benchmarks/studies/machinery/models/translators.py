"""The translation models of the studies, by name, and how they are decoded.

``plain`` passes one vector from a recurrent encoder to a recurrent decoder (Cho et al.,
2014), ``additive`` is the same with attention (Bahdanau et al., 2015), ``transformer``
uses attention alone (Vaswani et al., 2017).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import masks, nn
from benchmarks.studies.machinery.data.batches import END, START, Batch


class Sizes(NamedTuple):
    """Sizes of a model.

    Attributes:
        features: size of embeddings, and of a Transformer's residual stream.
        hidden_size: size of recurrent cells in one direction.
        layers: number of layers of a Transformer's encoder, and of its decoder.
        heads: number of heads of a Transformer.
        dropout_rate: for source embeddings; in a Transformer also for target
            embeddings and for the outputs of sublayers.
    """

    features: int = 256
    hidden_size: int = 256
    layers: int = 3
    heads: int = 4
    dropout_rate: float = 0.1


def plain(vocabulary: int, sizes: Sizes, rngs: nnx.Rngs) -> nn.RecurrentEncoderDecoder:
    """A recurrent encoder-decoder without attention."""
    return nn.RecurrentEncoderDecoder.plain(
        vocabulary,
        features=sizes.features,
        hidden_size=sizes.hidden_size,
        bidirectional=True,
        dropout_rate=sizes.dropout_rate,
        rngs=rngs,
    )


def additive(
    vocabulary: int, sizes: Sizes, rngs: nnx.Rngs
) -> nn.RecurrentEncoderDecoder:
    """A recurrent encoder-decoder with additive attention."""
    return nn.RecurrentEncoderDecoder.bahdanau(
        vocabulary,
        features=sizes.features,
        hidden_size=sizes.hidden_size,
        dropout_rate=sizes.dropout_rate,
        rngs=rngs,
    )


def transformer(vocabulary: int, sizes: Sizes, rngs: nnx.Rngs) -> nn.EncoderDecoder:
    """A pre-norm Transformer; source and target share one embedding table."""
    return nn.EncoderDecoder.standard(
        vocabulary,
        features=sizes.features,
        num_heads=sizes.heads,
        num_layers=sizes.layers,
        residual=nn.PreNorm,
        dropout_rate=sizes.dropout_rate,
        rngs=rngs,
    )


#: ``make(vocabulary, sizes, rngs)`` by name.
TRANSLATORS: dict[str, Callable[[int, Sizes, nnx.Rngs], Any]] = {
    "plain": plain,
    "additive": additive,
    "transformer": transformer,
}


def logits(model: Any, batch: Batch) -> jax.Array:
    """Logits of the token after each target token, ``[B, T - 1, V]``."""
    source, lengths, target = map(
        jnp.asarray, (batch.source, batch.source_lengths, batch.target[:, :-1])
    )
    if isinstance(model, nn.EncoderDecoder):
        seen = masks.lengths(key=lengths)
        return model(source, target, source_mask=seen, memory_mask=seen)
    return model(source, target, source_lengths=lengths)


def _start(model: Any, source: jax.Array, lengths: jax.Array, most: int) -> tuple:
    """The step function of decoding, and the state before the first token.

    Args:
        model: one of ``TRANSLATORS``.
        source: ``[B, S]``.
        lengths: ``[B]``.
        most: the most target tokens.
    """
    if isinstance(model, nn.EncoderDecoder):
        seen = masks.lengths(key=lengths)
        memory = model.encoder(source, mask=seen)
        start = model.decoder.start(len(source), most, memory, memory_mask=seen)
        return model.decoder.decode, start
    return model.decode, model.start(source, source_lengths=lengths)


def _prompt(source: jax.Array) -> jax.Array:
    return jnp.full((len(source), 1), START)


def best_of_beams(model: Any, source: jax.Array, lengths: jax.Array) -> jax.Array:
    """Beam search, best of five hypotheses: ``[B, S] -> [B, 3 S / 2]``."""
    most = 3 * source.shape[1] // 2
    step, state = _start(model, source, lengths, most)
    return nn.beam_search(
        step,
        state,
        _prompt(source),
        beams=5,
        length=most,
        end=END,
        length_penalty=1.0,
    ).tokens[:, 0]


def greedy(model: Any, source: jax.Array, lengths: jax.Array) -> jax.Array:
    """Greedy decoding: ``[B, S] -> [B, S]``."""
    most = source.shape[1]
    step, state = _start(model, source, lengths, most)
    return nn.greedy(step, state, _prompt(source), length=most, end=END).tokens
