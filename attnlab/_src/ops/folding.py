"""Folds the mapped axis of ``vmap`` into the heads or the batch; kernels see no other.

Where keys and values are not mapped, it folds into the query heads that share a key
head, so that no keys are copied; otherwise into the batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.exact import exactly
from attnlab._src.implementations.tile import modifiers_read_head
from attnlab._src.masks.base import And, Mask, Not, Or
from attnlab._src.masks.per_head import PerHead
from attnlab._src.masks.planning import reads_head
from attnlab._src.masks.selected import Selected
from attnlab._src.ops.choice import chosen_name
from attnlab._src.types import Array, AttentionInputs, PyTree

#: Arguments of a pass: the inputs; for a backward pass also arrays ``[B, T, N, ...]``.
Given = tuple[PyTree, ...]
#: Which leaves of the inputs need a gradient; None: the pass is a forward pass.
Wanted = tuple[bool, ...] | None


class IntoBatch(NamedTuple):
    """Each entry of the mapped axis becomes B examples of the batch.

    Attributes:
        size: of the mapped axis.
        batch: B.
    """

    size: int
    batch: int

    def fold(self, mapped: Given, given: Given, wanted: Wanted) -> Given:
        """Query, key, value and leaves with a gradient get the full batch axis.

        Other arrays that are not mapped stay shared where their batch axis is 1.
        """
        marks, structure = jax.tree.flatten(mapped[0])
        leaves = jax.tree.leaves(given[0])
        flags = (False,) * len(leaves) if wanted is None else wanted
        inputs = [
            self._one(mark, leaf, on or place < 3)
            for place, (mark, leaf, on) in enumerate(
                zip(marks, leaves, flags, strict=True)
            )
        ]
        others = jax.tree.map(self._one, mapped[1:], given[1:])
        return jax.tree.unflatten(structure, inputs), *others

    def _one(self, mark: bool, x: Array, spread: bool = True) -> Array:
        if not mark and x.shape[0] == 1 and not spread:
            return x
        if not mark:
            x = jnp.broadcast_to(x, (self.size, *x.shape))
        if x.shape[1] != self.batch:
            x = jnp.broadcast_to(x, (self.size, self.batch, *x.shape[2:]))
        return x.reshape(self.size * self.batch, *x.shape[2:])

    def unfold(self, found: Sequence[Array], batches: Sequence[int]) -> list[Array]:
        """Results with the mapped axis in front.

        Args:
            found: the results of the pass.
            batches: size of each result's batch axis without the mapped one, B or 1.
        """
        result = []
        for folded, own in zip(found, batches, strict=True):
            x = folded.reshape(self.size, self.batch, *folded.shape[1:])
            result.append(x.sum(1, keepdims=True) if own < self.batch else x)
        return result


class IntoHeads(NamedTuple):
    """Each entry of the mapped axis becomes N heads.

    Heads that share a key head are adjacent: the axis of heads is ``[K, size, group]``.

    Attributes:
        size: of the mapped axis.
        key_heads: K.
        group: how many heads share a key head.
    """

    size: int
    key_heads: int
    group: int

    def fold(self, mapped: Given, given: Given, wanted: Wanted) -> Given:
        """Key and value, and arrays that all heads share, stay as they are."""
        inputs, marks = given[0], mapped[0]
        parts = jax.tree.map(self._operand, _operands(marks), _operands(inputs))
        living = inputs.living[1]
        if marks.living[1]:  # live for some entry; the masks of others hide it
            living = living.any(0)
        query, *others = jax.tree.map(
            self._by_token, (marks.query, *mapped[1:]), (inputs.query, *given[1:])
        )
        parts["living"] = parts["living"], living
        parts["mask"] = self._mask(inputs.mask)
        return dataclasses.replace(inputs, query=query, **parts), *others

    def _operand(self, mark: bool, x: Array) -> Array:
        if not mark and x.shape[1] == 1:
            return x
        return self._one(mark, x, 1)

    def _mask(self, mask: Mask) -> Mask:
        """The mask, in which each head keeps its part of ``per_head``."""

        def one(mask: PyTree) -> PyTree:
            if isinstance(mask, Selected):
                return dataclasses.replace(mask, grouped=False)
            if not exactly(mask, PerHead):
                return mask
            order = np.asarray(mask.order).reshape(self.key_heads, 1, self.group)
            spread = np.repeat(order, self.size, 1).reshape(-1)
            return dataclasses.replace(mask, which=tuple(spread.tolist()))

        return jax.tree.map(
            one, mask, is_leaf=lambda m: exactly(m, PerHead) or isinstance(m, Selected)
        )

    def _by_token(self, mark: bool, x: Array) -> Array:
        return self._one(mark, x, 2)

    def _one(self, mark: bool, x: Array, axis: int) -> Array:
        """``axis``: where the heads (1 or N) are, not counting the mapped axis."""
        x = jnp.moveaxis(x, 0, axis) if mark else jnp.expand_dims(x, axis)
        lead, rest = x.shape[:axis], x.shape[axis + 2 :]
        size, heads = x.shape[axis : axis + 2]
        groups = (1, 1) if heads == 1 else (self.key_heads, self.group)
        x = x.reshape(*lead, size, *groups, *rest).swapaxes(axis, axis + 1)
        x = jnp.broadcast_to(x, (*lead, self.key_heads, self.size, self.group, *rest))
        return x.reshape(*lead, -1, *rest)

    def unfold(self, found: Sequence[Array], batches: Sequence[int]) -> list[Array]:
        """Results ``[B, T, N, ...]`` with the mapped axis in front."""

        def one(x: Array) -> Array:
            lead, rest = x.shape[:2], x.shape[3:]
            x = x.reshape(*lead, self.key_heads, self.size, self.group, *rest)
            return jnp.moveaxis(x, 3, 0).reshape(self.size, *lead, -1, *rest)

        return [one(x) for x in found]


def _operands(inputs: AttentionInputs) -> dict[str, PyTree]:
    """Arrays whose second axis is that of the heads, N or 1."""
    names = ("pair_params", "modifier_operands", "mask_operands", "dropout_words")
    names = (*names, "query_positions", "key_positions", "head_scale")
    parts = {name: getattr(inputs, name) for name in names}
    return parts | {"living": inputs.living[0]}


def fold_of(
    size: int, mapped: Given, given: Given, wanted: Wanted, name: str | None
) -> IntoBatch | IntoHeads:
    """The fold that copies less.

    Args:
        size: of the mapped axis.
        mapped: which leaves have it as their first axis.
        given: the arguments of the pass.
        wanted: see ``Wanted``.
        name: the implementation asked for; None: the automatic choice.
    """
    inputs, marks = given[0], mapped[0]
    heads, key_heads = inputs.query.shape[-2], inputs.key.shape[-2]
    into_batch = IntoBatch(size, inputs.query.shape[1 if marks.query else 0])
    into_heads = IntoHeads(size, key_heads, heads // key_heads)
    # Plans take no positions that differ by head; each entry has its own gradients.
    along = marks.key, marks.value, marks.query_positions, marks.key_positions
    if any(along) or (wanted is not None and any(wanted[1:])):
        return into_batch

    def folded(fold: IntoBatch | IntoHeads) -> AttentionInputs:
        return jax.eval_shape(lambda x: fold.fold(mapped, x, wanted), given)[0]

    def held(inputs: AttentionInputs) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inputs))

    alone = folded(into_batch)
    shared = folded(into_heads)
    if held(alone) < held(shared):
        return into_batch
    if modifiers_read_head(alone) or mask_reads_head(alone.mask, alone.mask_operands):
        return into_batch
    # Operands of ``per_head`` masks cannot differ by head.
    of_head = alone.mask.head_count > 1 and any(jax.tree.leaves(marks.mask_operands))
    # More heads for each key head must not lead to another implementation.
    if of_head or chosen_name(alone, name) != chosen_name(shared, name):
        return into_batch
    return into_heads


def mask_reads_head(mask: Mask, operands: PyTree) -> bool:
    """Whether a rule of the user's reads the number of the head."""
    if exactly(mask, And, Or, PerHead):
        parts = zip(mask.parts, operands, strict=True)
        return any(mask_reads_head(part, own) for part, own in parts)
    if exactly(mask, Not):
        return mask_reads_head(mask.part, operands)
    return reads_head(mask, operands)
