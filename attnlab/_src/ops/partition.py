"""One pass on several devices: each computes its examples, heads and queries.

When XLA partitions a program (``jit`` with shardings), it cannot look into a kernel: it
would gather every array, and every device would compute everything. This module gives
it a rule (Shardy's) that names which axes of the arrays correspond, and the function
that a device runs on its shards: the same pass with fewer examples, heads or queries.
Nothing is sent, but for gradients of arrays that several devices use: they are summed.

References:
    https://openxla.org/shardy/overview
    ``jax.experimental.custom_partitioning``
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab._src.implementations.tile import modifiers_read_head
from attnlab._src.ops.choice import default_platform
from attnlab._src.ops.folding import mask_reads_head
from attnlab._src.types import Array, AttentionInputs, Sizes


class Factors(tuple[str | None, ...]):
    """What runs along each axis of an array.

    Examples "b", queries "t", keys "s", query heads "n", key heads "k"; None: anything
    else, which is never sharded.
    """


def is_divided(axis_context: Any) -> bool:
    """Whether the arrays are one device's shards, as inside a ``shard_map``.

    Args:
        axis_context: of the module that is lowered.
    """
    manual = getattr(axis_context, "manual_axes", None)
    return manual is not None and set(manual) == set(axis_context.mesh.axis_names)


def spans_devices(axis_context: Any) -> bool:
    """Whether XLA partitions the program among several devices.

    Args:
        axis_context: of the module that is lowered.
    """
    if hasattr(axis_context, "manual_axes"):
        return not is_divided(axis_context)
    return (getattr(axis_context, "num_devices", None) or 1) > 1


@contextlib.contextmanager
def mesh_for(platforms: Sequence[str], is_share: bool) -> Iterator[None]:
    """The mesh under which a pass is traced.

    Kernels for TPU ask for the generation: a TPU v4 is assumed where none is known.

    Args:
        platforms: which the program is for.
        is_share: whether the arrays are one device's share already; then there is no
            mesh to divide them over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if "tpu" in platforms and device is None and default_platform() != "tpu":
        device = jax.sharding.AbstractDevice("TPU v4", 1, "tpu")
    axes = mesh.axis_sizes, mesh.axis_names, mesh.axis_types
    if is_share:
        axes = (), (), ()
    made = jax.sharding.AbstractMesh(*axes, abstract_device=device)
    with jax.sharding.use_abstract_mesh(made):
        yield


#: What one device runs on its shards, traced when it is lowered: where the user has set
#: a mesh, JAX would trace it under that mesh, whose axes are not those of the shards.
_shard_p = jax.extend.core.Primitive("attention_shard")
_shard_p.multiple_results = True


@_shard_p.def_abstract_eval
def _types(*avals: Any, run: Callable[..., list[Array]]) -> list[Any]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
    found = jax.eval_shape(run, *shapes)
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in found]


def _lower(ctx: Any, *values: Any, run: Callable[..., list[Array]]) -> Sequence[Any]:
    platforms = ctx.platforms or ctx.module_context.platforms
    avals = [jax.core.ShapedArray(x.shape, x.dtype, x.weak_type) for x in ctx.avals_in]
    with mesh_for(platforms, is_share=True):
        return mlir.lower_fun(run)(ctx.replace(avals_in=avals), *values)


mlir.register_lowering(_shard_p, _lower)


@functools.cache
def needs_devices() -> Any:
    """A parameter by which JAX gives a primitive's lowering the devices.

    JAX does so for a ``custom_partitioning`` in any program that a primitive has as a
    parameter. This one is never run.
    """
    same = custom_partitioning(lambda x: x)
    same.def_partition(partition=None, sharding_rule="i -> i")
    with jax.ensure_compile_time_eval():
        return jax.make_jaxpr(same)(jax.ShapeDtypeStruct((1,), jnp.float32))


def divided(
    run: Callable[..., Sequence[Array]],
    structure: Any,
    avals: Sequence[Any],
    wanted: Any,
) -> Callable[..., Sequence[Array]]:
    """A pass that XLA can partition.

    Args:
        run: ``run(*leaves, structure=)``: the pass itself.
        structure: of the arguments, as of ``attention_p``.
        avals: of its leaves.
        wanted: as of ``attention_p``.
    """
    work = Work.of(structure, avals, wanted)
    rule, options = _rule(work)

    def partition(_: Any, given: Sequence[Any], __: Any) -> Any:
        mesh, places = _places(given[1].sharding, work.sizes)
        share = _share(mesh, places, work)

        def shardings(side: Sequence[Factors]) -> list[NamedSharding]:
            return [NamedSharding(mesh, share.spec(factors)) for factors in side]

        local = work.local(run, share)

        def call(mark: Array, *leaves: Array) -> list[Array]:
            return _shard_p.bind(*leaves, run=local)

        given_by = [Factors([None]), *work.arguments]
        return mesh, call, shardings(work.results), tuple(shardings(given_by))

    @custom_partitioning
    def call(mark: Array, *leaves: Array) -> Sequence[Array]:
        return run(*leaves, structure=structure)

    # An axis of the user's mesh may be split between two axes of an array, which has no
    # spec: shardings are read from the devices' indices instead.
    call.def_partition(
        partition=partition, sharding_rule=rule, decode_shardings=False, **options
    )
    # In the text of a program ``partition`` is an address, and another mask need not
    # show at all. JAX's compilation cache must not take one program for another.
    mark = np.frombuffer(secrets.token_bytes(16), np.uint32)
    return functools.partial(call, mark)


