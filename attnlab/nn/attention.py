"""Multi-head attention, composed from the pure function."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import scores
from attnlab.masks import Mask, as_mask, full
from attnlab.nn.anchors import AnchorProjections
from attnlab.nn.cache import Cache, KeyValue, check_examples, check_type
from attnlab.nn.parameters import (
    GLOROT,
    ZEROS,
    Initializer,
    as_arrays,
    as_params,
    named,
)
from attnlab.nn.positions import Positions, as_positions, positions_of
from attnlab.nn.projection import check_features
from attnlab.ops import attention_with_stats, project_key
from attnlab.types import Array, ArrayLike, AttentionResult, Modifier, Score


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
        key_heads = num_heads if num_key_heads is None else num_key_heads
        if key_heads < 1 or num_heads % key_heads:
            raise ValueError(
                f"num_key_heads: expected a divisor of num_heads={num_heads}, "
                f"got {key_heads}"
            )
        if head_size is None:
            if in_features % num_heads:
                raise ValueError(
                    f"num_heads: {num_heads} heads do not divide in_features="
                    f"{in_features}; give head_size="
                )
            head_size = in_features // num_heads
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
        score = scores.scaled_dot() if score is None else score
        self.score = nnx.data(as_params(score))
        self.mask = nnx.data(full() if mask is None else as_mask(mask))
        self.modifiers = nnx.data(tuple(modifiers))
        self.position = as_positions(position)
        self.query_norm, self.key_norm, self.anchors = query_norm, key_norm, anchors
        self.sinks = nnx.data(
            None
            if sinks is None
            else nnx.Param(jnp.asarray(sinks, param_dtype), **named("heads"))
        )
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
        return self.with_stats(
            query,
            key,
            value,
            mask=mask,
            query_offset=query_offset,
            query_positions=query_positions,
            key_positions=key_positions,
            rngs=rngs,
        ).output

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
        check_features("query", query, self.query)
        key = query if key is None else key
        where = positions_of(query, query_offset, query_positions)
        found = self._attend(
            self._query(query, where),
            self.project(key, value, positions=key_positions, compare=False),
            self._score(),
            mask=self.mask if mask is None else self.mask & mask,
            query_offset=query_offset,
            query_positions=query_positions,
            key_positions=key_positions,
            rngs=rngs,
            top_k=top_k,
        )
        heads = found.output
        if (anchors := self.anchors) is not None:
            key_at = positions_of(key, 0, key_positions)

            def attend(own: Array, memory: KeyValue, slots: Array) -> AttentionResult:
                at = where[..., slots]
                keys = self._placed(memory.key, self.key_norm, key_at)
                return self._attend(
                    self._placed(own, self.query_norm, at),
                    memory._replace(key=keys),
                    self._score(),
                    mask=anchors.rows(mask, where.shape[-1]),
                    query_positions=at,
                    key_positions=key_positions,
                    rngs=rngs,
                )

            heads = anchors.replace_rows(heads, query, key, value, attend)
        return found._replace(output=self.out(heads))

    def project(
        self,
        key: Array,
        value: Array | None = None,
        *,
        positions: Array | None = None,
        compare: bool = True,
    ) -> KeyValue:
        """Keys and values, once for many queries.

        Args:
            key: ``[*batch, S, key_features]``.
            value: ``[*batch, S, key_features]``; the key if not given.
            positions: ``[S]`` or ``[*batch, S]``; slot numbers if not given.
            compare: whether keys are projected by the score, too: what
                :meth:`attend` and caches take.
        """
        check_features("key", key, self.key)
        if value is not None:
            check_features("value", value, self.value)
        keys = self._placed(
            self.key(key), self.key_norm, positions_of(key, 0, positions)
        )
        if compare:
            keys = project_key(self._score(), keys, self.precision)
        return KeyValue(keys, self.value(key if value is None else value))

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
        found = self._attend(
            self._query(query, where),
            memory,
            scores.projected_keys(self._score()),
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
            KeyValue(view.key, view.value),
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
        return jax.eval_shape(self._score().project_key, keys).shape[-1]

    def _score(self) -> Score:
        return as_arrays(self.score)

    def _query(self, x: Array, positions: Array) -> Array:
        return self._placed(self.query(x), self.query_norm, positions)

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
        rngs: nnx.Rngs | None,
        **options: Any,
    ) -> AttentionResult:
        rate, rng = 0.0, None
        if self.rngs is not None and not self.deterministic:
            rate = self.dropout_rate
            rng = self.rngs() if rngs is None else rngs.dropout()
        return attention_with_stats(
            query,
            *memory,
            score=score,
            modifiers=(*self.position.modifiers(query), *self.modifiers),
            sinks=None if self.sinks is None else self.sinks[...],
            dropout_rate=rate,
            dropout_rng=rng,
            precision=self.precision,
            implementation=self.implementation,
            **options,
        )
