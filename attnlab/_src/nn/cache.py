"""Caches of decoded keys and values: pytrees of a fixed size."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from attnlab._src import arguments
from attnlab._src.masks.base import Mask
from attnlab._src.masks.intervals import FAR
from attnlab._src.masks.rule import checked_visible
from attnlab._src.masks.structural import causal, prefix, sliding_window
from attnlab._src.types import Array, ArrayLike, Tile, pytree, static


class KeyValue(NamedTuple):
    """Keys and values ready for attention.

    Attributes:
        key: ``[*batch, S, K, P]``, projected, normalised and rotated.
        value: ``[*batch, S, K, D]``.
    """

    key: Array
    value: Array


class View(NamedTuple):
    """Keys and values that the queries of one step attend to.

    Attributes:
        key: ``[B, S, K, P]``.
        value: ``[B, S, K, D]``.
        positions: ``[B, S]``, -1 marks an empty slot.
        index: ``[B, S, P]``, keys of an indexer, or None.
    """

    key: Array
    value: Array
    positions: Array
    index: Array | None = None


@pytree
class Cache:
    """A full cache, a ring buffer, or anchor slots followed by a ring buffer.

    Make one with :func:`full_cache`, :func:`ring_cache` or :func:`streaming_cache`.
    Examples of a batch may be at different positions: each slot stores its own.

    Attributes:
        key: ``[B, slots, K, P]``.
        value: ``[B, slots, K, D]``.
        positions: ``[B, slots]`` int32: position in each slot, -1 marks an empty slot.
        length: ``[B]`` int32: one past the greatest position written so far.
        index: ``[B, slots, P]``, keys of an indexer, or None.
        anchors: number of first positions that are never overwritten.
        window: number of slots of the ring after the anchors; None: there is no ring.
    """

    key: Array
    value: Array
    positions: Array
    length: Array
    index: Array | None
    anchors: int = static()
    window: int | None = static()

    def next_positions(self, count: int) -> Array:
        """``[B, count]``: the positions that follow those in the cache."""
        steps = jnp.arange(count, dtype=jnp.int32)[None]
        # Clipped at the greatest position, so that int32 does not overflow.
        return jnp.minimum(self.length[:, None], FAR - steps) + steps

    def mask(self) -> Mask:
        """The mask of attention to those keys that the cache keeps."""
        if self.window is None:
            return causal()
        recent = sliding_window(self.window - 1, 0)
        return causal() & (recent | prefix(self.anchors)) if self.anchors else recent

    def append(
        self, key: Array, value: Array, positions: Array, index: Array | None = None
    ) -> tuple["Cache", View]:
        """Adds T tokens.

        Args:
            key: ``[B, T, K, P]``.
            value: ``[B, T, K, D]``.
            positions: ``[B, T]``, ascending in each example; -1 marks padding.
            index: ``[B, T, P]``, keys of an indexer, if the cache keeps them.

        Returns:
            The next cache, and the keys and values for the T queries, old and new ones,
            including those that the ring of the next cache no longer keeps.

        Raises:
            TypeError: if positions are not integers.
            ValueError: if a position (not traced) does not fit a full cache, or is not
                below the greatest int32; or if ``index`` does not fit the cache.
        """
        if (index is None) != (self.index is None):
            raise ValueError(
                "index: expected keys of an indexer for a cache that keeps them, and "
                "only then; the layer's make_cache makes one"
            )
        positions = jnp.asarray(arguments.integers("positions", positions))
        lost = self.overflows(positions)
        if not isinstance(lost, jax.core.Tracer) and lost.any():
            what = f"a full cache of {self.positions.shape[1]}"
            hint = "make it longer, or use a ring"
            if self.window is not None:
                what = f"a ring, which holds positions below {FAR}"
                hint = "start a new cache"
            raise ValueError(
                f"cache: position {positions.max()} does not fit {what}; {hint}"
            )
        last = jnp.maximum(self.length, jnp.minimum(positions.max(1), FAR - 1) + 1)
        slots = self._slots(positions, last)

        def set_slots(into: Array, slots: Array, new: Array) -> Array:
            return into.at[slots].set(new, mode="drop")

        def write(into: Array, new: Array) -> Array:
            # Mapped over examples, not indexed by them: sharded caches are not sent.
            return jax.vmap(set_slots)(into, slots, new.astype(into.dtype))

        held = View(self.key, self.value, self.positions, self.index)
        new = View(key, value, positions, index)
        written = jax.tree.map(write, held, new)
        following = dataclasses.replace(self, length=last, **written._asdict())
        if self.window is None or key.shape[1] == 1:
            return following, written
        # Late keys overwrite slots that early queries of this call attend to.
        return following, jax.tree.map(
            lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 1), held, new
        )

    def _slots(self, positions: Array, last: Array) -> Array:
        """The slot each position is written to; one past the end if it is dropped."""
        count = self.positions.shape[1]
        slots = positions
        dropped = positions < 0
        if self.window is not None:
            ring = positions - self.anchors
            slots = jnp.where(ring < 0, slots, self.anchors + ring % self.window)
            dropped |= (ring >= 0) & (positions < last[:, None] - self.window)
        return jnp.where(dropped, count, slots)

    def overflows(self, positions: Array) -> Array:
        """``[B]``: whether a position exceeds the slots, or leaves no next int32."""
        end = self.positions.shape[1] if self.window is None else FAR
        return (positions >= end).any(1)

    def take(self, examples: Array) -> "Cache":
        """The cache of the examples with these indices ``[B']``: reorders beams."""
        return jax.tree.map(lambda x: jnp.take(x, examples, axis=0), self)


def _empty(
    batch: int,
    slots: int,
    num_heads: int,
    head_size: int,
    value_size: int | None,
    dtype: DTypeLike,
    anchors: int,
    window: int | None,
) -> Cache:
    value_size = head_size if value_size is None else value_size
    return Cache(
        jnp.zeros((batch, slots, num_heads, head_size), dtype),
        jnp.zeros((batch, slots, num_heads, value_size), dtype),
        jnp.full((batch, slots), -1, jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        None,
        anchors=anchors,
        window=window,
    )


def full_cache(
    batch: int,
    length: int,
    num_heads: int,
    head_size: int,
    *,
    value_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """An empty cache with a slot for each position.

    Args:
        batch: B, the batch size.
        length: number of slots, for positions 0 to ``length - 1``.
        num_heads: K, the number of key and value heads.
        head_size: P, the size of a key head as the score projects it.
        value_size: D; ``head_size`` if not given.
        dtype: type of keys and values.

    Example:
        >>> full_cache(2, 16, 4, 8).key.shape
        (2, 16, 4, 8)
    """
    _at_least("length", length, 1)
    return _empty(batch, length, num_heads, head_size, value_size, dtype, 0, None)


def ring_cache(
    batch: int,
    window: int,
    num_heads: int,
    head_size: int,
    *,
    value_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """An empty cache that keeps the last ``window`` positions, with the current one.

    It suffices for ``sliding_window(window - 1, 0)``. Arguments as of
    :func:`full_cache`.

    Example:
        >>> from flax import nnx
        >>> from attnlab import masks
        >>> from attnlab.nn import MultiHeadAttention
        >>> layer = MultiHeadAttention(
        ...     8, 2, mask=masks.sliding_window(3, 0), rngs=nnx.Rngs(0)
        ... )
        >>> cache = ring_cache(1, 4, 2, 4)
        >>> for _ in range(6):
        ...     output, cache = layer.decode(jnp.ones((1, 1, 8)), cache)
        >>> cache.positions
        Array([[4, 5, 2, 3]], dtype=int32)
    """
    _at_least("window", window, 1)
    return _empty(batch, window, num_heads, head_size, value_size, dtype, 0, window)


def streaming_cache(
    batch: int,
    anchors: int,
    window: int,
    num_heads: int,
    head_size: int,
    *,
    value_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Cache:
    """An empty cache that keeps the first ``anchors`` and last ``window`` positions.

    Decoding can go on without end. Arguments as of :func:`full_cache`.

    Example:
        >>> cache = streaming_cache(1, 2, 3, 1, 4)
        >>> key = jnp.ones((1, 8, 1, 4))
        >>> cache, view = cache.append(key, key, jnp.arange(8)[None])
        >>> cache.positions
        Array([[0, 1, 5, 6, 7]], dtype=int32)

    References:
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023,
        section 3.2 (here keys keep their positions in the text, not in the cache).
    """
    _at_least("anchors", anchors, 1)
    _at_least("window", window, 1)
    slots = anchors + window
    return _empty(
        batch, slots, num_heads, head_size, value_size, dtype, anchors, window
    )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """Which positions the cache of a layer keeps when it decodes.

    Attributes:
        window: number of last positions, that of the query included, so that a causal
            window of W positions back needs W + 1; None: all positions.
        anchors: number of first positions kept besides the window.

    Example:
        >>> from flax import nnx
        >>> from attnlab import masks
        >>> from attnlab.nn import MultiHeadAttention
        >>> layer = MultiHeadAttention(
        ...     8,
        ...     2,
        ...     mask=masks.sliding_window(3, 0),
        ...     cache=CachePolicy(window=4),
        ...     rngs=nnx.Rngs(0),
        ... )
        >>> layer.make_cache(batch=1, length=1000).key.shape
        (1, 4, 2, 4)
    """

    window: int | None = None
    anchors: int = 0

    def __post_init__(self) -> None:
        if self.window is not None:
            _at_least("window", self.window, 1)
        _at_least("anchors", self.anchors, 0)
        if self.window is None and self.anchors:
            raise ValueError(
                "anchors: expected 0 without a window, as all positions are kept, got "
                f"{self.anchors}"
            )

    def make(self, batch: int, length: int, *sizes: int, **types: Any) -> Cache:
        """An empty cache; arguments as of :func:`full_cache`."""
        if self.window is None:
            return full_cache(batch, length, *sizes, **types)
        if not self.anchors:
            return ring_cache(batch, self.window, *sizes, **types)
        return streaming_cache(batch, self.anchors, self.window, *sizes, **types)

    def check(self, mask: Mask, heads: int) -> None:
        """Refuses a mask that is made for a longer window, or for more anchors.

        Decoding would differ from a call with all tokens. A mask that shows all of the
        past is accepted: then the policy is what limits it. One with arrays is, too.

        Args:
            mask: the mask of a layer.
            heads: N, the number of query heads.

        Raises:
            ValueError: if a query sees some positions that are not kept, but not all.
        """
        if self.window is None or jax.tree.leaves(mask):
            return
        operands = mask.operands(1, 1)
        if jax.tree.leaves(operands):
            return
        some = np.arange(64, dtype=np.int32)
        last = min(2**20 + self.window + self.anchors, FAR // 2)
        oldest = last - self.window  # what a query at ``last`` needs, but is dropped
        middle = np.linspace(self.anchors + 64, oldest - 64, 64, dtype=np.int32)
        keys = np.concatenate([oldest - some, self.anchors + some, middle])
        tile = functools.partial(Tile, last + some[:, None], keys[None])
        with jax.ensure_compile_time_eval():
            each = jax.vmap(lambda head: checked_visible(mask, tile(head), operands))
            seen = np.asarray(each(jnp.arange(heads)))
        shown = np.broadcast_to(seen, (heads, 64, len(keys)))
        near, first, past = shown.any((0, 1)).reshape(3, 64)
        if past.all():
            return
        if near.any():
            more = 1 + int(np.flatnonzero(near).max())
            needed = f"window={self.window + more}" if more < 64 else "a longer window"
        elif first.any():
            more = 1 + int(np.flatnonzero(first).max())
            needed = f"anchors={self.anchors + more}" if more < 64 else "more anchors"
        elif past.any():
            needed = "a cache of all positions"
        else:
            return
        raise ValueError(
            f"cache: CachePolicy(window={self.window}, anchors={self.anchors}) drops "
            f"positions that the mask shows, {mask!r}; it needs {needed} (a window "
            "counts the position of the query itself)"
        )


#: The default policy: a full cache.
KEEP_ALL = CachePolicy()


def check_examples(name: str, x: ArrayLike, batch: int, *features: str) -> None:
    """Raises unless x is ``[B, T, *features]`` with the batch size B of the caches."""
    if x.ndim != 2 + len(features) or x.shape[0] != batch:
        axes = ", ".join([str(batch), "T", *features])
        raise ValueError(
            f"{name}: expected [{axes}], as the caches are of a batch of {batch}, got "
            f"shape {x.shape}; start a state with this batch size"
        )


def check_type(cache: Cache, dtype: np.dtype) -> None:
    """Raises if the cache has another type than the layer computes in."""
    if cache.key.dtype != dtype:
        raise TypeError(
            f"cache: expected dtype {dtype}, which the layer computes in, got "
            f"{cache.key.dtype}; make it with dtype=jnp.{dtype}, or by "
            "start(..., dtype=None), which chooses it"
        )
