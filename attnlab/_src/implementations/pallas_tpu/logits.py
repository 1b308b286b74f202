"""Modifiers, mask and dropout of a block, for the forward and the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.exact import exactly
from attnlab._src.implementations.deferred import scaling_rounds
from attnlab._src.implementations.pallas_tpu.operands import (
    Place,
    Readers,
)
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.tile import kept, modify, widened
from attnlab._src.implementations.visibility import bits, visibility
from attnlab._src.masks.base import Full
from attnlab._src.types import Array, AttentionInputs, PyTree, Tile


class Part(NamedTuple):
    """A part of a block: ``size`` keys from ``first`` on, with all queries."""

    place: Place
    first: int
    size: int

    @property
    def keys(self) -> slice:
        """The slice of the keys within the block."""
        return slice(self.first, self.first + self.size)


class Rules:
    """Applies modifiers, mask and dropout in a kernel, and holds their arrays."""

    def __init__(self, inputs: AttentionInputs, tiles: Tiles, place: Callable):
        """Gathers the arrays.

        Args:
            inputs: the canonical record.
            tiles: tiles of the inputs, with the kernel's block sizes.
            place: see :class:`Readers`.
        """
        self.inputs, self.tiles = inputs, tiles
        self.readers = readers = Readers(tiles, place)
        queries, keys = inputs.position_kinds
        self.positions = (
            None if queries == "index" else readers.add(inputs.query_positions, -1),
            None if keys == "index" else readers.add(inputs.key_positions, -1),
        )
        self.head_scale = None
        if inputs.head_scale is not None and scaling_rounds(inputs):
            self.head_scale = readers.add(inputs.head_scale)
        self.modifiers = jax.tree.map(readers.add, inputs.modifier_operands)
        self.words = jax.tree.map(readers.add, inputs.dropout_words)
        self.padded = tiles.nk * tiles.bk > inputs.sizes.S
        self.visible = None
        if not exactly(inputs.mask, Full):
            self.visible = visibility(
                inputs.mask,
                inputs.mask_operands,
                readers,
                lambda mask, operands: bits(mask, operands, tiles),
            )

    def tile(self, part: Part, refs: Sequence[Any]) -> Tile:
        """The head and the positions of a part, each ``[keys, queries]``."""
        place, first, size = part
        shape = size, self.tiles.bq

        def along(number: int | None, axis: int, start: int | Array) -> Array:
            if number is None:
                return lax.broadcasted_iota(jnp.int32, shape, axis) + start
            return self.read(number, part, refs)

        queries, keys = self.positions
        return Tile(
            along(queries, 1, place.row * self.tiles.bq),
            along(keys, 0, place.col * self.tiles.bk + first),
            place.head,
        )

    def read(self, number: int, part: Part, refs: Sequence[Any]) -> Array:
        """The operand with this number, ``[keys, queries]`` or a scalar."""
        return self.readers.readers[number].read(refs[number], *part)

    def scale(self, part: Part, refs: Sequence[Any]) -> Array | None:
        """``head_scale`` of the head; None if there is none, or if queries have it."""
        if self.head_scale is None:
            return None
        return self.read(self.head_scale, part, refs)

    def modify(
        self, logits: Array, part: Part, refs: Sequence[Any], operands: PyTree
    ) -> Array:
        """Applies the modifiers."""
        if not self.inputs.modifiers:
            return logits
        return modify(self.inputs, logits, self.tile(part, refs), operands)

    def read_modifiers(self, part: Part, refs: Sequence[Any]) -> PyTree:
        """The operands of the modifiers."""
        read = jax.tree.map(lambda n: self.read(n, part, refs), self.modifiers)
        return widened(self.inputs, read)

    def hide(self, logits: Array, part: Part, refs: Sequence[Any]) -> Array:
        """-inf where the mask hides a pair of a partial block."""
        tile = self.tile(part, refs)
        seen = []
        if self.visible is not None:
            seen.append(self.visible(tile, lambda n: self.read(n, part, refs)))
        if self.positions[0] is not None:
            seen.append(tile.query_positions >= 0)
        if self.positions[1] is not None:
            seen.append(tile.key_positions >= 0)
        if self.padded:
            slots = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            start = part.place.col * self.tiles.bk + part.first
            seen.append(slots < self.inputs.sizes.S - start)
        for each in seen:
            logits = jnp.where(each, logits, -jnp.inf)
        return logits

    def kept(self, part: Part, refs: Sequence[Any]) -> Array | None:
        """Which weights dropout keeps; None: all."""
        if self.words is None:
            return None
        row, col = (self.read(n, part, refs) for n in self.words)
        return kept(self.inputs, (row, col))
