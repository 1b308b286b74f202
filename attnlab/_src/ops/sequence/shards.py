"""The record of one device: its queries, and keys that lie here or were sent here."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab._src.masks.base import And
from attnlab._src.masks.structural import prefix
from attnlab._src.ops.sequence.needs import Lengths
from attnlab._src.ops.shares import Factors, factors_of
from attnlab._src.types import Array, AttentionInputs

#: The arrays of a record that belong to keys, in the order of its leaves.
Keys = list[Array]


@dataclasses.dataclass(frozen=True)
class Shards:
    """Which leaves of a record run along queries and keys.

    Attributes:
        axes: axes of the mesh that shard the sequence.
        lengths: of the shards.
        factors: what runs along each leaf of :func:`without_slots`.
    """

    axes: tuple[str, ...]
    lengths: Lengths
    factors: tuple[Factors, ...]

    @classmethod
    def of(cls, inputs: AttentionInputs, axes: tuple[str, ...], count: int) -> "Shards":
        """Of a record whose sequence is cut into ``count`` shards."""
        lengths = Lengths(count, inputs.sizes.T, inputs.sizes.S)
        named = jax.tree.leaves(without_slots(factors_of(inputs)))
        return cls(axes, lengths, tuple(named))

    @property
    def index(self) -> Array:
        """The number of this device's shard."""
        return lax.axis_index(self.axes)

    def padded(self, inputs: AttentionInputs) -> AttentionInputs:
        """The record with both lengths a multiple of the number of shards."""
        lengths = self.lengths
        more = {
            "t": lengths.count * lengths.queries - lengths.query_length,
            "s": lengths.count * lengths.keys - lengths.key_length,
        }
        if not any(more.values()):
            return inputs

        def pad(x: Array, factors: Factors, fill: Any = 0) -> Array:
            widths = [(0, more.get(factor or "", 0)) for factor in factors]
            return jnp.pad(x, widths, constant_values=jnp.asarray(fill, x.dtype))

        named = factors_of(inputs)
        made = jax.tree.map(pad, inputs, named)
        # Slots behind the end: empty where positions are given, else counted on.
        query = pad(inputs.query_positions, named.query_positions, -1)
        if inputs.position_kinds[0] != "given":
            following = jnp.arange(made.sizes.T, dtype=query.dtype)
            query = inputs.query_positions[:, :, :1] + following[None, None, :, None]
        key = pad(inputs.key_positions, named.key_positions, -1)
        return dataclasses.replace(made, query_positions=query, key_positions=key)

    @property
    def queries_move(self) -> bool:
        """Whether queries can be sent: no array runs along both queries and keys."""
        return not any({"t", "s"} <= {*named} for named in self.factors)

    def with_queries(
        self, inputs: AttentionInputs, pick: Callable[[Array, int], Array]
    ) -> AttentionInputs:
        """The record with ``pick(array, axis of queries)`` of what runs along them."""
        leaves, structure = jax.tree.flatten(without_slots(inputs))
        made = [
            pick(x, named.index("t")) if "t" in named else x
            for x, named in zip(leaves, self.factors, strict=True)
        ]
        return dataclasses.replace(
            jax.tree.unflatten(structure, made),
            key_positions=inputs.key_positions,
            position_kinds=("given", inputs.position_kinds[1]),
        )

    def keys(self, inputs: AttentionInputs) -> Keys:
        """What belongs to the keys, to be sent."""
        sent = without_slots(inputs)
        if sent.key_positions is not None:
            # What does not arrive is 0, and must be an empty slot.
            sent = dataclasses.replace(sent, key_positions=sent.key_positions + 1)
        leaves = jax.tree.leaves(sent)
        return [x for x, axis in zip(leaves, self._travel, strict=True) if axis]

    @property
    def _travel(self) -> list[int]:
        """For each leaf the axis of keys, 0 if it is not sent."""
        return [
            0 if "t" in named or "s" not in named else named.index("s")
            for named in self.factors
        ]

    def travels(self, inputs: AttentionInputs) -> list[bool]:
        """For each leaf of the record whether :meth:`keys` has it."""
        structure = jax.tree.structure(without_slots(inputs))
        marks: Any = jax.tree.unflatten(structure, [bool(a) for a in self._travel])
        if marks.key_positions is None:
            marks = dataclasses.replace(marks, key_positions=False)
        return jax.tree.leaves(marks)

    @property
    def slot_axes(self) -> list[int]:
        """For each array of :meth:`keys` the axis of its keys."""
        return [axis for axis in self._travel if axis]

    def each(self, function: Callable[[Array, int], Array], keys: Keys) -> Keys:
        """``function(array, axis of keys)`` of each."""
        return [function(x, a) for x, a in zip(keys, self.slot_axes, strict=True)]

    def joined(self, parts: Sequence[Keys]) -> Keys:
        """Keys one after another."""
        if len(parts) == 1:
            return parts[0]
        return [
            jnp.concatenate(arrays, axis)
            for *arrays, axis in zip(*parts, self.slot_axes, strict=True)
        ]

    def sent(self, keys: Keys, hop: int, wrap: bool = True) -> Keys:
        """Sends keys to the shard ``hop`` places further on; nothing arrives as 0."""
        count = self.lengths.count
        pairs = [
            (shard, (shard + hop) % count)
            for shard in range(count)
            if wrap or 0 <= shard + hop < count
        ]
        return [lax.ppermute(x, self.axes, pairs) for x in keys]

    def with_keys(
        self,
        inputs: AttentionInputs,
        keys: Keys,
        slots: Array,
        *,
        in_order: bool,
        beyond: bool = False,
    ) -> AttentionInputs:
        """The record of this device's queries and of given keys.

        Args:
            inputs: the record of this device.
            keys: as of :meth:`keys`.
            slots: ``[W]`` int32, where in the whole sequence each key lies; below 0 or
                at least S: no key.
            in_order: whether each slot follows the one before it.
            beyond: whether slots behind the last shard may be among them.
        """
        leaves, structure = jax.tree.flatten(without_slots(inputs))
        given = iter(keys)
        total = self.lengths.key_length
        most = self.lengths.count * self.lengths.keys - 1
        made = []
        for x, named, axis in zip(leaves, self.factors, self._travel, strict=True):
            if axis:
                made.append(next(given))
            elif "s" in named:
                made.append(jnp.take(x, slots.clip(0, most), named.index("s")))
            else:
                made.append(x)
        local = jax.tree.unflatten(structure, made)
        queries, kind = inputs.position_kinds
        exists = (slots >= 0) & (slots < total)
        if kind == "given":
            positions = jnp.where(exists, local.key_positions - 1, -1)
        elif in_order:
            kind, positions = "offset", slots[None, None, None]
            local = self.within_length(local, beyond)
        else:
            kind, positions = "given", jnp.where(exists, slots, -1)[None, None, None]
        return dataclasses.replace(
            local,
            key_positions=positions,
            needs_lse=True,
            position_kinds=("offset" if queries == "index" else queries, kind),
        )

    def within_length(
        self, inputs: AttentionInputs, beyond: bool = False
    ) -> AttentionInputs:
        """The record whose mask hides slots behind the end, if there may be some.

        Args:
            inputs: a record whose positions of keys are slots of the whole sequence.
            beyond: whether slots behind the last shard may be among them.
        """
        total = self.lengths.key_length
        if not beyond and total == self.lengths.count * self.lengths.keys:
            return inputs
        return dataclasses.replace(
            inputs,
            mask=And((inputs.mask, prefix(total))),
            mask_operands=(inputs.mask_operands, ()),
        )


def without_slots(inputs: Any) -> Any:
    """The record as it is sent: positions that are slot numbers are not."""
    if inputs.position_kinds[1] == "index":
        return dataclasses.replace(inputs, key_positions=None)
    return inputs
