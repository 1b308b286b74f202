"""Multi-head attention, composed from the pure function."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab._src.masks.base import Mask, as_mask, full
from attnlab._src.nn.anchors import AnchorProjections
from attnlab._src.nn.cache import Cache, KeyValue, check_examples, check_type
from attnlab._src.nn.parameters import (
    GLOROT,
    ZEROS,
    Initializer,
    as_arrays,
    as_params,
    named,
)
from attnlab._src.nn.positions import Positions, as_positions, positions_of, zero_empty
from attnlab._src.nn.projection import check_features, head_sizes
from attnlab._src.ops.attention import attend
from attnlab._src.ops.hidden import zero_hidden
from attnlab._src.ops.prepare import project_key
from attnlab._src.scores.inner import ScaledDot
from attnlab._src.scores.projected import projected_keys
from attnlab._src.types import Array, ArrayLike, AttentionResult, Modifier, Score


class MultiHeadAttention(nnx.Module):
    """Projects to heads, attends, and projects back.

    Self-attention with one argument, cross-attention with two or three.

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
        num_key_heads: int | None = None,
        key_features: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
        out_features: int | None = None,
        score: Score | None = None,
        mask: Mask | ArrayLike | None = None,
        modifiers: Sequence[Modifier] = (),
        position: Positions | None = None,
        query_norm: Callable[[Array], Array] | None = None,
        key_norm: Callable[[Array], Array] | None = None,
        anchors: AnchorProjections | None = None,
        sinks: ArrayLike | None = None,
        dropout_rate: float = 0.0,
        use_bias: bool = True,
        out_bias: bool | None = None,
        implementation: str | None = None,
        precision: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = GLOROT,
        bias_init: Initializer = ZEROS,
        rngs: nnx.Rngs,
    ):
        """Makes the projections.

        Args:
            in_features: of what the queries are made from.
            num_heads: N.
            num_key_heads: K, a divisor of N; N if not given.
            key_features: of what keys and values are made from; ``in_features`` if not
                given.
            head_size: H; ``in_features / num_heads`` if not given.
            value_size: D; H if not given.
            out_features: ``in_features`` if not given.
            score: what similarity is; its arrays are learned. Scaled dot product if
                not given.
            mask: who may attend to whom, in every call.
            modifiers: what is done to the logits; their arrays are not learned.
            position: rotary, ALiBi, relative: what positions do here.
            query_norm: applied to queries ``[*, T, N, H]``.
            key_norm: applied to keys ``[*, S, K, H]``.
            anchors: projections of their own for anchors; ``mask`` says who else sees
                whom (``masks.longformer(...)``).
            sinks: ``[N]`` initial values of learned sinks.
            dropout_rate: of the weights, where the module is not deterministic (see
                ``nnx.Module.train`` and ``eval``).
            use_bias: whether projections add a bias.
            out_bias: whether the output's does; ``use_bias`` if not given.
            implementation: as of :func:`attnlab.attention`.
            precision: of matrix products.
            dtype: of the computation; that of inputs and parameters if not given.
            param_dtype: of the parameters.
            kernel_init: of the weights.
            bias_init: of the biases.
            rngs: Flax's; ``params``, and ``dropout`` where it is used.

        Raises:
            ValueError: if sizes do not fit each other.
            TypeError: if a position or the modifiers are something else.
        """
        if isinstance(modifiers, Modifier):
            raise TypeError("modifiers: expected a sequence; write modifiers=[...]")
        key_heads, head_size = head_sizes(
            in_features, num_heads, num_key_heads, head_size
        )
        value_size = head_size if value_size is None else value_size
        key_features = in_features if key_features is None else key_features
        out_features = in_features if out_features is None else out_features
        self.num_heads, self.num_key_heads = num_heads, key_heads
        self.head_size, self.value_size = head_size, value_size

        def linear(
            inputs: Any, outputs: Any, axes: Sequence[str], bias: bool
        ) -> nnx.LinearGeneral:
            inward = len(inputs)
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=tuple(range(-inward, 0)),
                use_bias=bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                bias_init=bias_init,
                kernel_metadata=named(*axes),
                bias_metadata=named(*axes[inward:]),
                rngs=rngs,
            )

        names = ("embed", "heads", "head_size")
        key_names = ("embed", "key_heads", "head_size")
        keys, values = (key_heads, head_size), (key_heads, value_size)
        self.query = linear((in_features,), (num_heads, head_size), names, use_bias)
        self.key = linear((key_features,), keys, key_names, use_bias)
        self.value = linear((key_features,), values, key_names, use_bias)
        self.out = linear(
            (num_heads, value_size),
            (out_features,),
            ("heads", "head_size", "embed"),
            use_bias if out_bias is None else out_bias,
        )
        score = ScaledDot() if score is None else score
        self.score = nnx.data(as_params(score))
        self.mask = nnx.data(full() if mask is None else as_mask(mask))
        self.modifiers = nnx.data(tuple(modifiers))
        self.position = as_positions(position)
        self.query_norm, self.key_norm, self.anchors = query_norm, key_norm, anchors
        self.sinks: Any = nnx.data(None)
        if sinks is not None:
            self.sinks = nnx.Param(jnp.asarray(sinks, param_dtype), **named("heads"))
        self.dropout_rate, self.deterministic = dropout_rate, False
        self.rngs = rngs.dropout.fork() if dropout_rate > 0 else None
        self.implementation, self.precision = implementation, precision

    def __call__(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        query_offset: Any = 0,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """Attends.

        Queries that see nothing, and keys that no query sees, are zeroed before they
        are projected: with ``masks.lengths(n, n)`` the queries and keys of padding.

        Args:
            query: ``[*batch, T, in_features]``.
            key: ``[*batch, S, key_features]``; the query if not given.
            value: ``[*batch, S, key_features]``; the key if not given.
            mask: of this call, besides the module's own: lengths, documents.
            query_offset: position of the first query.
            query_positions: ``[T]`` or ``[*batch, T]``; -1 = empty.
            key_positions: ``[S]`` or ``[*batch, S]``; -1 = empty.
            rngs: of dropout, instead of the module's own.

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
        query_offset: Any = 0,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
        top_k: int | Literal["all"] | None = None,
    ) -> AttentionResult:
        """As a call, with log-sum-exp and, on request, the weights: for pictures.

        The weights are those of the ordinary projections: rows of ``anchors`` are not
        theirs. For ``top_k`` see :func:`attnlab.attention_with_stats`.
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
        """Keys and values, once for many queries: what :meth:`attend` and caches take.

        Args:
            key: ``[*batch, S, key_features]``.
            value: ``[*batch, S, key_features]``; the key if not given.
            positions: ``[S]`` or ``[*batch, S]``, -1 = empty; slot numbers if not
                given.
        """
        value = key if value is None else value
        for name, x in (("key", key), ("value", value)):
            check_features(name, x, getattr(self, name))
        key, value = zero_empty(key, positions), zero_empty(value, positions)
        where = positions_of(key, 0, positions)
        keys = self._placed(self.key(key), self.key_norm, where)
        keys = project_key(as_arrays(self.score), keys, self.precision)
        return KeyValue(keys, self.value(value))

    def attend(
        self,
        query: Array,
        memory: KeyValue,
        *,
        mask: Mask | ArrayLike | None = None,
        query_offset: Any = 0,
        query_positions: Array | None = None,
        key_positions: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """As a call, to keys and values that :meth:`project` made."""
        if self.anchors is not None:
            raise NotImplementedError("anchors: their own projections need all inputs")
        check_features("query", query, self.query)
        where = positions_of(query, query_offset, query_positions)
        query = self.query(zero_empty(query, query_positions))
        found = self._attend(
            self._placed(query, self.query_norm, where),
            memory,
            projected_keys(as_arrays(self.score)),
            mask=self.mask if mask is None else self.mask & mask,
            query_offset=query_offset,
            query_positions=query_positions,
            key_positions=key_positions,
            rngs=rngs,
        )
        return self.out(found.output)

    def decode(
        self, x: Array, cache: Cache, *, positions: Array | None = None
    ) -> tuple[Array, Cache]:
        """Self-attention of the tokens that come next, one or many.

        Args:
            x: ``[B, T, in_features]``.
            cache: what was held before.
            positions: ``[B, T]``, ascending in each example, -1 = padding; those that
                follow what is held if not given.

        Returns:
            ``[B, T, out_features]``, and the next cache. An example that outgrows a
            full cache is refused; where it is traced, it yields NaN.
        """
        check_examples("x", x, cache.length.shape[0], "in_features")
        if positions is None:
            positions = cache.next_positions(x.shape[1])
        new = self.project(x, positions=positions)
        check_type(cache, new.value.dtype)
        following, view = cache.append(*new, positions)
        output = self.attend(
            x,
            KeyValue(*view[:2]),
            mask=cache.mask(),
            query_positions=positions,
            key_positions=view.positions,
        )
        lost = cache.overflows(positions)[:, None, None]
        return jnp.where(lost, jnp.nan, output), following

    @property
    def compared_size(self) -> int:
        """P: what the score makes of a key's head, the head size of caches."""
        head = (1, 1, self.num_key_heads, self.head_size)
        keys = jax.ShapeDtypeStruct(head, jnp.float32)
        return jax.eval_shape(as_arrays(self.score).project_key, keys).shape[-1]

    def _whole(
        self,
        given: tuple[Array, Array | None, Array | None],
        mask: Mask | ArrayLike | None,
        where: tuple[Any, Array | None, Array | None],
        options: dict[str, Any],
    ) -> AttentionResult:
        """A call: attends by the module's projections, and in some rows by others."""
        query, key, value = given
        memory = query if key is None else key
        memory = memory, memory if value is None else value
        own = self.mask if mask is None else self.mask & mask
        found = self._see(self, query, memory, own, where, options)
        heads = found.output
        if (anchors := self.anchors) is not None:
            slots = anchors.within(query.shape[-2])
            at = positions_of(query, *where[:2])[..., slots]
            rows = self._see(
                anchors,
                query[..., slots, :],
                memory,
                anchors.rows(mask, query.shape[-2]),
                (0, at, where[2]),
                {**options, "top_k": None},
            )
            heads = heads.at[..., slots, :, :].set(rows.output)
        return found._replace(output=self.out(heads))

    def _see(
        self,
        by: Any,
        query: Array,
        memory: tuple[Array, Array],
        mask: Any,
        where: tuple[Any, Array | None, Array | None],
        options: dict[str, Any],
    ) -> AttentionResult:
        """Attends by the projections of ``by``."""
        for name, x in zip(("query", "key", "value"), (query, *memory), strict=True):
            check_features(name, x, getattr(by, name))
        names = "query_offset", "query_positions", "key_positions"
        seen: dict[str, Any] = {"mask": mask, **dict(zip(names, where, strict=True))}
        query, key, value = zero_hidden(
            query, *memory, num_heads=self.num_heads, **seen
        )
        at = positions_of(query, *where[:2]), positions_of(key, 0, where[2])
        query = self._placed(by.query(query), self.query_norm, at[0])
        key = self._placed(by.key(key), self.key_norm, at[1])
        values = KeyValue(key, by.value(value))
        return self._attend(query, values, as_arrays(self.score), **seen, **options)

    def _placed(self, heads: Array, norm: Any, positions: Array) -> Array:
        return self.position.rotate(heads if norm is None else norm(heads), positions)

    def _attend(
        self,
        query: Array,
        memory: KeyValue,
        score: Score,
        *,
        rngs: nnx.Rngs | None,
        stats: bool = False,
        **options: Any,
    ) -> AttentionResult:
        rate, rng = 0.0, None
        if self.rngs is not None and not self.deterministic:
            rate = self.dropout_rate
            rng = self.rngs() if rngs is None else rngs.dropout()
        return attend(
            query,
            *memory,
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