def divided_as_placed(
    run: Callable[..., Sequence[Array]],
    structure: Any,
    avals: Sequence[Any],
    wanted: Any,
    place: NamedSharding,
) -> Callable[..., Sequence[Array]]:
    """As :func:`divided`, where the sharding of the query is known beforehand.

    Args:
        run: as above.
        structure: as above.
        avals: as above.
        wanted: as above.
        place: the sharding of the query, ``[B, T, N]``.
    """
    work = Work.of(structure, avals, wanted)
    share = _share(place.mesh, [*map(_names, place.spec)], work)
    return jax.shard_map(
        work.local(run, share),
        mesh=place.mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=tuple(map(share.spec, work.arguments)),
        out_specs=[*map(share.spec, work.results)],
        check_vma=False,
    )


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


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
        whole = _reads_head(inputs)
        return cls(structure, avals, inputs.sizes, *sides, whole, wanted is None)

    def local(
        self, run: Callable[..., Sequence[Array]], share: "Share"
    ) -> Callable[..., list[Array]]:
        """What one device runs on its shards."""
        structure = self.structure
        if share.axes["t"]:
            structure = _of_part(structure, self.avals)

        def call(*leaves: Array) -> list[Array]:
            own = map(share.own_head, leaves, self.arguments)
            found = run(*own, structure=structure)
            # A gradient on one device is a part of a sum.
            if self.is_forward:
                return [*found]
            return [*map(share.summed, found, self.results)]

        return call


