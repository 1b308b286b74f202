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
import functools
import itertools
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding

from attnlab._src.ops.choice import default_platform
from attnlab._src.ops.shares import Factors, Work, share_of
from attnlab._src.placement import names_of
from attnlab._src.types import Array, Sizes


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
        share = share_of(mesh, places, work.sizes, work.heads_are_whole)

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
    context = jax.sharding.get_abstract_mesh()
    mesh = place.mesh if context.empty else context
    # Inside a shard_map over some axes, the others are left.
    rest = {*mesh.axis_names} - {*mesh.manual_axes}
    axes = [tuple(axis for axis in names_of(x) if axis in rest) for x in place.spec]
    share = share_of(mesh, axes, work.sizes, work.heads_are_whole)
    return jax.shard_map(
        work.local(run, share),
        mesh=mesh if context.empty else None,
        axis_names=rest,
        in_specs=tuple(map(share.spec, work.arguments)),
        out_specs=[*map(share.spec, work.results)],
        check_vma=False,
    )


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
    for radices in _factorings(devices.size):
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


def _factorings(number: int) -> Iterator[tuple[int, ...]]:
    """Every order of the prime factors of a number, each once."""
    if number == 1:
        yield ()
    rest, divisor = number, 2
    while rest > 1:
        if rest % divisor:
            divisor += 1
            continue
        while rest % divisor == 0:
            rest //= divisor
        for others in _factorings(number // divisor):
            yield (divisor, *others)
