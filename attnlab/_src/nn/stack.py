"""A stack of Transformer blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab._src.masks.base import Mask
from attnlab._src.nn.blocks import Block, BlockState
from attnlab._src.nn.cache import Cache
from attnlab._src.nn.layers import Layer
from attnlab._src.types import Array, ArrayLike


class Stack(nnx.Module):
    """Blocks one after another, and a final norm.

    ``remat`` and ``scan`` change memory and compile time, not results.

    Example:
        >>> from attnlab.nn import FeedForward, MultiHeadAttention, PreNorm
        >>> rngs = nnx.Rngs(0)
        >>> def block():
        ...     return Block(
        ...         MultiHeadAttention(8, 2, rngs=rngs),
        ...         FeedForward(8, 32, rngs=rngs),
        ...         residual=lambda: PreNorm(nnx.LayerNorm(8, rngs=rngs)),
        ...     )
        >>> stack = Stack([block() for _ in range(3)], scan=True)
        >>> stack(jnp.ones((1, 5, 8))).shape
        (1, 5, 8)
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        norm: Layer | None = None,
        remat: bool = False,
        scan: bool = False,
    ):
        """Puts blocks together.

        Args:
            blocks: blocks, which may differ (in their masks, for example); with
                ``scan`` all must have the same structure.
            norm: applied to the last block's output (pre-norm Transformers need it).
            remat: whether the backward pass recomputes the intermediate results of a
                block instead of storing them. (XLA on CPU reverts this unless ``scan``
                is on, too.)
            scan: whether parameters are stacked and one compiled block runs in a loop
                over them.

        Raises:
            ValueError: if there is no block, or with ``scan`` if structures differ.
        """
        if not blocks:
            raise ValueError("blocks: expected at least one, got none")
        self.count, self.norm = len(blocks), norm
        self.remat, self.scan = remat, scan
        self.blocks: Any  # a list, or one block with stacked parameters
        if not scan:
            self.blocks = nnx.List(blocks)
            return
        split = [nnx.split(block) for block in blocks]
        if any(structure != split[0][0] for structure, _ in split[1:]):
            raise ValueError("scan: the blocks differ in structure; use scan=False")
        states = [state for _, state in split]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        self.blocks = nnx.merge(split[0][0], stacked)
        _lead_with_layers(self.blocks)

    def __call__(
        self,
        x: Array,
        memory: Array | None = None,
        *,
        mask: Mask | ArrayLike | None = None,
        memory_mask: Mask | ArrayLike | None = None,
        query_positions: Array | None = None,
    ) -> Array:
        """Applies all blocks and the norm; arguments as of :class:`Block`."""

        def run(block: Block, x: Array) -> Array:
            return block(
                x,
                memory,
                mask=mask,
                memory_mask=memory_mask,
                query_positions=query_positions,
            )

        if self.remat:
            run = nnx.remat(run)
        if self.scan:
            x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
                self.blocks, x
            )
        else:
            for block in self.blocks:
                x = run(block, x)
        return x if self.norm is None else self.norm(x)

    def decode(
        self,
        x: Array,
        states: Sequence[BlockState],
        *,
        memory_mask: Mask | ArrayLike | None = None,
        positions: Array | None = None,
    ) -> tuple[Array, tuple[BlockState, ...]]:
        """Applies blocks and norm to the next tokens; see :meth:`Block.decode`."""
        following = []
        for block, state in zip(self.each(), states, strict=True):
            x, after = block.decode(
                x, state, memory_mask=memory_mask, positions=positions
            )
            following.append(after)
        return (x if self.norm is None else self.norm(x)), tuple(following)

    def start(
        self, make_cache: Callable[[Block], Cache], memory: Array | None = None
    ) -> tuple[BlockState, ...]:
        """The states before the first step.

        Args:
            make_cache: makes each block's cache.
            memory: ``[B, S, features]``, for cross-attention.
        """
        return tuple(b.start(make_cache(b), memory) for b in self.each())

    def each(self) -> list[Block]:
        """A list of the blocks; with ``scan``, of copies."""
        if not self.scan:
            return list(self.blocks)
        structure, state = nnx.split(self.blocks)
        cut = [jax.tree.map(lambda x, i=i: x[i], state) for i in range(self.count)]
        return [nnx.merge(structure, part) for part in cut]


def _lead_with_layers(block: Block) -> None:
    """Names the first axis, along which parameters are stacked, ``layers``."""
    for _, variable in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        names = variable.get_metadata().get("out_sharding")
        if names:
            variable.set_metadata(out_sharding=("layers", *names))
