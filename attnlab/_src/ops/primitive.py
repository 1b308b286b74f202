"""A pass as one primitive, whose implementation is chosen when it is lowered.

While a program is traced, a forward or a backward pass is one primitive. Its
implementation is chosen when the program is lowered, because only then the platform is
known; no other implementation is traced.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
from jax import lax
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.deferred import apply_deferred
from attnlab._src.ops.choice import choose
from attnlab._src.ops.partition import (
    divided,
    divided_as_placed,
    is_divided,
    mesh_for,
    needs_devices,
    spans_devices,
)
from attnlab._src.types import Array, AttentionInputs


@dataclasses.dataclass(frozen=True)
class Asked:
    """Settings of the call: static, and the same for both passes.

    Attributes:
        implementation: a name; None: the automatic choice.
        place: sharding of the query, see ``Settings``.
        precision: JAX's default, for matrix products that name none.
        x64: whether JAX's x64 mode is on.
    """

    implementation: str | None
    place: NamedSharding | None
    precision: str | None
    x64: bool

    @classmethod
    def now(cls, implementation: str | None, place: NamedSharding | None) -> "Asked":
        """With JAX's current settings."""
        config: Any = jax.config
        precision = config.jax_default_matmul_precision
        return cls(implementation, place, precision, config.jax_enable_x64)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Restores the settings of the call: lowering may happen under others."""
        with jax.default_matmul_precision(self.precision), jax.enable_x64(self.x64):
            yield


#: One pass over the leaves of its arguments. Where ``wanted`` is None it is a forward
#: pass over ``(inputs,)``; else a backward pass over ``(inputs, output, lse, d_output,
#: d_lse)``, and ``wanted`` says which leaves of the inputs need a gradient.
attention_p = jax.extend.core.Primitive("attention")
attention_p.multiple_results = True


@attention_p.def_abstract_eval
def _types(*avals: Any, wanted: Any, structure: Any, **_: Any) -> list[Any]:
    inputs: Any = jax.tree.unflatten(structure, avals)[0]
    if wanted is not None:
        return [x for x, on in zip(jax.tree.leaves(inputs), wanted, strict=True) if on]
    # All inputs vary over the same manual axes, and so do the results.
    s, dtype = inputs.sizes, inputs.accumulation_dtype
    like = inputs.query.update(dtype=dtype, weak_type=False)
    flat = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[:3]))
    return [
        like.update(shape=(s.B, s.T, s.N, s.D)),
        like.update(shape=(s.B, s.T, s.N), sharding=flat),
    ]


# Inlined: across a call, XLA would not merge this plan with the one that liveness made.
@functools.partial(
    jax.jit, static_argnames=("name", "wanted", "structure"), inline=True
)
def compute(*leaves: Array, name: str, wanted: Any, structure: Any) -> Sequence[Any]:
    """One pass of one implementation; jitted, so that equal calls are traced once."""
    given: Any = jax.tree.unflatten(structure, leaves)
    implementation, (inputs, *others) = IMPLEMENTATIONS[name], given
    if not implementation.reads_raw:
        inputs = apply_deferred(inputs)
    if wanted is None:
        return implementation.forward(inputs, *others)
    want: Any = jax.tree.unflatten(jax.tree.structure(given[0]), wanted)
    want = dataclasses.replace(
        want, living=jax.tree.map(lambda _: False, inputs.living)
    )
    asked = want
    if inputs.head_scale is not None:
        both = want.query or want.head_scale
        asked = dataclasses.replace(want, query=both, head_scale=False)
    gradients = implementation.backward(inputs, *others, wanted=jax.tree.leaves(asked))
    structure = jax.tree.structure(inputs)
    found: Any = jax.tree.unflatten(structure, gradients)
    if inputs.head_scale is not None and asked.query:
        found = _of_scaled(inputs, found)
    each = map(jax.tree.leaves, (inputs, want))
    return [
        g.astype(x.dtype)
        for g, x, on in zip(structure.flatten_up_to(found), *each, strict=True)
        if on
    ]


def _of_scaled(inputs: AttentionInputs, found: AttentionInputs) -> AttentionInputs:
    """Gradients of query and ``head_scale``, from that of their product."""
    scale: Any = inputs.head_scale
    query = apply_deferred(inputs).query.astype(scale.dtype)
    d_scale = (found.query * query).sum((1, 3))[..., None, None]
    shared = tuple(axis for axis in (0, 1) if scale.shape[axis] == 1)
    return dataclasses.replace(
        found,
        query=found.query * scale.swapaxes(1, 2),
        head_scale=d_scale.sum(shared, keepdims=True),
    )


def _lower(
    ctx: Any, *values: Any, asked: Asked, wanted: Any, structure: Any, devices: Any
) -> Sequence[Any]:
    module = ctx.module_context
    exported = module.lowering_parameters.for_export
    platforms = ctx.platforms or module.platforms
    by_xla = spans_devices(module.axis_context) and not exported
    if by_xla:
        run = functools.partial(
            attention_p.bind, asked=asked, wanted=wanted, devices=devices
        )
        work = run, structure, ctx.avals_in, wanted
        # XLA knows custom partitioning neither on TPUs nor inside a shard_map over some
        # axes of the mesh, where it gathers what the others shard.
        by_rule = "tpu" not in platforms and not hasattr(
            module.axis_context, "manual_axes"
        )
        if by_rule:
            return mlir.lower_fun(divided(*work))(ctx, *values)
        if asked.place is not None:
            return mlir.lower_fun(divided_as_placed(*work, asked.place))(ctx, *values)
    inputs: Any = jax.tree.unflatten(structure, ctx.avals_in)[0]
    shared, passes = len(platforms) > 1, {}
    for platform in platforms:
        chosen = choose(
            inputs, asked.implementation, platform, exported, shared, by_xla
        )
        passes[platform] = functools.partial(
            compute, name=chosen.name, wanted=wanted, structure=structure
        )
    *_, call = passes.values()
    # Several platforms share one module where jax.export asks for it.
    others = {p: x for p, x in passes.items() if x.keywords != call.keywords}
    if others:
        call = functools.partial(lax.platform_dependent, default=call, **others)
    is_share = is_divided(module.axis_context)
    # Without the manual axes of shard_map: implementations see one device's arrays.
    avals = [
        jax.core.ShapedArray(
            x.shape, x.dtype, x.weak_type, sharding=None if is_share else x.sharding
        )
        for x in ctx.avals_in
    ]
    with asked.settings(), mesh_for(platforms, is_share):
        return mlir.lower_fun(call)(ctx.replace(avals_in=avals), *values)


mlir.register_lowering(attention_p, _lower)


@functools.partial(jax.jit, static_argnames=("asked", "wanted", "structure", "devices"))
def _bind(*leaves: Array, **static: Any) -> list[Array]:
    return attention_p.bind(*leaves, **static)


@attention_p.def_impl
def _run_alone(*leaves: Array, **static: Any) -> list[Array]:
    # Where JAX runs a program step by step to find a NaN, a pass is one step. Its
    # log-sum-exp may be -inf; a later step that yields NaN or -inf is reported.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _bind(*leaves, **static)


def one_pass(
    asked: Asked, wanted: tuple[bool, ...] | None, *arguments: Any
) -> list[Array]:
    leaves, structure = jax.tree.flatten(arguments)
    return attention_p.bind(
        *leaves,
        asked=asked,
        wanted=wanted,
        structure=structure,
        devices=needs_devices(),
    )
