"""The attention of recurrent decoders: a state is aligned with the source's states."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

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
    """Attention with one head to states as they are: context = weights . states.

    A :class:`MultiHeadAttention` can stand in its place. With
    ``mask=masks.sliding_window(D, D)`` it is Luong's monotonic alignment (local-m): a
    query at position t sees source positions from t - D to t + D.

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
        precision: Any = None,
    ):
        """Puts parts together.

        Args:
            score: what similarity is; its arrays are learned. Scaled dot product if not
                given.
            mask: which source positions a query position may see, in every call.
            query: ``[*, features] -> [*, size]``, applied before the comparison.
            key: likewise to the states that are compared (not to their sum).
            implementation: as of :func:`attnlab.attention`.
            precision: of matrix products.
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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> "Alignment":
        """Compares in a space of its own: learned projections of query and key.

        Args:
            query_features: of the decoder's states.
            key_features: of the encoder's states.
            attention_size: where they are compared.
            score: of vectors of that size; ``scaled_dot()`` if not given.
            param_dtype: of the projections.
            rngs: Flax's.
            **options: as of the class.

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
        """What is compared with, and what is summed, once for many queries.

        Args:
            key: states ``[B, S, features]``.
            positions: ``[B, S]``, -1 = empty: states of a recurrent network know
                theirs, so that nothing else is done with them here.
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
        """Contexts.

        Args:
            query: ``[B, T, features of the query]``.
            memory: what :meth:`project` made.
            mask: of this call, besides its own.
            query_positions: ``[B, T]``, -1 = empty; slot numbers if not given.
            key_positions: ``[B, S]``, likewise.

        Returns:
            ``[B, T, features of the states]``; 0 where a query sees nothing.
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
        """As ``attend(query, project(key))``, with the weights: for pictures.

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
        mask: Any,
        query_positions: Array | None,
        key_positions: Array | None,
        *,
        stats: bool,
        top_k: Any = None,
    ) -> AttentionResult:
        return self._run(
            query,
            memory,
            score,
            mask=self._seen(mask),
            # Where no mask speaks of them, a plan need not know them.
            query_positions=None if self._seen(mask) is None else query_positions,
            key_positions=key_positions,
            stats=stats,
            top_k=top_k,
        )

    def _run(
        self, query: Array, memory: KeyValue, score: Score, **options: Any
    ) -> AttentionResult:
        """One head: ``output`` has lost its axis."""
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

    def _seen(self, mask: Any) -> Any:
        if self.mask is None or mask is None:
            return self.mask if mask is None else mask
        return self.mask & mask

    def _key(self, states: Array) -> Array:
        return (states if self.key is None else self.key(states))[:, :, None]

    def _score(self) -> Score:
        return as_arrays(self.score)


class PredictiveAlignment(Alignment):
    """Luong's local-p: each query says where it looks, and sees a window around it.

    A sentence of S tokens is looked at around p = S sigmoid(v . tanh(W query)), from
    p - D to p + D. The weights of the softmax over this window are multiplied by
    exp(-(s - p)^2 / (2 sigma^2)) with sigma = D / 2, and no longer sum to one. Window
    and curve are a mask and a bias of ``[B, T, S]``.

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
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Makes what predicts the position.

        Args:
            score: as of :class:`Alignment`.
            features: of the queries.
            half_width: D.
            hidden_size: of the prediction; ``features`` if not given.
            param_dtype: of the prediction.
            rngs: Flax's.
            **options: as of :class:`Alignment`.
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
        """p: ``[B, T, features]``, lengths ``[B]`` -> ``[B, T]``."""
        x = self.place(jnp.tanh(self.hidden(query)))[..., 0]
        x = jax.nn.sigmoid(x.astype(accumulation_dtype(x.dtype)))
        return jnp.asarray(lengths).astype(x.dtype)[..., None] * x

    def _attend(
        self,
        query: Array,
        memory: KeyValue,
        score: Score,
        mask: Any,
        query_positions: Array | None,
        key_positions: Array | None,
        *,
        stats: bool,
        top_k: Any = None,
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
        # quotient of the two sums of exponentials.
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
