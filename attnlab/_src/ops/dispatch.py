"""One pass as one primitive, and the derivatives around all implementations.

While a program is traced, a forward or a backward pass is one primitive. What it does
is decided when the program is lowered, because only then its platform is known; and
only what is chosen is ever traced.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.plain import plain
from attnlab._src.implementations.reference import attend as reference_attend
from attnlab._src.ops.choice import choose, default_platform, symbolic_sizes
from attnlab._src.ops.folding import fold_of
from attnlab._src.ops.residuals import keep, with_inf
from attnlab._src.reverse import reverse_only
from attnlab._src.types import (
    Array,
    AttentionInputs,
    PyTree,
    pytree,
    static,
    vary_like,
)

#: What it would need.
_FORWARD_MODE = 'attention needs implementation="reference"'


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What the caller settled: static, and the same for both passes.

    Attributes:
        implementation: a name; None: the automatic choice.
        precision: of matrix products that name none.
        x64: whether 64-bit types exist.
    """

    implementation: str | None
    precision: str | None
    x64: bool

    @classmethod
    def now(cls, implementation: str | None) -> "_Asked":
        """With the settings of JAX that hold now."""
        config: Any = jax.config
        return cls(
            implementation, config.jax_default_matmul_precision, config.jax_enable_x64
        )

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """A program may be lowered where the settings it was traced under are gone."""
        with jax.default_matmul_precision(self.precision), jax.enable_x64(self.x64):
            yield


@contextlib.contextmanager
def _some_tpu(platforms: Sequence[str]) -> Iterator[None]:
    """Kernels for a TPU ask for its kind: where none is here, an old one serves."""
    mesh = jax.sharding.get_abstract_mesh()
    known = mesh.abstract_device is not None or default_platform() == "tpu"
    if "tpu" not in platforms or known:
        yield
        return
    device = jax.sharding.AbstractDevice("TPU v4", 1, "tpu")
    made = jax.sharding.AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(made):
        yield


#: One pass over ``leaves``, the flat arguments: ``(inputs,)`` where ``wanted`` is None,
#: the forward pass; else ``(inputs, output, lse, d_output, d_lse)``, and ``wanted``
#: tells the leaves of the inputs that need a gradient.
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


# Inlined: behind a call, XLA would not see that liveness has made the same plan.
@functools.partial(
    jax.jit, static_argnames=("name", "wanted", "structure"), inline=True
)
def compute(*leaves: Array, name: str, wanted: Any, structure: Any) -> Sequence[Any]:
    """One pass of one implementation; jitted, so that equal calls are traced once."""
    given: Any = jax.tree.unflatten(structure, leaves)
    implementation, (inputs, *others) = IMPLEMENTATIONS[name], given
    if not implementation.reads_raw:
        inputs = plain(inputs)
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
    query = plain(inputs).query.astype(scale.dtype)
    d_scale = (found.query * query).sum((1, 3))[..., None, None]
    shared = tuple(axis for axis in (0, 1) if scale.shape[axis] == 1)
    return dataclasses.replace(
        found,
        query=found.query * scale.swapaxes(1, 2),
        head_scale=d_scale.sum(shared, keepdims=True),
    )


def _lower(
    ctx: Any, *values: Any, asked: _Asked, wanted: Any, structure: Any
) -> Sequence[Any]:
    inputs: Any = jax.tree.unflatten(structure, ctx.avals_in)[0]
    exported = ctx.module_context.lowering_parameters.for_export
    platforms = ctx.platforms or ctx.module_context.platforms
    shared, passes = len(platforms) > 1, {}
    for platform in platforms:
        chosen = choose(inputs, asked.implementation, platform, exported, shared)
        passes[platform] = functools.partial(
            compute, name=chosen.name, wanted=wanted, structure=structure
        )
    *_, call = passes.values()
    # Several platforms share one module where jax.export asks for it.
    others = {p: x for p, x in passes.items() if x.keywords != call.keywords}
    if others:
        call = functools.partial(lax.platform_dependent, default=call, **others)
    # On a device nothing varies: implementations need not care for shard_map.
    avals = [
        jax.core.ShapedArray(x.shape, x.dtype, x.weak_type, sharding=x.sharding)
        for x in ctx.avals_in
    ]
    with asked.settings(), _some_tpu(platforms):
        return mlir.lower_fun(call)(ctx.replace(avals_in=avals), *values)


