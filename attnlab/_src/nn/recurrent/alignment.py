"""Attention of recurrent decoders: decoder states attend to encoder states."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from attnlab._src.masks.base import Mask, as_mask, dense
from attnlab._src.modifiers.bias import bias
from attnlab._src.nn.cache import KeyValue
from attnlab._src.nn.parameters import as_arrays, as_params
from attnlab._src.nn.positions import zero_empty
from attnlab._src.nn.projection import projection
from attnlab._src.ops.attention import attend
from attnlab._src.ops.prepare import project_key
from attnlab._src.scores.inner import ScaledDot
from attnlab._src.scores.projected import projected_keys
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionResult,
    Modifier,
    Score,
    accumulation_dtype,
)

Projection = Callable[[Array], Array]


class Alignment(nnx.Module):
    """One-head attention whose values are the states themselves, without projections.

    A :class:`MultiHeadAttention` can be used instead. With
    ``mask=masks.sliding_window(D, D)`` it is Luong's monotonic alignment (local-m): a
    query at position t attends to source positions from t - D to t + D.

    Example:
        >>> from attnlab import scores
        >>> score = scores.additive.init(jax.random.key(0), 4, 6, hidden_size=8)
        >>> alignment = Alignment(score)
        >>> memory = alignment.project(jnp.ones((2, 7, 6)))  # once a sentence
        >>> alignment.attend(jnp.ones((2, 1, 4)), memory).shape
        (2, 1, 6)

    References:
        Bahdanau, Cho, Bengio, 2015, section 3.1; Luong, Pham, Manning, 2015, sections
        3.1 and 3.2.
    """

    def __init__(
        self,
        score: Score | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        query: Projection | None = None,
        key: Projection | None = None,
        implementation: str | None = None,
        precision: PrecisionLike = None,
    ):
        """Puts parts together.

        Args:
            score: score function; its arrays become parameters. Scaled dot product if
                not given.
            mask: which query position may attend to which source position, in every
                call.
            query: projection ``[*, features] -> [*, size]`` of queries.
            key: projection of states to keys; values are the states without it.
            implementation: see :func:`attnlab.attention`.
            precision: precision of matrix products, as in JAX.
        """
        score = ScaledDot() if score is None else score
        self.score = nnx.data(as_params(score))
        self.mask = nnx.data(None if mask is None else as_mask(mask))
        self.query, self.key = query, key
        self.implementation, self.precision = implementation, precision

    @classmethod
    def projected(
        cls,
        query_features: int,
        key_features: int,
        attention_size: int,
        *,
        score: Score | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "Alignment":
        """An alignment with learned projections of queries and keys.

        Args:
            query_features: size of the decoder's states.
            key_features: size of the encoder's states.
            attention_size: size of projected queries and keys.
            score: score of projected vectors; ``scaled_dot()`` if not given.
            param_dtype: type of the projections' parameters.
            rngs: Flax's random streams.
            **options: further arguments of the class.

        References:
            Britz et al., "Massive Exploration of Neural Machine Translation
            Architectures", 2017, section 4.5 (their multiplicative attention).
        """
        types = {"param_dtype": param_dtype, "rngs": rngs}
        return cls(
            score,
            query=projection(query_features, attention_size, **types),
            key=projection(key_features, attention_size, **types),
            **options,
        )

    def project(self, key: Array, *, positions: Array | None = None) -> KeyValue:
        """Keys and values made from states once, for many queries.

        Args:
            key: states ``[B, S, features]``.
            positions: ``[B, S]``, -1 marks an empty slot, whose state is set to zero;
                positions have no other effect here.
        """
        key = zero_empty(key, positions)
        keys = project_key(self._score(), self._key(key), self.precision)
        return KeyValue(keys, key[:, :, None])

    def attend(
        self,
        query: Array,
        memory: KeyValue,
        *,
        mask: Mask | ArrayLike | None = None,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
    ) -> Array:
        """Context vectors of queries.

        Args:
            query: ``[B, T, features of the query]``.
            memory: keys and values from :meth:`project`.
            mask: mask of this call, combined with the module's own.
            query_positions: ``[B, T]``, -1 marks an empty slot; slot numbers if not
                given.
            key_positions: ``[B, S]``, likewise.

        Returns:
            ``[B, T, features of the states]``; 0 for a query that may attend to
            nothing.
        """
        score = projected_keys(self._score())
        places = query_positions, key_positions
        return self._attend(query, memory, score, mask, *places, stats=False).output

    def with_stats(
        self,
        query: Array,
        key: Array,
        *,
        mask: Mask | ArrayLike | None = None,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        top_k: int | Literal["all"] | None = None,
    ) -> AttentionResult:
        """As ``attend(query, project(key))``, but with statistics and weights.

        For ``top_k`` see :func:`attnlab.attention_with_stats`.
        """
        memory = KeyValue(self._key(key), key[:, :, None])
        places = query_positions, key_positions
        return self._attend(
            query, memory, self._score(), mask, *places, stats=True, top_k=top_k
        )

    def _attend(
        self,
        query: Array,
        memory: KeyValue,
        score: Score,
        mask: Mask | ArrayLike | None,
        query_positions: Array | None,
        key_positions: Array | None,
        *,
        stats: bool,
        top_k: int | Literal["all"] | None = None,
    ) -> AttentionResult:
        return self._run(
            query,
            memory,
            score,
            mask=self._seen(mask),
            # Without a mask nothing depends on them, and planning is simpler.
            query_positions=None if self._seen(mask) is None else query_positions,
            key_positions=key_positions,
            stats=stats,
            top_k=top_k,
        )

    def _run(
        self, query: Array, memory: KeyValue, score: Score, **options: Any
    ) -> AttentionResult:
        """Attends with one head, whose axis is removed from ``output``."""
        query = query if self.query is None else self.query(query)
        found = attend(
            query[:, :, None],
            *memory,
            score=score,
            implementation=self.implementation,
            precision=self.precision,
            **options,
        )
        return found._replace(output=found.output[:, :, 0])

    def _seen(self, mask: Mask | ArrayLike | None) -> Mask | ArrayLike | None:
        if self.mask is None or mask is None:
            return self.mask if mask is None else mask
        return self.mask & mask

    def _key(self, states: Array) -> Array:
        return (states if self.key is None else self.key(states))[:, :, None]

    def _score(self) -> Score:
        return as_arrays(self.score)


class PredictiveAlignment(Alignment):
    """Luong's local-p: each query predicts a position and attends near it.

    For a sentence of S tokens, the center is p = S sigmoid(v . tanh(W query)), and the
    window goes from p - D to p + D. The softmax weights over this window are multiplied
    by exp(-(s - p)^2 / (2 sigma^2)) with sigma = D / 2, and so do not sum to one. The
    window is a mask, the Gaussian a bias, both ``[B, T, S]``.

    Example:
        >>> from attnlab import scores
        >>> alignment = PredictiveAlignment(
        ...     scores.dot(), features=6, half_width=2, rngs=nnx.Rngs(0)
        ... )
        >>> memory = alignment.project(jnp.ones((2, 7, 6)))
        >>> alignment.attend(jnp.ones((2, 3, 6)), memory).shape
        (2, 3, 6)

    References:
        Luong, Pham, Manning, 2015, section 3.2, equations 9 and 10 (here positions
        begin at 0).
    """

    def __init__(
        self,
        score: Score | None = None,
        *,
        features: int,
        half_width: int,
        hidden_size: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Makes the layers that predict the position.

        Args:
            score: see :class:`Alignment`.
            features: size of the queries.
            half_width: D, half the width of the window.
            hidden_size: hidden size of the prediction; ``features`` if not given.
            param_dtype: type of the prediction's parameters.
            rngs: Flax's random streams.
            **options: further arguments of :class:`Alignment`.
        """
        if half_width < 1:
            raise ValueError(f"half_width: expected at least 1, got {half_width}")
        super().__init__(score, **options)
        self.half_width = half_width
        hidden_size = features if hidden_size is None else hidden_size
        types = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden = projection(features, hidden_size, **types)
        self.place = projection(hidden_size, 1, None, **types)

    def center(self, query: Array, lengths: ArrayLike) -> Array:
        """Centers p ``[B, T]`` of queries ``[B, T, *]`` and source lengths ``[B]``."""
        x = self.place(jnp.tanh(self.hidden(query)))[..., 0]
        x = jax.nn.sigmoid(x.astype(accumulation_dtype(x.dtype)))
        return jnp.asarray(lengths).astype(x.dtype)[..., None] * x

    def _attend(
        self,
        query: Array,
        memory: KeyValue,
        score: Score,
        mask: Mask | ArrayLike | None,
        query_positions: Array | None,
        key_positions: Array | None,
        *,
        stats: bool,
        top_k: int | Literal["all"] | None = None,
    ) -> AttentionResult:
        slots = jnp.arange(memory.value.shape[1], dtype=jnp.int32)[None]
        places = slots if key_positions is None else key_positions
        center = self.center(query, places.max(-1) + 1)
        away = places[..., None, :].astype(center.dtype) - center[..., None]
        near = jnp.abs(away) <= self.half_width
        bell = -2 * (away / self.half_width) ** 2
        window = dense(near[:, None])
        seen = self._seen(mask)

        def run(memory: KeyValue, *added: Modifier, **options: Any) -> AttentionResult:
            return self._run(
                query,
                memory,
                score,
                modifiers=added,
                mask=window if seen is None else window & seen,
                query_positions=None if seen is None else query_positions,
                key_positions=key_positions,
                stats=True,
                **options,
            )

        # softmax(logits + bell) = softmax(logits) exp(bell) / c, where c is the
        # quotient of the two softmax denominators.
        nothing = memory._replace(value=jnp.zeros_like(memory.value[..., :1]))
        with jax.debug_infs(False):  # a log-sum-exp may be -inf
            found = run(memory, bias(bell[:, None]), top_k=top_k)
            whole = run(nothing).lse
            sees = ~jnp.isneginf(whole)
        factor = jnp.where(sees, jnp.exp(jnp.where(sees, found.lse - whole, 0)), 0)
        weights = found.weights
        if weights is not None:
            weights = weights * factor.swapaxes(1, 2)[..., None]
        output = (found.output * factor).astype(found.output.dtype)
        return found._replace(output=output, weights=weights)
