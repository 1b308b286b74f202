"""Which implementation runs.

While a program is traced, a forward or a backward pass is one primitive. What it does
is decided when the program is lowered, because only then its platform is known; and
only what is chosen is ever traced.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.backend
import jax.extend.core
from jax import lax
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.implementations import IMPLEMENTATIONS
from attnlab.types import Array, AttentionInputs, Implementation

#: What the automatic choice may take, in order; the last takes everything, everywhere.
#: ``jax_nn`` holds ``[T, S]`` and ``reference`` too: they run only when asked for.
AUTOMATIC = ("tiled",)


def default_platform() -> str:
    """The default backend, as lowering names it: "cuda" or "rocm", never "gpu"."""
    name = jax.default_backend()
    backends = jax.extend.backend.backends().items()
    return next(key for key, backend in backends if backend.platform == name)


def _reasons(
    implementation: Implementation, inputs: AttentionInputs, platform: str | None
) -> tuple[str, ...]:
    only = implementation.platforms
    where = ()
    if only is not None and platform is not None and platform not in only:
        where = (f"it runs on {' and '.join(only)}, not on {platform}",)
    return (*where, *implementation.unsupported(inputs))


def choose(
    inputs: AttentionInputs, name: str | None, platform: str | None
) -> tuple[Implementation, dict[str, tuple[str, ...]]]:
    """The implementation to run, and why each other one was passed over.

    Args:
        inputs: the canonical record; arrays may be shapes only.
        name: the implementation asked for; None: the automatic choice.
        platform: as lowering names it; None: not known yet, which excludes nobody.

    Raises:
        ValueError: if there is no implementation of that name.
        NotImplementedError: if the one asked for cannot take the inputs; it names
            every reason.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(IMPLEMENTATIONS)} or None, "
            f"got {name!r}"
        )
    reasons = {n: _reasons(i, inputs, platform) for n, i in IMPLEMENTATIONS.items()}
    if name is not None and reasons[name]:
        raise NotImplementedError(
            f"implementation={name!r} cannot take these inputs: "
            + "; ".join(reasons[name])
        )
    chosen = name
    if chosen is None:
        chosen = next(n for n in AUTOMATIC if not reasons[n])
    passed = {}
    for other in IMPLEMENTATIONS:
        if other == chosen:
            continue
        if name is not None:
            why = (f"{name!r} was asked for",)
        elif other in AUTOMATIC:
            why = (f"{chosen!r} comes first",)
        else:
            why = ("it holds [T, S] in memory; it runs only when asked for",)
        passed[other] = reasons[other] or why
    return IMPLEMENTATIONS[chosen], passed


@dataclasses.dataclass(frozen=True)
class Asked:
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
    def now(cls, implementation: str | None) -> "Asked":
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
    arguments: Any = jax.tree.unflatten(structure, leaves)
    if wanted is None:
        return IMPLEMENTATIONS[name].forward(*arguments)
    gradients = IMPLEMENTATIONS[name].backward(*arguments, wanted=wanted)
    return [g for g, on in zip(gradients, wanted, strict=True) if on]


def _lower(
    ctx: Any, *values: Any, asked: Asked, wanted: Any, structure: Any
) -> Sequence[Any]:
    inputs: Any = jax.tree.unflatten(structure, ctx.avals_in)[0]
    passes = {}
    for platform in ctx.platforms or ctx.module_context.platforms:
        chosen, _ = choose(inputs, asked.implementation, platform)
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
    with asked.settings():
        return mlir.lower_fun(call)(ctx.replace(avals_in=avals), *values)


mlir.register_lowering(attention_p, _lower)


@functools.partial(jax.jit, static_argnames=("asked", "wanted", "structure"))
def _bind(*leaves: Array, **static: Any) -> list[Array]:
    return attention_p.bind(*leaves, **static)


@attention_p.def_impl
def _run_alone(*leaves: Array, **static: Any) -> list[Array]:
    with jax.disable_jit(False):
        return _bind(*leaves, **static)


def one_pass(
    asked: Asked, wanted: tuple[bool, ...] | None, *arguments: Any
) -> list[Array]:
    """What one pass returns, by whichever implementation it will be.

    Args:
        asked: what the caller settled.
        wanted: None: the forward pass; else which leaves of the inputs need a gradient.
        *arguments: inputs; and output, lse, d_output and d_lse for a backward pass.
    """
    leaves, structure = jax.tree.flatten(arguments)
    return attention_p.bind(*leaves, asked=asked, wanted=wanted, structure=structure)