mlir.register_lowering(attention_p, _lower)


@functools.partial(jax.jit, static_argnames=("asked", "wanted", "structure"))
def _bind(*leaves: Array, **static: Any) -> list[Array]:
    return attention_p.bind(*leaves, **static)


@attention_p.def_impl
def _run_alone(*leaves: Array, **static: Any) -> list[Array]:
    # What JAX runs step by step to find a NaN is one step here, and a log-sum-exp of
    # -inf is what it should be: the next step that yields one is named.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _bind(*leaves, **static)


def _pass(
    asked: _Asked, wanted: tuple[bool, ...] | None, *arguments: Any
) -> list[Array]:
    leaves, structure = jax.tree.flatten(arguments)
    return attention_p.bind(*leaves, asked=asked, wanted=wanted, structure=structure)


def _mapped(
    values: Sequence[Array],
    axes: Sequence[int | None],
    *,
    asked: _Asked,
    wanted: Any,
    structure: Any,
) -> tuple[list[Array], list[int]]:
    """Under ``vmap`` it is one pass still."""
    on = [axis is not None for axis in axes]
    size = next(x.shape[a] for x, a in zip(values, axes, strict=True) if a is not None)
    values = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(values, axes, strict=True)
    ]
    given, mapped = (jax.tree.unflatten(structure, x) for x in (values, on))
    fold = fold_of(size, mapped, given, wanted, asked.implementation)
    found = _pass(asked, wanted, *fold.fold(mapped, given, wanted))
    batches = [x.shape[mark] for x, mark in zip(values, on, strict=True)]
    batches = (
        [batches[0]] * 2 if wanted is None else itertools.compress(batches, wanted)
    )
    return fold.unfold(found, [*batches]), [0] * len(found)


batching.primitive_batchers[attention_p] = _mapped


@pytree
class _Wanted:
    """Which leaves of the inputs need a gradient: structure, not data."""

    flags: tuple[bool, ...] = static()


def run(inputs: AttentionInputs, name: str | None) -> tuple[Array, Array]:
    """Output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]``, differentiable.

    Args:
        inputs: the canonical record.
        name: the implementation asked for; None: the automatic choice.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs. On a platform
            on which it does not run, lowering raises it.
    """
    if name is not None or symbolic_sizes(inputs, "TS"):
        implementation = choose(inputs, name, None)
        if implementation.differentiable:
            output, lse = implementation.forward(plain(inputs))
            sees = ~jnp.isneginf(lse)
            return jnp.where(sees[..., None], output, 0), jnp.where(sees, lse, -jnp.inf)
    # Inside shard_map every input must vary alike: then JAX, not we, sums gradients.
    inputs = jax.tree.map(
        lambda x: vary_like(x, inputs), reverse_only(inputs, _FORWARD_MODE)
    )
    output, lse = _pass(_Asked.now(name), None, inputs)
    return output, lse


def _differentiated(
    primals: Sequence[Array], tangents: Sequence[Any], *, asked: _Asked, **static: Any
) -> tuple[Sequence[Array], Sequence[Any]]:
    """The forward pass of what has a gradient: here the residuals are kept.

    Not where it is called: mapped axes are folded by then, so that keys that were not
    mapped have one gradient, not one for each example, to be added up.
    """
    moves = [not isinstance(x, ad.Zero) for x in tangents]

    def of_moving(*moving: Array) -> list[Array]:
        given = iter(moving)
        leaves = [
            next(given) if on else x for x, on in zip(primals, moves, strict=True)
        ]
        inputs: Any = jax.tree.unflatten(static["structure"], leaves)[0]
        return [*_with_backward(asked)(inputs)]

    moving = [x for x, on in zip(primals, moves, strict=True) if on]
    return jax.jvp(
        of_moving, moving, [x for x in tangents if not isinstance(x, ad.Zero)]
    )


