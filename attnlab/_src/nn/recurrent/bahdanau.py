"""The recurrent decoder of Bahdanau, Cho and Bengio, 2015."""

from collections.abc import Callable

from flax import nnx
from jax import lax

from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.projection import projection
from attnlab._src.nn.recurrent.alignment import Alignment
from attnlab._src.nn.recurrent.cells import GRU
from attnlab._src.nn.recurrent.decoders import (
    AttentiveDecoder,
    RecurrentState,
    fits,
    following,
)
from attnlab._src.nn.recurrent.layers import AnyCell
from attnlab._src.nn.recurrent.readouts import MaxoutReadout
from attnlab._src.scores.pairwise import Additive
from attnlab._src.types import Array, ArrayLike, PyTree


class BahdanauDecoder(AttentiveDecoder):
    """Attends with the state before a step; the context is an input of the step.

    ::

        c_i = attend(s_{i-1})
        s_i = cell(s_{i-1}, y_{i-1}, c_i)
        p(y_i) = softmax(readout(s_i, c_i, y_{i-1}))

    Example:
        >>> import jax.numpy as jnp
        >>> from attnlab.nn import RecurrentEncoder
        >>> rngs = nnx.Rngs(0)
        >>> encoder = RecurrentEncoder.standard(
        ...     9, features=4, hidden_size=6, bidirectional=True, rngs=rngs
        ... )
        >>> decoder = BahdanauDecoder.standard(
        ...     9,
        ...     features=4,
        ...     hidden_size=5,
        ...     context_features=12,
        ...     last_features=6,
        ...     rngs=rngs,
        ... )
        >>> encoded = encoder(jnp.zeros((2, 7), int))
        >>> logits, weights = decoder.with_weights(jnp.zeros((2, 3), int), encoded)
        >>> logits.shape, weights.shape
        ((2, 3, 9), (2, 3, 7))

    References:
        Bahdanau, Cho, Bengio, 2015, section 3.1, appendices A.1 and A.2.
    """

    def __init__(
        self,
        embedding: Embedding,
        cell: AnyCell,
        attention: Alignment | MultiHeadAttention,
        readout: Callable[[Array, Array, Array], Array],
        *,
        context: nnx.Linear,
        first: nnx.Linear,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens, an input of cell and readout.
            cell: ``GRU``, ``LSTM``, ...
            attention: an ``Alignment``, or a ``MultiHeadAttention`` without dropout.
            readout: maps state, context and the token's vector to logits.
            context: maps contexts to ``cell.gate_features``.
            first: maps the encoder's last output (that of the backward direction, if it
                has two) to ``cell.state_size``.
        """
        super().__init__(embedding, cell, attention, first)
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
        last_features: int,
        attention_size: int | None = None,
        attention: Alignment | MultiHeadAttention | None = None,
        cell: Callable[..., AnyCell] = GRU,
        rngs: nnx.Rngs,
    ) -> "BahdanauDecoder":
        """The decoder of the paper; parts can be replaced.

        Args:
            vocabulary_size: V, the number of tokens.
            features: size of an embedding vector.
            hidden_size: size of the cell's output; the readout has half as many maxout
                units.
            context_features: size of the encoder's states.
            last_features: size of its last output (of the backward direction, if it has
                two).
            attention_size: hidden units of the additive score; ``hidden_size`` if not
                given.
            attention: an ``Alignment`` to use instead, with contexts of size
                ``context_features``.
            cell: ``GRU``, ``LSTM``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            rngs: Flax's random streams.
        """
        made = cell(features, hidden_size, rngs=rngs)
        if attention is None:
            score = Additive.init(
                rngs.params(),
                hidden_size,
                context_features,
                hidden_size=attention_size or hidden_size,
            )
            attention = Alignment(score)
        known = hidden_size + context_features + features
        return cls(
            Embedding(vocabulary_size, features, rngs=rngs),
            made,
            attention,
            MaxoutReadout(known, -(-hidden_size // 2), vocabulary_size, rngs=rngs),
            context=projection(context_features, made.gate_features, rngs=rngs),
            first=projection(last_features, made.state_size, use_bias=True, rngs=rngs),
        )

    def _read(
        self, tokens: ArrayLike, state: RecurrentState
    ) -> tuple[Array, Array, RecurrentState]:
        embedded = self.embedding(tokens)
        gates = self.cell.project(embedded.swapaxes(0, 1))
        positions = following(state, tokens)

        def step(cell: PyTree, now: tuple[Array, Array]) -> tuple[PyTree, tuple]:
            gates, position = now
            query = self.cell.output(cell)
            context = self.attend(query[:, None], state.source, position[:, None])[:, 0]
            cell = self.cell.step(cell, gates + self.context(context))
            return cell, (query, self.cell.output(cell), context)

        last, steps = lax.scan(step, state.cell, (gates, positions.T))
        query, output, context = (x.swapaxes(0, 1) for x in steps)
        logits = self.readout(output, context, embedded)
        position = state.position + tokens.shape[1]
        return logits, query, state._replace(cell=last, position=position)
