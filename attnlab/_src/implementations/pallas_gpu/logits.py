"""Scale, modifiers, mask and dropout of a tile, for all passes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab._src.exact import exactly
from attnlab._src.implementations.pallas_gpu.call import LOG2_E
from attnlab._src.implementations.pallas_gpu.operands import Place, Readers, iota
from attnlab._src.implementations.pallas_gpu.substitute import knows, substituted
from attnlab._src.implementations.schedule import Tiles
from attnlab._src.implementations.tile import kept, modify, widened
from attnlab._src.implementations.visibility import bits, visibility
from attnlab._src.masks.base import Full
from attnlab._src.types import Array, PyTree, Tile

#: From a gradient of the logits to that of scaled inner products, and to those of
#: operands of modifiers, by number; each is a tile.
Pull = Callable[[Array], tuple[Array, dict[int, Array]]]


class Rules:
    """Makes logits of inner products in a kernel, and holds the arrays for that."""

    def __init__(self, tiles: Tiles, transposed: bool = False):
        """Gathers the arrays.

        Args:
            tiles: tiles of the inputs, with the kernel's block sizes.
            transposed: whether tiles of logits are ``[keys, queries]``.
        """
        self._tiles, self._axes = tiles, (1, 0) if transposed else (0, 1)
        self._inputs = inputs = tiles.inputs
        self._readers = readers = Readers(tiles, transposed)
        queries, keys = inputs.position_kinds
        self._positions = (
            None if queries == "index" else readers.add(inputs.query_positions, -1),
            None if keys == "index" else readers.add(inputs.key_positions, -1),
        )
        scale = inputs.head_scale
        self._head_scale = None if scale is None else readers.add(scale)
        self._modifiers = jax.tree.map(readers.add, inputs.modifier_operands)
        self._words = jax.tree.map(readers.add, inputs.dropout_words)
        self._padded = tiles.nk * tiles.bk > inputs.sizes.S
        self._visible = None
        if not exactly(inputs.mask, Full):
            self._visible = visibility(
                inputs.mask,
                inputs.mask_operands,
                readers,
                lambda mask, operands: bits(mask, operands, tiles),
                knows,
            )

    @property
    def arrays(self) -> list[Array]:
        """The arrays that a kernel needs for them."""
        return self._readers.arrays

    def _tile(self, at: Place, refs: Sequence[Any]) -> Tile:
        """The head and the positions, in the orientation of the tile."""

        def positions(side: int, start: Array) -> Array:
            number = self._positions[side]
            if number is None:
                return iota(at.shape, self._axes[side]) + start
            return self._readers.read(number, refs, at)

        return Tile(positions(0, at.query), positions(1, at.key), at.head)

    def _scale(self, z: Array, at: Place, refs: Sequence[Any], factor: float) -> Array:
        factor *= self._inputs.logit_scale
        if factor != 1:
            z = z * factor
        if self._head_scale is None:
            return z
        return z * self._readers.read(self._head_scale, refs, at)

    def scale_again(self, d: Array, at: Place, refs: Sequence[Any]) -> Array:
        """A gradient of inner products times ``head_scale``, if there is one."""
        if self._head_scale is None:
            return d
        return d * self._readers.read(self._head_scale, refs, at)

    @property
    def to_base_2(self) -> float:
        """The factor of logits and log-sum-exp in the exponent of 2.

        Without modifiers the scale of the logits contains it. A modifier may add the
        lowest finite number, which must not become infinite.
        """
        return LOG2_E if self._inputs.modifiers else 1.0

    def logits(self, z: Array, at: Place, refs: Sequence[Any], masked: bool) -> Array:
        """Logits of inner products, see ``to_base_2``; -inf where a pair is hidden."""
        if self._inputs.modifiers:
            z = self._scale(z, at, refs, 1.0)
            operands = self._operands(at, refs)
            tile = self._tile(at, refs)
            z = substituted(
                lambda z, own: modify(self._inputs, z, tile, own), z, operands
            )
        else:
            z = self._scale(z, at, refs, LOG2_E)
        return self._hide(z, at, refs) if masked else z

    def logits_again(
        self,
        z: Array,
        at: Place,
        refs: Sequence[Any],
        masked: bool,
        learned: Sequence[int],
    ) -> tuple[Array, Pull]:
        """As ``logits``, and the pullback of the modifiers.

        Args:
            z: inner products.
            at: the tile.
            refs: references to the arrays.
            masked: whether some pair may be hidden.
            learned: numbers of the operands of modifiers whose gradients are wanted.
        """
        if not self._inputs.modifiers:
            return self.logits(z, at, refs, masked), lambda d: (d, {})
        tile = self._tile(at, refs)
        leaves, structure = jax.tree.flatten(self._operands(at, refs))
        scaled = self._scale(z, at, refs, 1.0)
        wanted = {n: leaves[n] for n in learned}

        def apply(z: Array, wanted: dict[int, Array]) -> Array:
            each = [wanted.get(n, x) for n, x in enumerate(leaves)]
            operands = jax.tree.unflatten(structure, each)
            return modify(self._inputs, z, tile, operands)

        def unmodify(z: Array, wanted: dict[int, Array], d: Array) -> Any:
            return jax.vjp(apply, z, wanted)[1](d)

        found = substituted(apply, scaled, wanted)

        def pull(d: Array) -> tuple[Array, dict[int, Array]]:
            # A modifier's derivative need not be finite at hidden pairs.
            hidden = d == 0
            pulled = substituted(unmodify, scaled, wanted, d)
            return jax.tree.map(lambda x: jnp.where(hidden, 0.0, x), pulled)

        return self._hide(found, at, refs) if masked else found, pull

    def _operands(self, at: Place, refs: Sequence[Any]) -> PyTree:
        """The operands of the modifiers, each a tile."""

        def read(number: int) -> Array:
            return self._readers.read(number, refs, at)

        return widened(self._inputs, jax.tree.map(read, self._modifiers))

    def _hide(self, z: Array, at: Place, refs: Sequence[Any]) -> Array:
        """-inf where the mask hides a pair of a partial block."""
        tile = self._tile(at, refs)
        seen = []
        if self._visible is not None:
            seen.append(self._visible(tile, lambda n: self._readers.read(n, refs, at)))
        if self._positions[0] is not None:
            seen.append(tile.query_positions >= 0)
        if self._positions[1] is not None:
            seen.append(tile.key_positions >= 0)
        if self._padded:
            left = self._inputs.sizes.S - at.key
            seen.append(iota(at.shape, self._axes[1]) < left)
        for each in seen:
            z = jnp.where(each, z, -jnp.inf)
        return z

    def kept(self, at: Place, refs: Sequence[Any]) -> Array | None:
        """Which weights dropout keeps; None: all."""
        if self._words is None:
            return None
        row, col = (self._readers.read(n, refs, at) for n in self._words)
        return kept(self._inputs, (row, col))
