"""A recurrent language model that attends to its own earlier states."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src.masks.data import documents as within
from attnlab._src.masks.structural import causal, sliding_window
from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.cache import (
    Cache,
    KeyValue,
    check_examples,
    check_type,
    full_cache,
)
from attnlab._src.nn.embedding import Embedding
from attnlab._src.nn.projection import projection
from attnlab._src.nn.recurrent.alignment import Alignment
from attnlab._src.nn.recurrent.cells import LSTM
from attnlab._src.nn.recurrent.layers import AnyCell, Recurrent
from attnlab._src.types import Array, ArrayLike, PyTree, promoted


class RecurrentLanguageModelState(NamedTuple):
    """State of the model between steps; every array leads with the batch.

    Attributes:
        cells: for each layer the state of its cell.
        cache: keys and values of the earlier states, or None without attention.
    """

    cells: tuple[PyTree, ...]
    cache: Cache | None = None


class RecurrentLanguageModel(nnx.Module):
    """Recurrent language model whose states attend to earlier ones.

    ::

        h_t = the last layer's output
        c_t = attend(h_t; h_0, ..., h_{t-1}), 0 for the first token
        p(next token) = softmax(head(tanh(W [c_t; h_t])))

    Example:
        >>> model = RecurrentLanguageModel.standard(
        ...     100, features=8, hidden_size=6, rngs=nnx.Rngs(0)
        ... )
        >>> model(jnp.zeros((2, 5), int)).shape
        (2, 5, 100)

    References:
        Cheng, Dong, Lapata, "Long Short-Term Memory-Networks for Machine Reading", 2016
        (attention to earlier states); Daniluk et al., "Frustratingly Short Attention
        Spans in Neural Language Modeling", 2017, section 3.1, equations 1 to 4.
    """

    def __init__(
        self,
        embedding: Embedding,
        layers: Sequence[Recurrent],
        head: Callable[[Array], Array],
        *,
        attention: Any = None,
        combine: nnx.Linear | None = None,
    ):
        """Puts parts together.

        Args:
            embedding: embedding of tokens.
            layers: layers, applied in this order.
            head: ``[*, features] -> [*, V]``.
            attention: an ``Alignment`` or a ``MultiHeadAttention`` from the last
                layer's states to earlier ones; None: no attention.
            combine: W, applied to the concatenated context and state; given if and only
                if ``attention`` is.
        """
        if not layers:
            raise ValueError("layers: expected at least one, got none")
        if any(layer.reverse for layer in layers):
            raise ValueError("layers: a language model reads forward; got reverse=True")
        if (attention is None) != (combine is None):
            raise ValueError(
                "combine: give both attention and combine, or neither of them"
            )
        self.embedding, self.layers, self.head = embedding, nnx.List(layers), head
        self.attention, self.combine = attention, combine

    @classmethod
    def standard(
        cls,
        vocabulary_size: int,
        *,
        features: int = 512,
        hidden_size: int = 512,
        num_layers: int = 1,
        cell: Callable[..., AnyCell] = LSTM,
        attention: Alignment | MultiHeadAttention | None = None,
        rngs: nnx.Rngs,
    ) -> "RecurrentLanguageModel":
        """A model of equal layers, by default with scaled dot-product attention.

        Args:
            vocabulary_size: V, the number of tokens.
            features: size of an embedding vector.
            hidden_size: size of every cell's output.
            num_layers: number of layers.
            cell: ``LSTM``, ``GRU``, or ``cell(in_features, hidden_size, rngs=rngs)``.
            attention: an ``Alignment`` of states of ``hidden_size``; one with scaled
                dot product if not given.
            rngs: Flax's random streams.
        """
        plain = cls.plain(
            vocabulary_size,
            features=features,
            hidden_size=hidden_size,
            num_layers=num_layers,
            cell=cell,
            rngs=rngs,
        )
        return cls(
            plain.embedding,
            plain.layers,
            plain.head,
            attention=Alignment() if attention is None else attention,
            combine=projection(2 * hidden_size, hidden_size, rngs=rngs),
        )

    @classmethod
    def plain(
        cls,
        vocabulary_size: int,
        *,
        features: int = 512,
        hidden_size: int = 512,
        num_layers: int = 1,
        cell: Callable[..., AnyCell] = LSTM,
        rngs: nnx.Rngs,
    ) -> "RecurrentLanguageModel":
        """Without attention; arguments as of :meth:`standard`."""
        sizes = [features] + [hidden_size] * (num_layers - 1)
        return cls(
            Embedding(vocabulary_size, features, rngs=rngs),
            [Recurrent(cell(size, hidden_size, rngs=rngs)) for size in sizes],
            projection(
                hidden_size, vocabulary_size, "vocabulary", use_bias=True, rngs=rngs
            ),
        )

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        lengths: ArrayLike | None = None,
        documents: ArrayLike | None = None,
    ) -> Array:
        """Logits of the tokens that follow each token.

        Args:
            tokens: ``[B, T]`` integers.
            lengths: ``[B]`` integers: number of tokens before the padding.
            documents: ``[B, T]`` document ids, instead of lengths: neither states nor
                attention cross from one document to another; negative ids mark padding.

        Returns:
            ``[B, T, V]``.
        """
        x = self._states(tokens, None, lengths=lengths, documents=documents)[0]
        if self.attention is None:
            return self.head(x)
        earlier = _EARLIER if documents is None else _EARLIER & within(documents)
        context = self.attention.attend(x, self.attention.project(x), mask=earlier)
        return self._logits(context, x)

    def start(
        self, batch: int, length: int, *, dtype: DTypeLike | None = None
    ) -> RecurrentLanguageModelState:
        """The state before the first token.

        Args:
            batch: B, the batch size.
            length: number of slots of the cache, one for each token that is read.
            dtype: type of states and cache; the type that the layers compute in if not
                given.
        """
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        states = nnx.eval_shape(lambda m, x: m._states(x, None)[0], self, tokens)
        if dtype is not None:
            states = jax.ShapeDtypeStruct(states.shape, dtype)
        cells = tuple(layer.cell.start(batch, states.dtype) for layer in self.layers)
        if self.attention is None:
            return RecurrentLanguageModelState(cells)
        key, value = jax.eval_shape(self.attention.project, states)
        *_, num_heads, size = key.shape
        cache = full_cache(
            batch,
            length,
            num_heads,
            size,
            value_size=value.shape[-1],
            dtype=value.dtype if dtype is None else dtype,
        )
        return RecurrentLanguageModelState(cells, cache)

    def decode(
        self, tokens: ArrayLike, state: RecurrentLanguageModelState
    ) -> tuple[Array, RecurrentLanguageModelState]:
        """Reads the next tokens, one or several.

        Args:
            tokens: ``[B, T]`` integers.
            state: from :meth:`start`, or returned by the step before.

        Returns:
            Logits ``[B, T, V]``, and the next state. A position beyond the cache raises
            a ValueError; if positions are traced, the example yields NaN.
        """
        if state.cache is not None:
            check_examples("tokens", tokens, state.cache.length.shape[0])
        x, cells = self._states(tokens, state.cells)
        if self.attention is None:
            return self.head(x), state._replace(cells=cells)
        if state.cache is None:
            raise ValueError(
                "state: it has no cache, which a model with attention needs; make it "
                "with start(...)"
            )
        positions = state.cache.next_positions(tokens.shape[1])
        key, value = self.attention.project(x, positions=positions)
        check_type(state.cache, value.dtype)
        cache, view = state.cache.append(key, value, positions)
        context = self.attention.attend(
            x,
            KeyValue(view.key, view.value),
            mask=_EARLIER,
            query_positions=positions,
            key_positions=view.positions,
        )
        lost = state.cache.overflows(positions)[:, None, None]
        logits = jnp.where(lost, jnp.nan, self._logits(context, x))
        return logits, RecurrentLanguageModelState(cells, cache)

    def _states(
        self, tokens: ArrayLike, states: Sequence[PyTree] | None, **seen: Any
    ) -> tuple[Array, tuple[PyTree, ...]]:
        x = self.embedding(tokens)
        before = [None] * len(self.layers) if states is None else states
        after = []
        for layer, own in zip(self.layers, before, strict=True):
            x, last = layer(x, own, **seen)
            after.append(last)
        return x, tuple(after)

    def _logits(self, context: Array, x: Array) -> Array:
        assert self.combine is not None
        both = jnp.concatenate(promoted(context, x), -1)
        return self.head(jnp.tanh(self.combine(both)))


#: Keys strictly before the query.
_EARLIER = causal() & ~sliding_window(0, 0)
