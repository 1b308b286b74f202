"""Base classes of recurrent decoders, and the decoder without attention."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.projection import projection
from attnlab._src.nn.recurrent.alignment import Alignment
from attnlab._src.nn.recurrent.cells import GRU
from attnlab._src.nn.recurrent.layers import AnyCell, Encoded, run_cell
from attnlab._src.nn.recurrent.readouts import MaxoutReadout
from attnlab._src.types import Array, ArrayLike, PyTree


class Memory(NamedTuple):
    """The encoded source that a decoder attends to; every array leads with the batch.

    Attributes:
        content: encoder states as the attention's ``project`` returns them.
        positions: ``[B, S]`` int32, -1 marks padding; None: no padding.
    """

    content: PyTree
    positions: Array | None = None


class RecurrentState(NamedTuple):
    """State of a recurrent decoder between steps; every array leads with the batch.

    Attributes:
        cell: state of its cell.
        source: the encoded source: a ``Memory``, or one vector ``[B, features]``.
        position: ``[B]`` int32: position of the next token.
        said: ``[B, features]``: output fed back to the next step, or None.
    """

    cell: PyTree
    source: PyTree
    position: Array
    said: Array | None = None


class RecurrentDecoder(nnx.Module):
    """Base class of recurrent decoders: a cell that reads the target tokens.

    Teacher forcing is decoding of all tokens at once. A subclass defines ``start`` and
    ``_read``.
    """

    def __init__(self, embedding: Embedding, cell: AnyCell, first: nnx.Linear):
        """Puts parts together.

        Args:
            embedding: embedding of tokens, the input of the cell.
            cell: ``GRU``, ``LSTM``, ...
            first: maps an encoder's last output to ``cell.state_size``; tanh of it is
                the first state.
        """
        fits("cell", "in_features", cell.in_features, embedding.table.features)
        fits("first", "out_features", first.out_features, cell.state_size)
        self.embedding, self.cell, self.first = embedding, cell, first

    def __call__(self, tokens: ArrayLike, encoded: Encoded) -> Array:
        """Logits of the tokens that follow each token.

        Args:
            tokens: ``[B, T]`` integers, beginning with the start token.
            encoded: the source, as an encoder returns it.

        Returns:
            ``[B, T, V]``.
        """
        return self.decode(tokens, self.start(encoded))[0]

    def start(self, encoded: Encoded) -> RecurrentState:
        """The state before the first token."""
        raise NotImplementedError

    def decode(
        self, tokens: ArrayLike, state: RecurrentState
    ) -> tuple[Array, RecurrentState]:
        """Reads the next tokens, one or several.

        Args:
            tokens: ``[B, T]`` integers.
            state: from :meth:`start`, or returned by the step before.

        Returns:
            Logits ``[B, T, V]``, and the next state.
        """
        logits, _, state = self._read(tokens, state)
        return logits, state

    def _read(
        self, tokens: ArrayLike, state: RecurrentState
    ) -> tuple[Array, Array | None, RecurrentState]:
        """Logits, queries ``[B, T, features]`` of the attention, and the next state."""
        raise NotImplementedError

    def _begin(self, vector: Array, source: PyTree) -> RecurrentState:
        cell = self.cell.state(jnp.tanh(self.first(vector)))
        return RecurrentState(cell, source, jnp.zeros(vector.shape[0], jnp.int32))


class PlainDecoder(RecurrentDecoder):
    """Decoder without attention: the context of each step is the encoder's last output.

    Example:
        >>> from attnlab.nn import RecurrentEncoder
        >>> rngs = nnx.Rngs(0)
        >>> encoder = RecurrentEncoder.standard(9, features=4, hidden_size=6, rngs=rngs)
        >>> decoder = PlainDecoder.standard(
        ...     9, features=4, hidden_size=5, context_features=6, rngs=rngs
        ... )
        >>> decoder(jnp.zeros((2, 3), int), encoder(jnp.zeros((2, 7), int))).shape
        (2, 3, 9)

    References:
        Cho et al., 2014, section 2.2.
    """

    def __init__(
        self,
        embedding: Embedding,
        cell: AnyCell,
        readout: Callable[[Array, Array, Array], Array],
        *,
        context: nnx.Linear,
        first: nnx.Linear,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens.
            cell: ``GRU``, ``LSTM``, ...
            readout: maps state, context and the token's vector to logits.
            context: maps the encoder's last outputs, concatenated, to
                ``cell.gate_features``.
            first: maps them to ``cell.state_size``.
        """
        super().__init__(embedding, cell, first)
        fits("context", "out_features", context.out_features, cell.gate_features)
        self.context, self.readout = context, readout

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        *,
        features: int = 512,
        hidden_size: int = 512,
        context_features: int,
        cell: Callable[..., AnyCell] = GRU,
        rngs: nnx.Rngs,
    ) -> "PlainDecoder":
        """A decoder with one layer and a maxout readout.

        Args:
            vocabulary_size: V, the number of tokens.
            features: size of an embedding vector.
            hidden_size: size of the cell's output; the readout has half as many maxout
                units.
            context_features: size of the encoder's last outputs, concatenated.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            rngs: Flax's random streams.
        """
        made = cell(features, hidden_size, rngs=rngs)
        known = hidden_size + context_features + features
        return cls(
            Embedding(vocabulary_size, features, rngs=rngs),
            made,
            MaxoutReadout(known, -(-hidden_size // 2), vocabulary_size, rngs=rngs),
            context=projection(context_features, made.gate_features, rngs=rngs),
            first=projection(
                context_features, made.state_size, use_bias=True, rngs=rngs
            ),
        )

    def start(self, encoded: Encoded) -> RecurrentState:
        """See :class:`RecurrentDecoder`."""
        summary = jnp.concatenate(encoded.last, -1)
        return self._begin(summary, summary)

    def _read(
        self, tokens: ArrayLike, state: RecurrentState
    ) -> tuple[Array, None, RecurrentState]:
        embedded = self.embedding(tokens)
        summary = state.source
        gates = self.cell.project(embedded.swapaxes(0, 1)) + self.context(summary)[None]
        outputs, last = run_cell(self.cell, gates, state.cell)
        outputs = outputs.swapaxes(0, 1)
        shape = (*tokens.shape, summary.shape[-1])
        context = jnp.broadcast_to(summary[:, None], shape)
        logits = self.readout(outputs, context, embedded)
        position = state.position + tokens.shape[1]
        return logits, None, state._replace(cell=last, position=position)


class AttentiveDecoder(RecurrentDecoder):
    """Base class of decoders that attend to the encoder's states."""

    def __init__(
        self,
        embedding: Embedding,
        cell: AnyCell,
        attention: Alignment | MultiHeadAttention,
        first: nnx.Linear,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens, the input of the cell.
            cell: ``GRU``, ``LSTM``, ...
            attention: an ``Alignment``, or a ``MultiHeadAttention`` without dropout.
            first: maps the encoder's last output (that of the backward direction, if it
                has two) to ``cell.state_size``.
        """
        super().__init__(embedding, cell, first)
        self.attention: Any = attention

    def start(self, encoded: Encoded) -> RecurrentState:
        """See :class:`RecurrentDecoder`; projects the encoder's states once."""
        content = self.attention.project(encoded.states, positions=encoded.positions)
        memory = Memory(content, encoded.positions)
        return self._begin(encoded.last[-1], memory)

    def attend(self, query: Array, memory: Memory, positions: Array) -> Array:
        """Contexts ``[B, T, *]`` of queries ``[B, T, *]`` at positions ``[B, T]``."""
        return self.attention.attend(
            query,
            memory.content,
            query_positions=positions,
            key_positions=memory.positions,
        )

    def with_weights(self, tokens: ArrayLike, encoded: Encoded) -> tuple[Array, Array]:
        """As a call, but also returns the attention weights of every step.

        For the weights of a translation, pass its decoded tokens.

        Returns:
            Logits ``[B, T, V]``, and weights ``[B, T, S]``, the mean over heads.
        """
        state = self.start(encoded)
        logits, queries, _ = self._read(tokens, state)
        weights = self.attention.with_stats(
            queries,
            encoded.states,
            query_positions=following(state, tokens),
            key_positions=encoded.positions,
            top_k="all",
        ).weights
        return logits, weights.mean(1)


def following(state: RecurrentState, tokens: ArrayLike) -> Array:
    """``[B, T]``: the positions of the next tokens."""
    return state.position[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]


def fits(name: str, what: str, found: int, expected: int) -> None:
    """Raises if a part's size is not the one that the other parts need."""
    if found != expected:
        raise ValueError(f"{name}: expected {what}={expected}, got {found}")
