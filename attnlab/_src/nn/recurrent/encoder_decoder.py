"""The recurrent encoder-decoder."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.recurrent.alignment import Alignment
from attnlab._src.nn.recurrent.bahdanau import BahdanauDecoder
from attnlab._src.nn.recurrent.cells import GRU, LSTM
from attnlab._src.nn.recurrent.decoders import (
    AttentiveDecoder,
    PlainDecoder,
    RecurrentDecoder,
    RecurrentState,
)
from attnlab._src.nn.recurrent.layers import AnyCell, RecurrentEncoder
from attnlab._src.nn.recurrent.luong import LuongDecoder
from attnlab._src.types import Array, ArrayLike


class RecurrentEncoderDecoder(nnx.Module):
    """A recurrent sequence-to-sequence model, with or without attention.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.nn import greedy
        >>> model = RecurrentEncoderDecoder.bahdanau(
        ...     50, 40, features=8, hidden_size=6, rngs=nnx.Rngs(0)
        ... )
        >>> source, lengths = jnp.zeros((2, 7), int), jnp.array([4, 7])
        >>> model(source, jnp.zeros((2, 5), int), source_lengths=lengths).shape
        (2, 5, 40)
        >>> state, prompt = model.start(source, source_lengths=lengths), source[:, :1]
        >>> greedy(model.decode, state, prompt, length=3, end=39).tokens.shape
        (2, 3)
    """

    def __init__(self, encoder: RecurrentEncoder, decoder: RecurrentDecoder):
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def plain(
        cls,
        vocabulary_size: int,
        target_size: int | None = None,
        *,
        features: int = 512,
        hidden_size: int = 512,
        cell: Callable[..., AnyCell] = GRU,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "RecurrentEncoderDecoder":
        """Without attention: the decoder gets one vector (Cho et al., 2014).

        Args:
            vocabulary_size: number of source tokens.
            target_size: number of target tokens; ``vocabulary_size`` if not given.
            features: size of an embedding vector.
            hidden_size: size of every cell's output.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            rngs: Flax's random streams.
            **options: further arguments of :meth:`RecurrentEncoder.standard`.
        """
        sizes: dict[str, Any] = {
            "features": features,
            "hidden_size": hidden_size,
            "cell": cell,
        }
        encoder = RecurrentEncoder.standard(
            vocabulary_size, rngs=rngs, **sizes, **options
        )
        decoder = PlainDecoder.standard(
            target_size or vocabulary_size,
            context_features=encoder.out_features,
            rngs=rngs,
            **sizes,
        )
        return cls(encoder, decoder)

    @classmethod
    def bahdanau(
        cls,
        vocabulary_size: int,
        target_size: int | None = None,
        *,
        features: int = 620,
        hidden_size: int = 1000,
        attention_size: int | None = None,
        attention: Alignment | MultiHeadAttention | None = None,
        bidirectional: bool = True,
        cell: Callable[..., AnyCell] = GRU,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "RecurrentEncoderDecoder":
        """RNNsearch of Bahdanau, Cho and Bengio, 2015; parts can be replaced.

        Args:
            vocabulary_size: number of source tokens.
            target_size: number of target tokens; ``vocabulary_size`` if not given.
            features: size of an embedding vector.
            hidden_size: size of every cell's output.
            attention_size: hidden units of the additive score; ``hidden_size`` if not
                given.
            attention: an ``Alignment`` to use instead of the additive one.
            bidirectional: whether the encoder reads in both directions.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            rngs: Flax's random streams.
            **options: further arguments of :meth:`RecurrentEncoder.standard`.
        """
        sizes: dict[str, Any] = {
            "features": features,
            "hidden_size": hidden_size,
            "cell": cell,
        }
        encoder = RecurrentEncoder.standard(
            vocabulary_size, bidirectional=bidirectional, rngs=rngs, **sizes, **options
        )
        decoder = BahdanauDecoder.standard(
            target_size or vocabulary_size,
            context_features=encoder.out_features,
            last_features=hidden_size,
            attention_size=attention_size,
            attention=attention,
            rngs=rngs,
            **sizes,
        )
        return cls(encoder, decoder)

    @classmethod
    def luong(
        cls,
        vocabulary_size: int,
        target_size: int | None = None,
        *,
        features: int = 1000,
        hidden_size: int = 1000,
        attention: Alignment | MultiHeadAttention | None = None,
        input_feeding: bool = False,
        cell: Callable[..., AnyCell] = LSTM,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "RecurrentEncoderDecoder":
        """The model of Luong, Pham and Manning, 2015, here with one layer.

        Args:
            vocabulary_size: number of source tokens.
            target_size: number of target tokens; ``vocabulary_size`` if not given.
            features: size of an embedding vector.
            hidden_size: size of every cell's output.
            attention: an ``Alignment``; with the bilinear score ("general") if not
                given.
            input_feeding: whether the attentional state ``h~`` is an input of the next
                step.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            rngs: Flax's random streams.
            **options: further arguments of :meth:`RecurrentEncoder.standard`.
        """
        sizes: dict[str, Any] = {
            "features": features,
            "hidden_size": hidden_size,
            "cell": cell,
        }
        encoder = RecurrentEncoder.standard(
            vocabulary_size, rngs=rngs, **sizes, **options
        )
        decoder = LuongDecoder.standard(
            target_size or vocabulary_size,
            context_features=encoder.out_features,
            last_features=hidden_size,
            attention=attention,
            input_feeding=input_feeding,
            rngs=rngs,
            **sizes,
        )
        return cls(encoder, decoder)

    def __call__(
        self,
        source: ArrayLike,
        target: ArrayLike,
        *,
        source_lengths: ArrayLike | None = None,
    ) -> Array:
        """Logits of the tokens that follow each target token.

        Args:
            source: ``[B, S]`` integers.
            target: ``[B, T]`` integers, beginning with the start token.
            source_lengths: ``[B]``: number of source tokens before the padding.

        Returns:
            ``[B, T, V]``.
        """
        return self.decoder(target, self.encoder(source, lengths=source_lengths))

    def start(
        self, source: ArrayLike, *, source_lengths: ArrayLike | None = None
    ) -> RecurrentState:
        """The state before the first target token, for :meth:`decode`."""
        return self.decoder.start(self.encoder(source, lengths=source_lengths))

    def decode(
        self, tokens: ArrayLike, state: RecurrentState
    ) -> tuple[Array, RecurrentState]:
        """The next target tokens; see :meth:`RecurrentDecoder.decode`."""
        return self.decoder.decode(tokens, state)

    def with_weights(
        self,
        source: ArrayLike,
        target: ArrayLike,
        *,
        source_lengths: ArrayLike | None = None,
    ) -> tuple[Array, Array]:
        """As a call, but also returns attention weights ``[B, T, S]``.

        Raises:
            TypeError: if the decoder has no attention.
        """
        if not isinstance(self.decoder, AttentiveDecoder):
            raise TypeError(
                f"decoder: {type(self.decoder).__name__} does not attend: it has no "
                "weights"
            )
        encoded = self.encoder(source, lengths=source_lengths)
        return self.decoder.with_weights(target, encoded)
