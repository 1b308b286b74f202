"""Which part of a pass each device computes: examples, queries and heads."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from attnlab._src.implementations.tile import modifiers_read_head
from attnlab._src.ops.folding import mask_reads_head
from attnlab._src.types import Array, AttentionInputs, Sizes


class Factors(tuple[str | None, ...]):
    """What runs along each axis of an array.

    Examples "b", queries "t", keys "s", query heads "n", key heads "k"; None: anything
    else, which is never sharded.
    """


@dataclasses.dataclass(frozen=True)
class Work:
    """The pass as a whole.

    Attributes:
        structure: pytree structure of the arguments.
        avals: types of their leaves.
        sizes: axis sizes.
        arguments: what runs along the axes of each leaf.
        results: what runs along the axes of each result.
        heads_are_whole: whether every device must have all heads.
        is_forward: whether it is the forward pass.
    """

    structure: Any
    avals: Sequence[Any]
    sizes: Sizes
    arguments: list[Factors]
    results: list[Factors]
    heads_are_whole: bool
    is_forward: bool

    @classmethod
    def of(cls, structure: Any, avals: Sequence[Any], wanted: Any) -> "Work":
        """The pass of an equation of ``attention_p``."""
        inputs, *others = jax.tree.unflatten(structure, avals)
        sides = _factors(inputs, others, wanted)
        whole = reads_head(inputs)
        return cls(structure, avals, inputs.sizes, *sides, whole, wanted is None)

    def local(
        self, run: Callable[..., Sequence[Array]], share: "Share"
    ) -> Callable[..., list[Array]]:
        """What one device runs on its shards."""
        structure = self.structure
        if share.axes["t"]:
            structure = _of_part(structure, self.avals)

        def call(*leaves: Array) -> list[Array]:
            picked = map(share.picked, leaves, self.arguments)
            found = run(*picked, structure=structure)
            if self.is_forward:
                return [*found]
            # A gradient on one device is a part of a sum.
            whole = map(share.put_back, found, self.results)
            return [*map(share.summed, whole, self.results)]

        return call


@dataclasses.dataclass(frozen=True)
class Share:
    """How the pass is divided among devices.

    Attributes:
        axes: the axes of the mesh that shard "b", "t", "n" and "k".
        within: the axes of "n" that divide query heads of one key head, where a device
            has several key heads and needs one of them.
        key_heads: how many it has then.
        devices: how many devices share a key head then.
    """

    axes: dict[str, tuple[str, ...]]
    within: tuple[str, ...] = ()
    key_heads: int = 1
    devices: int = 1

    def picked(self, x: Array, factors: Factors) -> Array:
        """An argument with the key head that the device needs."""
        if not (self.within and "k" in factors):
            return x
        axis = factors.index("k")
        return lax.dynamic_slice_in_dim(x, self._key_head, 1, axis)

    def put_back(self, gradient: Array, factors: Factors) -> Array:
        """The gradient of an argument, given that of what :meth:`picked` returned."""
        if not (self.within and "k" in factors):
            return gradient
        axis = factors.index("k")
        shape = [*gradient.shape]
        shape[axis] = self.key_heads
        zeros = jnp.zeros(shape, gradient.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, gradient, self._key_head, axis)

    @property
    def _key_head(self) -> Array:
        return lax.axis_index(self.within) // self.devices

    def spec(self, factors: Factors) -> PartitionSpec:
        """The sharding of an array."""
        return PartitionSpec(*(self.axes.get(f or "") or None for f in factors))

    def summed(self, gradient: Array, factors: Factors) -> Array:
        """The sum over devices that use the same shard of the argument."""
        own = {axis for factor in factors for axis in self.axes.get(factor or "", ())}
        every = (*self.axes["b"], *self.axes["t"], *self.axes["n"])
        axes = [axis for axis in every if axis not in own]
        return lax.psum(gradient, axes) if axes else gradient


def share_of(
    mesh: Any, places: Sequence[tuple[str, ...]], sizes: Sizes, heads_are_whole: bool
) -> Share:
    """How a pass is divided, given the axes that shard the query."""
    b, t, n = places

    def parts(axes: Sequence[str]) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    b = b if sizes.B % parts(b) == 0 else ()
    t = t if sizes.T % parts(t) == 0 else ()
    n = () if heads_are_whole or sizes.N % parts(n) else n
    # Key heads are sharded by the first of these axes: a device has whole groups of
    # query heads, or a part of one group.
    first = next(i for i in range(len(n), -1, -1) if not sizes.K % parts(n[:i]))
    k, within = n[:first], n[first:]
    here = sizes.K // parts(k)
    devices, uneven = divmod(parts(within), here)
    if here > 1 and within and uneven:
        n = k = within = ()
    elif here == 1:
        within = ()
    axes = {"b": b, "t": t, "n": n, "k": () if sizes.K == 1 else k}
    return Share(axes, within, here, devices)


def reads_head(inputs: AttentionInputs) -> bool:
    """Whether a mask or modifier reads the number of the head, unknown in a shard."""
    return (
        inputs.mask.head_count > 1
        or mask_reads_head(inputs.mask, inputs.mask_operands)
        or modifiers_read_head(inputs)
    )


def _factors(
    inputs: Any, others: Sequence[Any], wanted: Any
) -> tuple[list[Factors], list[Factors]]:
    """What runs along each axis of arguments and results."""
    rows = [None if x is None else _named(x, ("b", "t", "n")) for x in others]
    arguments = jax.tree.leaves((factors_of(inputs), *rows))
    if wanted is not None:
        return arguments, [*itertools.compress(arguments, wanted)]
    output = _named(inputs.query, ("b", "t", "n"))
    return arguments, [output, Factors(output[:3])]


def factors_of(inputs: Any) -> Any:
    """The record with :class:`Factors` instead of arrays."""
    return dataclasses.replace(
        inputs,
        query=_named(inputs.query, ("b", "t", "n")),
        key=_named(inputs.key, ("b", "s", "k")),
        value=_named(inputs.value, ("b", "s", "k")),
        living=tuple(
            None if x is None else _named(x, axes)
            for x, axes in zip(inputs.living, ("bnt", "bks"), strict=True)
        ),
        **{
            name: jax.tree.map(_named, getattr(inputs, name))
            for name in (
                "pair_params",
                "modifier_operands",
                "mask_operands",
                "query_positions",
                "key_positions",
                "dropout_words",
                "head_scale",
            )
        },
    )


def _named(x: Any, axes: Sequence[str] = ("b", "n", "t", "s")) -> Factors:
    """What runs along the axes of an array; those of size 1 are not sharded."""
    named = [f if n > 1 else None for f, n in zip(axes, x.shape, strict=False)]
    return Factors([*named, *[None] * (x.ndim - len(named))])


def _of_part(structure: Any, leaves: Sequence[Any]) -> Any:
    """The structure of arguments whose queries are a shard of the sequence.

    Their positions are slot numbers and an offset, no longer slot numbers alone.
    """
    inputs, *others = jax.tree.unflatten(structure, leaves)
    queries, keys = inputs.position_kinds
    kinds = "offset" if queries == "index" else queries, keys
    inputs = dataclasses.replace(inputs, position_kinds=kinds)
    return jax.tree.structure((inputs, *others))
