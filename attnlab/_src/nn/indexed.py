"""Attention to the keys that an indexer chooses for each query."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnlab._src import arguments
from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.selected import selected
from attnlab._src.masks.structural import causal
from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.cache import Cache, KeyValue
from attnlab._src.nn.explicit import project
from attnlab._src.nn.positions import positions_of
from attnlab._src.nn.projection import heads_projection
from attnlab._src.nn.selecting import check_cache
from attnlab._src.ops.selection.indexing import index_loss
from attnlab._src.ops.selection.keys import top_keys
from attnlab._src.scores.projected import projected_keys
from attnlab._src.types import Array, ArrayLike, AttentionResult, Score


class IndexedKeyValue(NamedTuple):
    """Keys and values ready for attention, and keys of an indexer.

    Attributes:
        key: ``[*batch, S, K, H]``, projected, normalised and rotated.
        value: ``[*batch, S, K, D]``.
        index: ``[*batch, S, P]``.
    """

    key: Array
    value: Array
    index: Array


class IndexLoss(nnx.Intermediate):
    """The loss of an indexer, a scalar; see :class:`IndexedAttention`."""


class IndexedAttention(MultiHeadAttention):
    """Each query attends to the keys that an indexer, a small attention, scores best.

    No gradient flows through the choice, and none from the indexer into the rest of the
    model: the indexer learns by a loss of its own, its distance from the weights of
    attention (:func:`attnlab.select.index_loss`), whose mean over all queries a call
    sows, if ``learn`` says so. To train a model from the beginning, use ``learn="all"``
    for the first steps and ``learn="selected"`` for the others::

        model.set_attributes(IndexedAttention, learn="selected")

        def loss(model, tokens, labels):
            logits, losses = nnx.capture(model, IndexLoss)(tokens)
            return loss_of(logits, labels) + sum(jax.tree.leaves(losses))

    A cache keeps all positions, and the indexer's keys beside the others.

    Example:
        >>> layer = IndexedAttention(32, 4, count=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 10, 32))).shape
        (2, 10, 32)

    References:
        DeepSeek-AI, "DeepSeek-V3.2-Exp", 2025, section 1 (equations 1 and 2) and
        section 2.1 (equations 3 and 4).
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        count: int,
        index_heads: int = 4,
        index_size: int = 32,
        learn: Literal["all", "selected"] | None = None,
        mask: Mask | ArrayLike | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Puts parts together.

        Args:
            in_features: size of the inputs.
            num_heads: N, the number of query heads.
            count: keys that a query attends to.
            index_heads: J, the number of the indexer's heads.
            index_size: size of its heads and of its keys.
            learn: what the indexer learns from, while the module is in training (see
                ``nnx.Module.train`` and ``eval``). None: nothing. "all": attention to
                all that the mask shows; nothing is chosen. "selected": attention to the
                chosen keys.
            mask: what a query may choose from; causal if not given.
            rngs: as of :class:`MultiHeadAttention`.
            **options: further arguments of :class:`MultiHeadAttention`.

        Raises:
            ValueError: if the cache policy drops positions, ``learn`` is unknown, or a
                size is less than 1.
        """
        mask = causal() if mask is None else mask
        super().__init__(in_features, num_heads, mask=mask, rngs=rngs, **options)
        check_cache(self)
        _check_learn(learn)
        arguments.sizes(count=count, index_heads=index_heads, index_size=index_size)
        self.count, self.learn = count, learn
        into = {
            "use_bias": False,
            "dtype": options.get("dtype"),
            "param_dtype": options.get("param_dtype", jnp.float32),
            "precision": self.precision,
            "rngs": rngs,
        }
        features = (options.get("key_features") or in_features,)
        heads = (index_heads, index_size)
        names = "embed", None, None
        self.index_query = heads_projection((in_features,), heads, names, **into)
        self.index_key = heads_projection(features, (1, index_size), names, **into)
        self.index_weights = heads_projection(
            (in_features,), (index_heads,), names[:2], **into
        )

    def make_cache(
        self, batch: int, length: int, dtype: DTypeLike = jnp.float32
    ) -> Cache:
        """As of :class:`MultiHeadAttention`, with keys of the indexer."""
        size = self.index_key.out_features[-1]
        index = jnp.zeros((batch, length, size), dtype)
        cache = super().make_cache(batch, length, dtype)
        return dataclasses.replace(cache, index=index)

    def _memory(self, by: Any, key: Array, value: Array, positions: Array) -> Any:
        inputs = jax.lax.stop_gradient(key)
        index = self.position.rotate(project(self.index_key, inputs), positions)
        memory = super()._memory(by, key, value, positions)
        return IndexedKeyValue(*memory, index[..., 0, :])

    def _attend(
        self,
        query: Array,
        memory: Any,
        score: Score,
        *,
        inputs: Array,
        **options: Any,
    ) -> AttentionResult:
        _check_learn(self.learn)
        mask = as_mask(options.pop("mask"))
        names = "query_offset", "query_positions", "key_positions"
        where = {name: options[name] for name in names if options.get(name) is not None}
        if not isinstance(memory, IndexedKeyValue):
            raise TypeError(
                "memory: expected an IndexedKeyValue, as project returns it here, "
                f"got {type(memory).__name__}"
            )
        own = jax.lax.stop_gradient(inputs)
        at = positions_of(own, options["query_offset"], options["query_positions"])
        small = self.position.rotate(project(self.index_query, own), at)
        # The factor keeps scores, which a softmax compares, near those of attention.
        count, size = small.shape[-2:]
        weights = project(self.index_weights, own) * (count * size) ** -0.5
        indexer = small, memory.index, weights
        # Keys of a cache are projected by the score.
        keys, score = score.project_key(memory.key), projected_keys(score)
        learn = None if self.deterministic else self.learn
        chosen, seen = None, mask
        if learn != "all":
            chosen = top_keys(*indexer, self.count, mask=mask, **where)
            seen = mask & selected(chosen)
        if learn is not None:
            lost = index_loss(
                indexer,
                query,
                keys,
                chosen=chosen,
                mask=mask,
                score=score,
                modifiers=(*self.position.modifiers(query), *self.modifiers),
                sinks=None if self.sinks is None else self.sinks[...],
                **where,
            )
            self.sow(IndexLoss, "index_loss", lost.mean(), _latest, lambda: None)
        memory = KeyValue(keys, memory.value)
        return super()._attend(
            query, memory, score, inputs=inputs, mask=seen, **options
        )


def _latest(_: Any, loss: Array) -> Array:
    return loss


def _check_learn(learn: Any) -> None:
    if learn not in (None, "all", "selected"):
        raise ValueError(f"learn: expected None, 'all' or 'selected', got {learn!r}")
