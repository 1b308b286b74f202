"""Attention to what each query selects: blocks of keys that score best."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab._src import arguments
from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.selected import selected
from attnlab._src.masks.structural import causal, sliding_window
from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.cache import KEEP_ALL, KeyValue
from attnlab._src.nn.explicit import project
from attnlab._src.nn.parameters import named
from attnlab._src.nn.projection import Projections, heads_projection, projection
from attnlab._src.ops.selection.blocks import top_blocks
from attnlab._src.ops.selection.pool import pool
from attnlab._src.scores.projected import projected_keys
from attnlab._src.types import Array, ArrayLike, AttentionResult, Score


class MixtureOfBlocks(MultiHeadAttention):
    """Each query of each head attends to the blocks of keys whose means score best.

    The block of the query itself is always among them. Blocks begin at multiples of
    their size: with packed documents a mean may be of keys of two, and only what is
    attended to is kept apart. A cache keeps all positions, in order; a step of decoding
    reads all keys to choose, and the values of the chosen blocks.

    Example:
        >>> layer = MixtureOfBlocks(32, 4, block_size=4, count=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 10, 32))).shape
        (2, 10, 32)

    References:
        Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", 2025,
        section 2.2.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        block_size: int,
        count: int,
        mask: Mask | ArrayLike | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Puts parts together.

        Args:
            in_features: size of the inputs.
            num_heads: N, the number of query heads.
            block_size: keys in a block.
            count: blocks that a query attends to, its own included.
            mask: what a query may choose from; causal if not given.
            rngs: as of :class:`MultiHeadAttention`.
            **options: further arguments of :class:`MultiHeadAttention`.

        Raises:
            ValueError: if the cache policy drops positions, or a size is too small.
        """
        mask = causal() if mask is None else mask
        super().__init__(in_features, num_heads, mask=mask, rngs=rngs, **options)
        check_cache(self)
        arguments.sizes(block_size=block_size, count=count)
        self.block_size, self.count = block_size, count

    def _attend(
        self, query: Array, memory: KeyValue, score: Score, **options: Any
    ) -> AttentionResult:
        # Keys of a cache are projected by the score; so the means are of such keys.
        keys, score = score.project_key(memory.key), projected_keys(score)
        mask = as_mask(options.pop("mask"))
        chosen = top_blocks(
            query,
            _pooled(keys, self.block_size, options),
            self.count,
            key_block=self.block_size,
            score=score,
            mask=mask,
            each_head=True,
            **_places(keys, options),
        )
        mask &= selected(chosen, key_block=self.block_size)
        memory = memory._replace(key=keys)
        return super()._attend(query, memory, score, mask=mask, **options)


class NativeSparseAttention(MultiHeadAttention):
    """Three branches with keys and values of their own, added by learned gates.

    Each query attends to blocks as one learned key and value each (those that have
    passed), to the blocks that these weights choose (key heads choose for the query
    heads that share them), and to a window. A cache keeps all positions, in order.
    Other masks are refused: a block that is one key may hold several documents.

    Example:
        >>> layer = NativeSparseAttention(
        ...     32, 4, block_size=4, count=4, window=4, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((2, 10, 32))).shape
        (2, 10, 32)

    References:
        Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable
        Sparse Attention", 2025, section 3, with compressed blocks that do not overlap
        and are those that are selected (the first case of section 3.3.2), and a
        weighted sum as the learned function of a block.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        block_size: int = 64,
        count: int = 16,
        first: int = 1,
        local: int = 2,
        window: int = 512,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Puts parts together.

        Args:
            in_features: size of the inputs.
            num_heads: N, the number of query heads.
            block_size: keys in a block.
            count: blocks that a query selects.
            first: how many of them are the first ones.
            local: how many are the last ones, up to that of the query itself.
            window: how many positions the window shows, that of the query included.
            rngs: as of :class:`MultiHeadAttention`.
            **options: further arguments of :class:`MultiHeadAttention`, without
                ``mask`` and ``projections``: attention is causal, by linear
                projections.

        Raises:
            TypeError: if a mask is given.
            ValueError: if the cache policy drops positions, or a size is too small.
        """
        if options.get("mask") is not None:
            raise TypeError("mask: the branches have masks of their own")
        super().__init__(
            in_features,
            num_heads,
            mask=causal(),
            projections=_of_branches,
            rngs=rngs,
            **options,
        )
        check_cache(self)
        arguments.sizes(block_size=block_size, count=count, window=window)
        arguments.sizes(0, first=first, local=local)
        self.block_size, self.count = block_size, count
        self.first, self.local, self.window = first, local, window
        heads = self.num_key_heads // 3
        self.compress = nnx.data([
            nnx.Param(
                jnp.full((block_size, heads, size), 1 / block_size),
                **named(None, "key_heads", "head_size"),
            )
            for size in (self.compared_size, self.value_size)
        ])
        self.gates = projection(
            in_features, 3 * num_heads, "heads", use_bias=True, rngs=rngs
        )

    def _output(self, query: Array, heads: Array) -> Array:
        gates = jax.nn.sigmoid(project(self.gates, query))
        gates = gates.reshape(*heads.shape[:-1], 3, 1)
        parts = heads.reshape(*heads.shape[:-1], 3, self.value_size)
        heads = (gates * parts).sum(-2).astype(heads.dtype)
        return super()._output(query, heads)

    def _attend(
        self, query: Array, memory: KeyValue, score: Score, **options: Any
    ) -> AttentionResult:
        """The outputs of the branches, one after another: ``[*batch, T, N, 3 * D]``."""
        if options.get("stats"):
            raise NotImplementedError(
                "with_stats: three branches have no weights in common"
            )
        mask, size = as_mask(options.pop("mask")), self.block_size
        own = causal(), causal() & causal()  # of a call, and of one with a cache
        if jax.tree.structure(mask) not in map(jax.tree.structure, own):
            raise NotImplementedError(
                f"mask: attention is causal, and blocks would mix what {mask!r} keeps "
                "apart; give no mask"
            )
        keys, score = score.project_key(memory.key), projected_keys(score)
        (key, *keys), (value, *values) = map(_branches, (keys, memory.value))
        means = KeyValue(
            *(
                _pooled(x, size, options, weights[...])
                for x, weights in zip((key, value), self.compress, strict=True)
            )
        )
        # A block counts as a key at its last position: it is seen when it has passed.
        ends = jnp.arange(1, means.key.shape[-3] + 1, dtype=jnp.int32) * size - 1
        chosen = top_blocks(
            query,
            means.key,
            self.count,
            key_block=size,
            score=score,
            mask=mask,
            first=self.first,
            local=self.local,
            by="weights",
            **_places(key, options),
        )
        branches: Any = (
            (means, causal(), {"key_positions": ends}),
            (KeyValue(keys[0], values[0]), mask & selected(chosen, key_block=size), {}),
            (
                KeyValue(keys[1], values[1]),
                mask & sliding_window(self.window - 1, 0),
                {},
            ),
        )
        see = super()._attend
        found = [
            see(query, memory, score, **{**options, "mask": seen, **more})
            for memory, seen, more in branches
        ]
        return found[0]._replace(output=jnp.concatenate([x.output for x in found], -1))


def _of_branches(in_features: int, num_heads: int, **options: Any) -> Projections:
    """Linear projections with keys and values for three branches."""
    parts = Projections.linear(in_features, num_heads, **options)
    given = {"key_features", "head_size", "value_size", "out_features", "out_bias"}
    given |= {"num_key_heads", "query_norm", "key_norm"}
    options = {name: x for name, x in options.items() if name not in given}
    options.setdefault("use_bias", True)

    def three(one: nnx.LinearGeneral) -> nnx.LinearGeneral:
        heads, size = one.out_features
        axes = "embed", "key_heads", "head_size"
        return heads_projection(one.in_features, (3 * heads, size), axes, **options)

    return parts._replace(key=three(parts.key), value=three(parts.value))


def _branches(x: Array) -> list[Array]:
    """``[*batch, S, 3 * K, size]`` as three of K heads.

    Heads of a key head are neighbours: devices that divide key heads have all three.
    """
    *lead, heads, size = x.shape
    apart = x.reshape(*lead, heads // 3, 3, size)
    return [apart[..., i, :] for i in range(3)]


def check_cache(layer: MultiHeadAttention) -> None:
    """Raises a ValueError if the layer's caches drop positions."""
    if layer.cache != KEEP_ALL:
        raise ValueError(
            "cache: a query may select any position, so all must be kept, got "
            f"{layer.cache}"
        )


def _pooled(
    x: Array, block_size: int, options: dict[str, Any], how: Any = "mean"
) -> Array:
    """Blocks of keys or values, without empty slots of a cache."""
    positions = options.get("key_positions")
    where = None
    if positions is not None:
        where = jnp.broadcast_to(jnp.asarray(positions) >= 0, x.shape[:-2])
    return pool(x, block_size, how=how, where=where)


def _places(key: Array, options: dict[str, Any]) -> dict[str, Any]:
    """Where queries are; keys are at their slots, as in a cache of all positions."""
    names = "query_offset", "query_positions"
    places = {name: options[name] for name in names if options.get(name) is not None}
    return {"key_length": key.shape[-3], **places}
