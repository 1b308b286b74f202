"""A Transformer block: attention and feed-forward layers with residuals."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from attnlab._src.exact import exactly
from attnlab._src.masks.base import Full, Mask
from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.cache import Cache, KeyValue
from attnlab._src.nn.layers import Residual
from attnlab._src.nn.positions import Positions, zero_empty
from attnlab._src.ops.hidden import zero_hidden
from attnlab._src.types import Array, ArrayLike


class BlockState(NamedTuple):
    """State of a block between steps of decoding.

    Attributes:
        cache: cache of its self-attention.
        memory: projected keys and values of its cross-attention, or None.
    """

    cache: Cache
    memory: KeyValue | None = None


class Block(nnx.Module):
    """Self-attention, optional cross-attention, feed-forward; each with a residual.

    With a causal mask in its self-attention it is a decoder block, without one an
    encoder block.

    Example:
        >>> from attnlab.nn import FeedForward, PreNorm
        >>> rngs = nnx.Rngs(0)
        >>> block = Block(
        ...     MultiHeadAttention(8, 2, rngs=rngs),
        ...     FeedForward(8, 32, rngs=rngs),
        ...     residual=lambda: PreNorm(nnx.LayerNorm(8, rngs=rngs)),
        ... )
        >>> block(jnp.ones((1, 5, 8))).shape
        (1, 5, 8)

    References:
        Vaswani et al., 2017, section 3.1, figure 1.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        feed_forward: nnx.Module,
        *,
        cross_attention: MultiHeadAttention | None = None,
        residual: Callable[[], Residual],
    ):
        """Puts parts together.

        Args:
            attention: self-attention.
            feed_forward: ``[*, features] -> [*, features]``.
            cross_attention: attention to a memory, between the other two.
            residual: makes a residual connection; called once for each layer.
        """
        self.attention, self.feed_forward = attention, feed_forward
        self.cross_attention = cross_attention
        self.attention_residual = residual()
        self.cross_residual = None if cross_attention is None else residual()
        self.feed_forward_residual = residual()

    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        memory_mask: Mask | ArrayLike | None = None,
        query_positions: Array | None = None,
    ) -> Array:
        """Applies the block to a sequence.

        Args:
            x: ``[*batch, T, features]``. A token is replaced by zeros if, by this
                call's mask and positions, it neither attends nor is attended to.
            memory: ``[*batch, S, features of memory]``, for the cross-attention.
            mask: mask of this call for the self-attention: lengths, documents.
            memory_mask: mask of this call for the cross-attention.
            query_positions: positions of ``x``, ``[T]`` or ``[*batch, T]``; -1 marks an
                empty slot.

        Returns:
            ``[*batch, T, features]``.
        """
        x = self._zero_padding(x, mask, query_positions)

        def attend(x: Array) -> Array:
            return self.attention(
                x,
                mask=mask,
                query_positions=query_positions,
                key_positions=query_positions,
            )

        x = self.attention_residual(x, attend)
        x = self._cross(
            x,
            memory,
            lambda cross, x, memory: cross(
                x,
                memory,
                mask=memory_mask,
                query_positions=_needed(cross, memory_mask, query_positions),
            ),
        )
        return self._feed(x)

    def decode(
        self,
        x: Array,
        state: BlockState,
        *,
        memory_mask: Mask | ArrayLike | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, BlockState]:
        """Applies it to the next tokens, see :meth:`MultiHeadAttention.decode`."""
        following: list[Cache] = []
        x = zero_empty(x, positions)
        if positions is None:
            positions = state.cache.next_positions(x.shape[1])

        def attend(x: Array) -> Array:
            output, cache = self.attention.decode(x, state.cache, positions=positions)
            following.append(cache)
            return output

        x = self.attention_residual(x, attend)
        x = self._cross(
            x,
            state.memory,
            lambda cross, x, memory: cross.attend(
                x,
                memory,
                mask=memory_mask,
                query_positions=_needed(cross, memory_mask, positions),
            ),
        )
        return self._feed(x), state._replace(cache=following[0])

    def types(self, x: Array) -> tuple[Array, Array]:
        """Queries of the self-attention and an output of the block: for their types.

        It skips the attention itself, and so needs neither a cache nor a memory.
        """
        found: list[Array] = []

        def stand_in(attention: MultiHeadAttention, x: Array) -> Array:
            query, norm = attention.query(x), attention.query_norm
            found.append(query if norm is None else norm(query))
            heads = (*query.shape[:-1], attention.value_size)
            return attention.out(jnp.zeros(heads, found[-1].dtype))

        x = self.attention_residual(x, lambda x: stand_in(self.attention, x))
        cross, residual = self.cross_attention, self.cross_residual
        if cross is not None and residual is not None:
            x = residual(x, lambda x: stand_in(cross, x))
        return found[0], self._feed(x)

    def start(self, cache: Cache, memory: Array | None = None) -> BlockState:
        """The state before the first step: projects the memory, once."""
        if memory is None or self.cross_attention is None:
            return BlockState(cache)
        return BlockState(cache, self.cross_attention.project(memory))

    def _zero_padding(
        self, x: Array, mask: Mask | ArrayLike | None, positions: Array | None
    ) -> Array:
        if mask is None and positions is None:
            return x
        slots = jnp.ones((*x.shape[:-1], 1), bool)
        sees, seen = zero_hidden(
            slots,
            slots,
            num_heads=self.attention.num_heads,
            num_key_heads=self.attention.num_key_heads,
            mask=mask,
            query_positions=positions,
            key_positions=positions,
        )
        return jnp.where(sees | seen, x, jnp.zeros((), x.dtype))

    def _feed(self, x: Array) -> Array:
        def feed(x: Array) -> Array:
            return self.feed_forward(x)

        # nnx.tabulate can show a function that is handed over, but not a module.
        return self.feed_forward_residual(x, feed)

    def _cross(
        self, x: Array, memory: Array | KeyValue | None, attend: Callable[..., Array]
    ) -> Array:
        """Applies ``attend(cross_attention, x, memory)``, if there is one."""
        cross, residual = self.cross_attention, self.cross_residual
        if cross is None or residual is None:
            if memory is not None:
                raise ValueError(
                    "memory: the block has no cross_attention that could use it"
                )
            return x
        if memory is None:
            raise ValueError("memory: the block's cross_attention needs one, got None")
        return residual(x, lambda x: attend(cross, x, memory))


def _needed(
    cross: MultiHeadAttention, mask: Mask | ArrayLike | None, positions: Array | None
) -> Array | None:
    """``positions``, or None if no part of the cross-attention depends on them.

    Without them, planning depends on slot numbers alone.
    """
    silent = (
        exactly(cross, MultiHeadAttention)
        and mask is None
        and exactly(cross.mask, Full)
        and not cross.modifiers
        and exactly(cross.position, Positions)
    )
    return None if silent else positions
