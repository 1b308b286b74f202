"""The recurrent decoder of Luong, Pham and Manning, 2015."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.projection import projection
from attnlab._src.nn.recurrent.alignment import Alignment
from attnlab._src.nn.recurrent.cells import LSTM
from attnlab._src.nn.recurrent.decoders import (
    AttentiveDecoder,
    RecurrentState,
    fits,
    following,
)
from attnlab._src.nn.recurrent.layers import AnyCell, Encoded, run_cell
from attnlab._src.scores.inner import Bilinear
from attnlab._src.types import Array, ArrayLike, PyTree, Score, promoted


class LuongDecoder(AttentiveDecoder):
    """Attends with the state after a step; the context is no input of the cell.

    ::

        h_t = cell(h_{t-1}, y_{t-1})      with feed: cell(h_{t-1}, y_{t-1}, h~_{t-1})
        c_t = attend(h_t)
        h~_t = tanh(W_c [c_t; h_t])
        p(y_t) = softmax(W_s h~_t)

    Without ``feed`` the attention of all steps is one call.

    Example:
        >>> from attnlab.nn import RecurrentEncoder
        >>> rngs = nnx.Rngs(0)
        >>> encoder = RecurrentEncoder.standard(9, features=4, hidden_size=6, rngs=rngs)
        >>> decoder = LuongDecoder.standard(
        ...     9, features=4, hidden_size=6, context_features=6, rngs=rngs
        ... )
        >>> decoder(jnp.zeros((2, 3), int), encoder(jnp.zeros((2, 7), int))).shape
        (2, 3, 9)

    References:
        Luong, Pham, Manning, 2015, sections 3.1 and 3.3 (input feeding).
    """

    def __init__(
        self,
        embedding: Embedding,
        cell: AnyCell,
        attention: Alignment | MultiHeadAttention,
        *,
        combine: nnx.Linear,
        head: Callable[[Array], Array],
        first: nnx.Linear,
        feed: nnx.Linear | None = None,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens.
            cell: ``GRU``, ``LSTM``, ``StackedCells``, ...
            attention: an ``Alignment``, or a ``MultiHeadAttention`` without dropout.
            combine: W_c, applied to the concatenated context and state.
            head: W_s, ``[*, features] -> [*, V]``.
            first: maps the encoder's last output (that of the backward direction, if it
                has two) to ``cell.state_size``.
            feed: maps the previous ``h~`` to ``cell.gate_features`` (input feeding);
                None: no input feeding.
        """
        super().__init__(embedding, cell, attention, first)
        if feed is not None:
            fits("feed", "in_features", feed.in_features, combine.out_features)
            fits("feed", "out_features", feed.out_features, cell.gate_features)
        self.combine, self.head, self.feed = combine, head, feed

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        *,
        features: int = 512,
        hidden_size: int = 512,
        context_features: int,
        last_features: int | None = None,
        attention: Alignment | MultiHeadAttention | None = None,
        input_feeding: bool = False,
        cell: Callable[..., AnyCell] = LSTM,
        rngs: nnx.Rngs,
    ) -> "LuongDecoder":
        """The decoder of the paper, with one layer; parts can be replaced.

        Args:
            vocabulary_size: V, the number of tokens.
            features: size of an embedding vector.
            hidden_size: size of the cell's output.
            context_features: size of the encoder's states.
            last_features: size of its last output (of the backward direction, if it has
                two); ``context_features`` if not given.
            attention: an ``Alignment``; with the bilinear score ("general") if not
                given.
            input_feeding: whether ``h~`` is an input of the next step.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            rngs: Flax's random streams.
        """
        made = cell(features, hidden_size, rngs=rngs)
        if attention is None:
            score: Score = Bilinear.init(rngs.params(), hidden_size, context_features)
            attention = Alignment(score)
        gates = made.gate_features
        last = last_features or context_features
        return cls(
            Embedding(vocabulary_size, features, rngs=rngs),
            made,
            attention,
            combine=projection(context_features + hidden_size, hidden_size, rngs=rngs),
            head=projection(hidden_size, vocabulary_size, "vocabulary", rngs=rngs),
            first=projection(last, made.state_size, use_bias=True, rngs=rngs),
            feed=projection(hidden_size, gates, rngs=rngs) if input_feeding else None,
        )

    def start(self, encoded: Encoded) -> RecurrentState:
        """See :class:`AttentiveDecoder`."""
        state = super().start(encoded)
        if self.feed is None:
            return state
        shape = (encoded.states.shape[0], self.combine.out_features)
        return state._replace(said=jnp.zeros(shape, encoded.states.dtype))

    def _read(
        self, tokens: ArrayLike, state: RecurrentState
    ) -> tuple[Array, Array, RecurrentState]:
        gates = self.cell.project(self.embedding(tokens).swapaxes(0, 1))
        positions = following(state, tokens)
        if self.feed is None:
            outputs, cell = run_cell(self.cell, gates, state.cell)
            query, said = outputs.swapaxes(0, 1), None
            combined = self._combined(query, state, positions)
        else:
            query, combined, (cell, said) = self._fed(gates, state, positions)
        position = state.position + tokens.shape[1]
        state = state._replace(cell=cell, position=position, said=said)
        return self.head(combined), query, state

    def _combined(self, query: Array, state: RecurrentState, positions: Array) -> Array:
        """Attentional states ``h~ [B, T, *]`` of queries ``[B, T, *]``."""
        context = self.attend(query, state.source, positions)
        return jnp.tanh(self.combine(jnp.concatenate(promoted(context, query), -1)))

    def _fed(
        self, gates: Array, state: RecurrentState, positions: Array
    ) -> tuple[Array, Array, tuple[PyTree, Array]]:
        """Runs step by step with input feeding: each step uses the ``h~`` before."""
        feed: Any = self.feed

        def step(carry: tuple, now: tuple) -> tuple[tuple, tuple[Array, Array]]:
            (cell, said), (gates, position) = carry, now
            cell = self.cell.step(cell, gates + feed(said))
            query = self.cell.output(cell)
            said = self._combined(query[:, None], state, position[:, None])[:, 0]
            return (cell, said), (query, said)

        carry = state.cell, state.said
        carry, steps = lax.scan(step, carry, (gates, positions.T))
        query, combined = (x.swapaxes(0, 1) for x in steps)
        return query, combined, carry
