"""The multi-head attention module: projections around the attention function."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import PrecisionLike
from jax.typing import DTypeLike

from attnlab._src.masks.base import Mask, as_mask, full
from attnlab._src.nn.cache import (
    KEEP_ALL,
    Cache,
    CachePolicy,
    KeyValue,
    check_examples,
    check_type,
)
from attnlab._src.nn.explicit import project
from attnlab._src.nn.parameters import as_arrays, as_params, named
from attnlab._src.nn.positions import Positions, as_positions, positions_of, zero_empty
from attnlab._src.nn.projection import Projections, check_features
from attnlab._src.ops.attention import attend
from attnlab._src.ops.hidden import zero_hidden
from attnlab._src.ops.prepare import project_key
from attnlab._src.scores.inner import ScaledDot
from attnlab._src.scores.projected import projected_keys
from attnlab._src.types import Array, ArrayLike, AttentionResult, Modifier, Score


class MultiHeadAttention(nnx.Module):
    """Multi-head attention: projects to heads, attends, and projects back.

    A call with one argument is self-attention, with two or three cross-attention.

    Example:
        >>> from attnlab import masks
        >>> layer = MultiHeadAttention(32, 4, mask=masks.causal(), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 10, 32))).shape
        (2, 10, 32)

    References:
        Vaswani et al., 2017, section 3.2.2; Ainslie et al., "GQA", 2023, section 2.2.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        projections: Callable[..., Projections] = Projections.linear,
        score: Score | None = None,
        mask: Mask | ArrayLike | None = None,
        modifiers: Sequence[Modifier] = (),
        position: Positions | None = None,
        sinks: ArrayLike | None = None,
        dropout_rate: float = 0.0,
        cache: CachePolicy = KEEP_ALL,
        implementation: str | None = None,
        precision: PrecisionLike = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Puts parts together.

        Args:
            in_features: size of the inputs that queries are made from.
            num_heads: N, the number of query heads.
            projections: makes the query, key, value and output projections; called as
                ``projections(in_features, num_heads, precision=, rngs=, **options)``.
            score: score function; its arrays become parameters. Scaled dot product if
                not given.
            mask: which query may attend to which key, in every call.
            modifiers: applied to the logits in this order, after those of ``position``;
                their arrays are not learned.
            position: how positions enter the attention: ``Rotary()``, ``Alibi(...)``,
                ``RelativeBias(...)``; not at all if not given.
            sinks: ``[N]`` initial values of learned sink logits.
            dropout_rate: dropout rate of the attention weights, while the module is not
                deterministic (see ``nnx.Module.train`` and ``eval``).
            cache: which positions the cache keeps in decoding.
            implementation: see :func:`attnlab.attention`.
            precision: precision of matrix products, as in JAX.
            rngs: Flax's random streams: ``params``, and ``dropout`` if the rate is
                positive.
            **options: further arguments of ``projections``; of
                :meth:`Projections.linear`: ``num_key_heads``, ``head_size``,
                ``use_bias``, ``dtype``, ...

        Raises:
            ValueError: if sizes do not fit each other.
            TypeError: if ``position``, ``modifiers``, ``cache`` or what
                ``projections`` returns has the wrong type, or an option is unknown.
        """
        if isinstance(modifiers, Modifier):
            raise TypeError("modifiers: expected a sequence; write modifiers=[...]")
        if not isinstance(cache, CachePolicy):
            raise TypeError(
                "cache: expected nn.CachePolicy(window=..., anchors=...), got "
                f"{cache!r}"
            )
        if "anchors" in options:
            raise TypeError(
                "anchors: nn.AnchoredAttention(..., anchors=...) takes them, not "
                "nn.MultiHeadAttention"
            )
        parts = projections(
            in_features, num_heads, precision=precision, rngs=rngs, **options
        )
        if not isinstance(parts, Projections):
            raise TypeError(
                "projections: expected a function that returns nn.Projections, got "
                f"{type(parts).__name__} from it"
            )
        # Attributes of the module itself: checkpoints name parameters by these paths.
        self.query, self.key, self.value, self.out = parts[:4]
        self.query_norm, self.key_norm = parts.query_norm, parts.key_norm
        self.num_heads, self.head_size = parts.query.out_features
        self.num_key_heads, self.value_size = parts.value.out_features
        self.score = nnx.data(as_params(ScaledDot() if score is None else score))
        self.mask = nnx.data(full() if mask is None else as_mask(mask))
        self.modifiers = nnx.data(tuple(modifiers))
        self.position = as_positions(position)
        self.sinks: Any = nnx.data(None)
        if sinks is not None:
            dtype = parts.query.param_dtype
            self.sinks = nnx.Param(jnp.asarray(sinks, dtype), **named("heads"))
        self.dropout_rate, self.deterministic = dropout_rate, False
        self.rngs = rngs.dropout.fork() if dropout_rate > 0 else None
        self.cache = cache
        self.implementation, self.precision = implementation, precision

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        query_offset: int | ArrayLike = 0,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """Attends.

        Inputs at queries that may attend to no key, and at keys that no query may
        attend to, are set to zero before they are projected: with
        ``masks.lengths(n, n)`` those are the padding.

        Args:
            query: ``[*batch, T, in_features]``.
            key: ``[*batch, S, key_features]``; the query if not given.
            value: ``[*batch, S, key_features]``; the key if not given.
            mask: mask of this call (lengths, documents), combined with the module's.
            query_offset: position of the first query.
            query_positions: ``[T]`` or ``[*batch, T]``; -1 marks an empty slot.
            key_positions: ``[S]`` or ``[*batch, S]``; -1 marks an empty slot.
            rngs: random streams for dropout, instead of the module's own.

        Returns:
            ``[*batch, T, out_features]``.
        """
        options = {"rngs": rngs, "stats": False}
        where = query_offset, query_positions, key_positions
        return self._whole((query, key, value), mask, where, options).output

    def with_stats(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        query_offset: int | ArrayLike = 0,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
        top_k: int | Literal["all"] | None = None,
    ) -> AttentionResult:
        """As a call, but also returns the log-sum-exp and, with ``top_k``, the weights.

        For ``top_k`` see :func:`attnlab.attention_with_stats`.
        """
        options = {"rngs": rngs, "stats": True, "top_k": top_k}
        where = query_offset, query_positions, key_positions
        return self._whole((query, key, value), mask, where, options)

    def project(
        self,
        key: Array,
        value: Array | None = None,
        *,
        positions: Array | None = None,
    ) -> KeyValue:
        """Projects keys and values once, to be used by :meth:`attend` or a cache.

        Args:
            key: ``[*batch, S, key_features]``.
            value: ``[*batch, S, key_features]``; the key if not given.
            positions: ``[S]`` or ``[*batch, S]``, -1 marks an empty slot; slot numbers
                if not given.
        """
        value = key if value is None else value
        for name, x in (("key", key), ("value", value)):
            check_features(name, x, getattr(self, name))
        key, value = zero_empty(key, positions), zero_empty(value, positions)
        memory = self._memory(self, key, value, positions_of(key, 0, positions))
        keys = project_key(as_arrays(self.score), memory.key, self.precision)
        return memory._replace(key=keys)

    def attend(
        self,
        query: Array,
        memory: KeyValue,
        *,
        mask: Mask | ArrayLike | None = None,
        query_offset: int | ArrayLike = 0,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """As a call, but attends to keys and values that :meth:`project` returned."""
        check_features("query", query, self.query)
        where = positions_of(query, query_offset, query_positions)
        query = zero_empty(query, query_positions)
        found = self._attend(
            self._placed(project(self.query, query), self.query_norm, where),
            memory,
            projected_keys(as_arrays(self.score)),
            inputs=query,
            mask=self.mask if mask is None else self.mask & mask,
            query_offset=query_offset,
            query_positions=query_positions,
            key_positions=key_positions,
            rngs=rngs,
        )
        return self._output(query, found.output)

    def decode(
        self, x: Array, cache: Cache, *, positions: Array | None = None
    ) -> tuple[Array, Cache]:
        """Self-attention of the next tokens, one or several, and those in the cache.

        Args:
            x: ``[B, T, in_features]``.
            cache: keys and values of the tokens before.
            positions: ``[B, T]``, ascending in each example, -1 marks padding; the
                positions that follow those in the cache if not given.

        Returns:
            ``[B, T, out_features]``, and the next cache. A position beyond a full cache
            raises a ValueError; if positions are traced, the example yields NaN.
        """
        check_examples("x", x, cache.length.shape[0], "in_features")
        if positions is None:
            positions = cache.next_positions(x.shape[1])
        new = self.project(x, positions=positions)
        check_type(cache, new.value.dtype)
        following, view = cache.append(*new[:2], positions, *new[2:])
        output = self.attend(
            x,
            new._replace(**{name: getattr(view, name) for name in new._fields}),
            mask=cache.mask(),
            query_positions=positions,
            key_positions=view.positions,
        )
        lost = cache.overflows(positions)[:, None, None]
        return jnp.where(lost, jnp.nan, output), following

    def make_cache(
        self, batch: int, length: int, dtype: DTypeLike = jnp.float32
    ) -> Cache:
        """An empty cache for :meth:`decode`, made by the layer's cache policy.

        Args:
            batch: B, the batch size.
            length: number of slots of a full cache, for positions 0 to ``length - 1``.
            dtype: type of keys and values: the one that the layer computes in.

        Raises:
            ValueError: if the policy keeps less than a window of the mask shows; see
                :meth:`CachePolicy.check`.
        """
        self.cache.check(self.mask, self.num_heads)
        return self.cache.make(
            batch,
            length,
            self.num_key_heads,
            self.compared_size,
            value_size=self.value_size,
            dtype=dtype,
        )

    @property
    def compared_size(self) -> int:
        """Size of a key head as the score projects it; caches have this head size."""
        head = (1, 1, self.num_key_heads, self.head_size)
        keys = jax.ShapeDtypeStruct(head, jnp.float32)
        return jax.eval_shape(as_arrays(self.score).project_key, keys).shape[-1]

    def _whole(
        self,
        given: tuple[Array, Array | None, Array | None],
        mask: Mask | ArrayLike | None,
        where: tuple[int | ArrayLike, Array | None, Array | None],
        options: dict[str, Any],
    ) -> AttentionResult:
        """Attends, and applies the output projection."""
        query, key, value = given
        memory = query if key is None else key
        memory = memory, memory if value is None else value
        found = self._heads(query, memory, mask, where, options)
        return found._replace(output=self._output(query, found.output))

    def _heads(
        self,
        query: Array,
        memory: tuple[Array, Array],
        mask: Mask | ArrayLike | None,
        where: tuple[int | ArrayLike, Array | None, Array | None],
        options: dict[str, Any],
    ) -> AttentionResult:
        """Attends: outputs ``[*batch, T, N, D]``, before the output projection."""
        own = self.mask if mask is None else self.mask & mask
        return self._see(self, query, memory, own, where, options)

    def _see(
        self,
        by: Any,
        query: Array,
        memory: tuple[Array, Array],
        mask: Mask | ArrayLike | None,
        where: tuple[int | ArrayLike, Array | None, Array | None],
        options: dict[str, Any],
    ) -> AttentionResult:
        """Attends with the query, key and value projections of ``by``."""
        for name, x in zip(("query", "key", "value"), (query, *memory), strict=True):
            check_features(name, x, getattr(by, name))
        names = "query_offset", "query_positions", "key_positions"
        seen: dict[str, Any] = {"mask": mask, **dict(zip(names, where, strict=True))}
        query, key, value = zero_hidden(
            query,
            *memory,
            num_heads=self.num_heads,
            num_key_heads=self.num_key_heads,
            **seen,
        )
        at = positions_of(query, *where[:2]), positions_of(key, 0, where[2])
        heads = self._placed(project(by.query, query), self.query_norm, at[0])
        projected = self._memory(by, key, value, at[1])
        score = as_arrays(self.score)
        return self._attend(heads, projected, score, inputs=query, **seen, **options)

    def _memory(self, by: Any, key: Array, value: Array, positions: Array) -> KeyValue:
        """Keys and values by the projections of ``by``; the score projects no keys."""
        keys = self._placed(project(by.key, key), self.key_norm, positions)
        return KeyValue(keys, project(by.value, value))

    def _output(self, query: Array, heads: Array) -> Array:
        """Outputs ``[*batch, T, out_features]`` from the inputs and from the heads."""
        return project(self.out, heads)

    def _placed(
        self, heads: Array, norm: Callable[[Array], Array] | None, positions: Array
    ) -> Array:
        return self.position.rotate(heads if norm is None else norm(heads), positions)

    def _attend(
        self,
        query: Array,
        memory: KeyValue,
        score: Score,
        *,
        inputs: Array,
        rngs: nnx.Rngs | None,
        stats: bool = False,
        **options: Any,
    ) -> AttentionResult:
        """Attends with projected queries; ``inputs`` are what they are made from."""
        rate, rng = 0.0, None
        if self.rngs is not None and not self.deterministic:
            rate = self.dropout_rate
            rng = self.rngs() if rngs is None else rngs.dropout()
        return attend(
            query,
            memory.key,
            memory.value,
            stats=stats,
            score=score,
            modifiers=(*self.position.modifiers(query), *self.modifiers),
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_rate=rate,
            dropout_rng=rng,
            precision=self.precision,
            implementation=self.implementation,
            **options,
        )