ad.primitive_jvps[attention_p] = _differentiated


def _with_backward(asked: _Asked) -> Callable[[AttentionInputs], tuple[Array, Array]]:
    """The forward pass with the backward pass as its derivative."""

    @jax.custom_vjp
    def attend(inputs: AttentionInputs) -> tuple[Array, Array]:
        output, lse = _pass(asked, None, inputs)
        return output, lse

    def forward(inputs: Any) -> tuple[tuple[Array, Array], PyTree]:
        wanted = _Wanted(tuple(x.perturbed for x in jax.tree.leaves(inputs)))
        inputs = jax.tree.map(lambda x: x.value, inputs)
        output, kept = keep(*_pass(asked, None, inputs))
        return (output, with_inf(kept)), (wanted, inputs, output, kept)

    def backward(saved: PyTree, cotangents: Any) -> tuple[PyTree]:
        wanted, inputs, output, kept = saved
        lse, (d_output, d_lse) = with_inf(kept), cotangents
        # Whatever gradient comes to a query that sees nothing, it stops here.
        sees = ~jnp.isneginf(lse)
        if isinstance(d_output, SymbolicZero):
            d_output = jnp.zeros_like(output)
        d_output = jnp.where(sees[..., None], d_output, 0)
        d_lse = None if isinstance(d_lse, SymbolicZero) else jnp.where(sees, d_lse, 0)
        found = _backward(asked, wanted.flags, inputs, output, lse, d_output, d_lse)
        gradients = iter(found)
        leaves = [next(gradients) if on else None for on in wanted.flags]
        return (jax.tree.unflatten(jax.tree.structure(inputs), leaves),)

    attend.defvjp(forward, backward, symbolic_zeros=True)
    return attend


def _backward(
    asked: _Asked,
    flags: tuple[bool, ...],
    inputs: AttentionInputs,
    output: Array,
    lse: Array,
    d_output: Array,
    d_lse: Array | None,
) -> list[Array]:
    """Gradients of the wanted leaves; differentiable itself, by the reference."""

    @jax.custom_vjp
    def call(*arguments: Any) -> list:
        return _pass(asked, flags, *arguments)

    def forward(*arguments: Any) -> tuple[list, Any]:
        return call(*arguments), arguments

    def backward(saved: Any, cotangents: Any) -> tuple:
        inputs, _, _, *d_results = saved
        given = [d for d in d_results if d is not None]
        leaves, structure = jax.tree.flatten(inputs)
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]

        def with_floats(values: Sequence[Array]) -> AttentionInputs:
            merged = iter(values)
            merged = [
                next(merged) if on else x for x, on in zip(leaves, floats, strict=True)
            ]
            return jax.tree.unflatten(structure, merged)

        def gradients(values: list[Array], d_results: list[Array]) -> list[Array]:
            def results(values: list[Array]) -> list[Array]:
                output, lse, _ = reference_attend(with_floats(values))
                return [output, lse][: len(given)]

            _, pull = jax.vjp(results, values)
            (found,) = pull(d_results)
            chosen = [
                on for on, is_float in zip(flags, floats, strict=True) if is_float
            ]
            return [g for g, on in zip(found, chosen, strict=True) if on]

        values = [x for x, on in zip(leaves, floats, strict=True) if on]
        _, pull = jax.vjp(gradients, values, given)
        d_values, d_given = (iter(found) for found in pull(cotangents))
        d_inputs = [next(d_values) if on else None for on in floats]
        d_results = [None if d is None else next(d_given) for d in d_results]
        return (jax.tree.unflatten(structure, d_inputs), None, None, *d_results)

    call.defvjp(forward, backward)
    return call(inputs, output, lse, *reverse_only((d_output, d_lse), _FORWARD_MODE))