@dataclasses.dataclass(frozen=True)
class Share:
    """How the pass is divided among devices.

    Attributes:
        axes: the axes of the mesh that shard "b", "t", "n" and "k".
        heads: K, all key heads.
        group: query heads for each key head.
        parts: into how many shards the query heads are divided.
    """

    axes: dict[str, tuple[str, ...]]
    heads: int
    group: int
    parts: int

    def spec(self, factors: Factors) -> PartitionSpec:
        """The sharding of an array."""
        return PartitionSpec(*(self.axes.get(f or "") or None for f in factors))

    @property
    def takes_one(self) -> bool:
        """Whether each device holds all key heads and uses one of them."""
        return 1 < self.heads < self.parts and not self.axes["k"]

    def own_head(self, x: Array, factors: Factors) -> Array:
        """The key head that this device's query heads use, if it holds them all."""
        if "k" not in factors or not self.takes_one:
            return x
        return lax.dynamic_slice_in_dim(x, self._head(), 1, factors.index("k"))

    def summed(self, gradient: Array, factors: Factors) -> Array:
        """The sum over devices that use the same shard of the argument."""
        if "k" in factors and self.takes_one:
            axis = factors.index("k")
            shape = (*gradient.shape[:axis], self.heads, *gradient.shape[axis + 1 :])
            zeros = jnp.zeros(shape, gradient.dtype)
            gradient = lax.dynamic_update_slice_in_dim(
                zeros, gradient, self._head(), axis
            )
        own = {axis for factor in factors for axis in self.axes.get(factor or "", ())}
        every = (*self.axes["b"], *self.axes["t"], *self.axes["n"])
        axes = [axis for axis in every if axis not in own]
        return lax.psum(gradient, axes) if axes else gradient

    def _head(self) -> Array:
        first = lax.axis_index(self.axes["n"]) * (self.heads * self.group // self.parts)
        return first // self.group


def _reads_head(inputs: AttentionInputs) -> bool:
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

    def operand(x: Any, axes: Sequence[str] = ("b", "n", "t", "s")) -> Factors:
        """Axes of size 1 are broadcast, and not sharded."""
        named = [f if n > 1 else None for f, n in zip(axes, x.shape, strict=False)]
        return Factors([*named, *[None] * (x.ndim - len(named))])

    named = dataclasses.replace(
        inputs,
        query=operand(inputs.query, ("b", "t", "n")),
        key=operand(inputs.key, ("b", "s", "k")),
        value=operand(inputs.value, ("b", "s", "k")),
        living=tuple(
            None if x is None else operand(x, axes)
            for x, axes in zip(inputs.living, ("bnt", "bks"), strict=True)
        ),
        **{
            name: jax.tree.map(operand, getattr(inputs, name))
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
    rows = [None if x is None else operand(x, ("b", "t", "n")) for x in others]
    arguments = jax.tree.leaves((named, *rows))
    if wanted is not None:
        return arguments, [*itertools.compress(arguments, wanted)]
    output = operand(inputs.query, ("b", "t", "n"))
    return arguments, [output, Factors(output[:3])]


def _rule(work: Work) -> tuple[str, dict[str, Any]]:
    """A Shardy rule as text, and further arguments of ``def_partition``."""
    sizes = work.sizes
    count = itertools.count()
    # Query heads are pairs (k g) of key head and group member. Shardy refuses factors
    # of size 1.
    grouped = 1 < sizes.K < sizes.N
    names = {"n": "(k g)" if grouped else "n", "k": "k" if grouped else "n"}

    def text(factors: Factors) -> str:
        return " ".join(names.get(f or "", f) or f"u{next(count)}" for f in factors)

    arguments = [Factors([None]), *work.arguments]  # the mark, see ``divided``
    left, right = (", ".join(map(text, side)) for side in (arguments, work.results))
    order = dict.fromkeys(re.findall(r"\w+", f"{left} {right}"))
    divided = ("b", "t") if work.heads_are_whole else ("b", "t", "n", "k", "g")
    options: dict[str, Any] = {"g": sizes.N // sizes.K} if grouped else {}
    whole = tuple(factor for factor in order if factor not in divided)
    return f"{left} -> {right}", {"need_replication_factors": whole, **options}


def _places(sharding: Any, sizes: Sizes) -> tuple[Mesh, list[tuple[str, ...]]]:
    """Which axes of a mesh shard the query.

    Args:
        sharding: of the query.
        sizes: of the axes.

    Returns:
        A mesh of all devices in their order, and the axes of it that shard examples,
        queries and heads, major axes first.
    """
    try:
        parts = sharding.devices_indices_map((sizes.B, sizes.T, sizes.N, sizes.P))
    except ValueError:  # the shards are not of one size
        devices = np.array(sorted(sharding.device_set, key=lambda device: device.id))
        return Mesh(devices, ("d0",)), [(), (), ()]
    devices = np.array([*parts])
    starts = np.array([[s.start or 0 for s in index[:3]] for index in parts.values()])
    # The number of the shard along each axis, instead of the index where it begins.
    columns = [np.unique(column, return_inverse=True)[1] for column in starts.T]
    for radices in sorted(set(itertools.permutations(_primes(devices.size)))):
        digits = np.stack(np.unravel_index(np.arange(devices.size), radices), -1)
        found = [_digits_of(column, digits, radices) for column in columns]
        if None not in found:
            names = [f"d{i}" for i in range(len(radices))]
            mesh = Mesh(devices.reshape(radices), names)
            return mesh, [tuple(names[i] for i in each or ()) for each in found]
    # No mesh has this order of devices: the query is replicated.
    return Mesh(devices, ("d0",)), [(), (), ()]


def _digits_of(
    column: np.ndarray, digits: np.ndarray, radices: Sequence[int]
) -> list[int] | None:
    """Which digits of a device's number are its shard's number; None: none are."""
    steps = {}
    for i in range(len(radices)):
        first = (digits[:, i] == 1) & (np.delete(digits, i, 1) == 0).all(1)
        if step := int(column[first][0]):
            steps[i] = step
    order = sorted(steps, key=lambda i: -steps[i])
    made = np.zeros_like(column)
    for i in order:
        made = made * radices[i] + digits[:, i]
    return order if (made == column).all() else None


def _primes(number: int) -> tuple[int, ...]:
    for divisor in range(2, number + 1):
        if number % divisor == 0:
            return (divisor, *_primes(number // divisor))
    return ()


def _share(mesh: Any, places: Sequence[tuple[str, ...]], work: Work) -> Share:
    """How the pass is divided, given the axes that shard the query."""
    (b, t, n), sizes = places, work.sizes

    def parts(axes: Sequence[str]) -> int:
        return math.prod(mesh.shape[axis] for axis in axes)

    b = b if sizes.B % parts(b) == 0 else ()
    t = t if sizes.T % parts(t) == 0 else ()
    n = () if work.heads_are_whole or sizes.N % parts(n) else n
    # Key heads are sharded by the same axes, as far as their number allows.
    k = next(
        k for i in range(len(n), -1, -1) for k in [n[:i]] if not sizes.K % parts(k)
    )
    if parts(k) < parts(n) and sizes.K not in (1, parts(k)):
        k = ()
        n = n if parts(n) % sizes.K == 0 else ()
    axes = {"b": b, "t": t, "n": n, "k": () if sizes.K == 1 else k}
    return Share(axes, sizes.K, sizes.N // sizes.K, parts(n))


def _of_part(structure: Any, leaves: Sequence[Any]) -> Any:
    """The structure of arguments whose queries are a shard of the sequence.

    Their positions are slot numbers and an offset, no longer slot numbers alone.
    """
    inputs, *others = jax.tree.unflatten(structure, leaves)
    queries, keys = inputs.position_kinds
    kinds = "offset" if queries == "index" else queries, keys
    inputs = dataclasses.replace(inputs, position_kinds=kinds)
    return jax.tree.structure((inputs, *others))
