"""Attention whose anchors have projections of their own."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab._src.masks.base import Mask, as_mask
from attnlab._src.masks.geometry import Blocks
from attnlab._src.masks.rule import Bounds
from attnlab._src.nn.attention import MultiHeadAttention
from attnlab._src.nn.cache import KeyValue
from attnlab._src.nn.positions import positions_of
from attnlab._src.nn.projection import heads_projection
from attnlab._src.types import (
    Array,
    ArrayLike,
    AttentionResult,
    Operand,
    PyTree,
    Tile,
    pytree,
    static,
)


@pytree
class Rows(Mask):
    """Some query rows of another mask: slices its arrays to those query slots."""

    whole: Mask
    slots: tuple[int, ...] = static()
    length: int = static()

    def operands(self, query_length: int, key_length: int) -> PyTree:
        """See :class:`attnlab.masks.Mask`; the query length is the number of slots."""

        def cut(operand: Operand) -> Operand:
            array = jnp.asarray(operand.array)
            axis = array.ndim - operand.payload - 2
            if axis < 0 or array.shape[axis] == 1:
                return operand
            taken = jnp.take(array, np.asarray(self.slots), axis)
            return Operand(taken, operand.payload)

        given = self.whole.operands(self.length, key_length)
        return jax.tree.map(cut, given, is_leaf=lambda x: isinstance(x, Operand))

    def visible(self, tile: Tile, operands: PyTree) -> Array:
        """See :class:`attnlab.masks.Mask`."""
        return self.whole.visible(tile, operands)

    def bounds(self, rows: Blocks, cols: Blocks, operands: PyTree) -> Bounds:
        """See :class:`attnlab.masks.Mask`."""
        return self.whole.bounds(rows, cols, operands)

    def may_be_alive(self, side: str, operands: PyTree) -> Array | None:
        """See :class:`attnlab.masks.Mask`."""
        return self.whole.may_be_alive(side, operands)

    def __repr__(self) -> str:
        return f"rows {list(self.slots)} of {self.whole!r}"


class AnchorProjections(nnx.Module):
    """Query, key and value projections for the anchors of :class:`AnchoredAttention`.

    Longformer calls them the projections of global attention.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        head_size: int,
        *,
        positions: int | Sequence[int],
        **options: Any,
    ):
        """Makes the three projections.

        Args:
            in_features: size of the residual stream.
            num_heads: N, the number of query heads.
            head_size: H, the size of a query or key head.
            positions: slots of the anchors; an int A stands for the first A slots.
            **options: further arguments of ``flax.nnx.LinearGeneral``: ``rngs``, and
                ``use_bias``, ``dtype``, ``param_dtype``, ``precision``,
                ``kernel_init``.
        """
        if isinstance(positions, int):
            positions = range(positions)
        self.slots = tuple(int(p) for p in positions)
        if not self.slots or min(self.slots) < 0:
            raise ValueError(f"positions: expected slots >= 0, got {self.slots}")
        self.query, self.key, self.value = (
            heads_projection(
                (in_features,),
                (num_heads, head_size),
                ("embed", "heads", "head_size"),
                **options,
            )
            for _ in range(3)
        )

    def rows(self, mask: Mask | ArrayLike | None, length: int) -> Mask | None:
        """The rows of the anchors in a mask of ``length`` queries."""
        return None if mask is None else Rows(as_mask(mask), self.slots, length)

    def within(self, length: int) -> np.ndarray:
        """The slots of the anchors, checked against ``length``, the number of queries.

        Raises:
            ValueError: if a slot is beyond the queries.
        """
        slots = np.asarray(self.slots, np.int32)
        if slots.max() >= length:
            raise ValueError(
                f"anchors: slot {slots.max()} is beyond the {length} queries"
            )
        return slots


class AnchoredAttention(MultiHeadAttention):
    """Multi-head attention whose anchors have projections of their own.

    Queries of anchors attend to all keys by the anchors' query, key and value
    projections; position encoding and norms are shared. All other queries attend, to
    anchors, too, by the ordinary projections.

    Example:
        >>> from attnlab import masks
        >>> rngs = nnx.Rngs(0)
        >>> layer = AnchoredAttention(
        ...     8,
        ...     2,
        ...     mask=masks.longformer(window=2, anchors=1),
        ...     anchors=AnchorProjections(8, 2, 4, positions=1, rngs=rngs),
        ...     rngs=rngs,
        ... )
        >>> layer(jnp.ones((1, 10, 8))).shape
        (1, 10, 8)

    References:
        Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1 ("Linear Projections for
        Global Attention").
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        anchors: AnchorProjections,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Puts parts together.

        Args:
            in_features: size of the residual stream.
            num_heads: N, the number of query heads.
            anchors: slots and projections of the anchors. Their queries attend to all
                keys that the mask of the call allows; ``mask``, for instance
                ``masks.longformer(...)``, applies to the other queries.
            rngs: Flax's random streams.
            **options: further arguments of :class:`MultiHeadAttention`.
        """
        super().__init__(in_features, num_heads, rngs=rngs, **options)
        self.anchors = anchors

    def attend(self, query: Array, memory: KeyValue, **options: Any) -> Array:
        """Not supported: anchors project the inputs with projections of their own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "attend: anchors have projections of their own, which need the inputs, not "
            "projected keys and values; call the layer instead"
        )

    def _heads(
        self,
        query: Array,
        memory: tuple[Array, Array],
        mask: Mask | ArrayLike | None,
        where: tuple[int | ArrayLike, Array | None, Array | None],
        options: dict[str, Any],
    ) -> AttentionResult:
        """Ordinary attention, then the output rows of the anchors are replaced.

        Log-sum-exp and weights stay those of the ordinary attention.
        """
        found = super()._heads(query, memory, mask, where, options)
        length = query.shape[-2]
        slots = self.anchors.within(length)
        at = positions_of(query, *where[:2])[..., slots]
        rows = self._see(
            self.anchors,
            query[..., slots, :],
            memory,
            self.anchors.rows(mask, length),
            (0, at, where[2]),
            {**options, "top_k": None},
        )
        return found._replace(output=found.output.at[..., slots, :, :].set(rows.output))
