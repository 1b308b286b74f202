"""Tests of the names that attnlab uses from JAX modules without promised stability.

They show first what a new release of JAX breaks. attnlab uses no private names
(``jax._src``, or names with an underscore).
"""

import ast
import pathlib

import jax
import jax.extend.backend
import jax.extend.core
import jax.numpy as jnp
import pytest
from jax.interpreters import ad, batching, mlir

import attnlab

ROOT = pathlib.Path(attnlab.__file__).parent.parent
#: Every name that attnlab uses from these modules must be in ``CHECKS``.
UNSTABLE = (
    "jax.core",
    "jax.experimental.custom_partitioning",
    "jax.extend",
    "jax.interpreters",
)


def double(x):
    """``2 * x`` as a new primitive, made with all the names under test."""
    primitive = jax.extend.core.Primitive("double")
    primitive.def_impl(lambda x: x + x)
    primitive.def_abstract_eval(lambda x: x)
    batching.primitive_batchers[primitive] = lambda x, axes: (
        primitive.bind(*x),
        axes[0],
    )

    def slope(primals, tangents):
        (tangent,) = tangents
        moved = tangent if isinstance(tangent, ad.Zero) else primitive.bind(tangent)
        return primitive.bind(*primals), moved

    ad.primitive_jvps[primitive] = slope
    ad.primitive_transposes[primitive] = lambda cotangent, _: [
        primitive.bind(cotangent)
    ]

    def lower(ctx, x):
        avals = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
        platforms = ctx.platforms or ctx.module_context.platforms
        assert tuple(platforms) == ("cpu",)
        assert not ctx.module_context.lowering_parameters.for_export
        twice = mlir.lower_fun(lambda x: 2 * x, multiple_results=False)
        return twice(ctx.replace(avals_in=avals), x)

    mlir.register_lowering(primitive, lower)
    return primitive.bind(x)


def of_a_primitive():
    """A primitive follows the given rules of batching, derivative and lowering."""
    x = jnp.arange(3.0)
    run = jax.jit(jax.vmap(jax.grad(lambda x: double(x) * 2)))
    assert run(x).tolist() == [4, 4, 4]
    assert jax.jit(double)(x).tolist() == [0, 2, 4]


def defvectorized():
    """An elementwise primitive needs no batching rule of its own."""
    primitive = jax.extend.core.Primitive("same")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    batching.defvectorized(primitive)
    assert jax.vmap(primitive.bind)(jnp.arange(3)).tolist() == [0, 1, 2]


def tracer():
    """Tracers are distinguished from concrete arrays."""
    found = []
    jax.jit(lambda x: found.append(isinstance(x, jax.core.Tracer)) or x)(1.0)
    assert found == [True]
    assert not isinstance(jnp.zeros(()), jax.core.Tracer)


def backends():
    """The available platforms are known by name."""
    assert "cpu" in jax.extend.backend.backends()


def custom_partitioning():
    """A primitive says by a parameter that it needs devices, and learns how many."""
    same = jax.experimental.custom_partitioning.custom_partitioning(lambda x: x)
    same.def_partition(partition=None, sharding_rule="i -> i")
    needs = jax.make_jaxpr(same)(jnp.zeros(1))
    seen = []

    def lower(ctx, x, needs):
        context = ctx.module_context.axis_context
        seen.append((context.num_devices, getattr(context, "manual_axes", None)))
        return [x]

    primitive = jax.extend.core.Primitive("placed")
    primitive.def_abstract_eval(lambda x, needs: x)
    mlir.register_lowering(primitive, lower)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    x = jax.device_put(jnp.zeros(2), place)
    jax.jit(lambda x: primitive.bind(x, needs=needs)).lower(x)
    assert seen == [(2, None)]
    # Devices come in the order in which programs count them.
    assert [*place.devices_indices_map((2,))] == jax.devices()[:2]


CHECKS = {
    "jax.core.ShapedArray": of_a_primitive,
    "jax.core.Tracer": tracer,
    "jax.experimental.custom_partitioning.custom_partitioning": custom_partitioning,
    "jax.extend.backend.backends": backends,
    "jax.extend.core.Primitive": of_a_primitive,
    "jax.interpreters.ad.Zero": of_a_primitive,
    "jax.interpreters.ad.primitive_jvps": of_a_primitive,
    "jax.interpreters.ad.primitive_transposes": of_a_primitive,
    "jax.interpreters.batching.defvectorized": defvectorized,
    "jax.interpreters.batching.primitive_batchers": of_a_primitive,
    "jax.interpreters.mlir.lower_fun": of_a_primitive,
    "jax.interpreters.mlir.register_lowering": of_a_primitive,
}


def names_of(path):
    """The dotted names of JAX and Flax in a file, with imports resolved."""
    tree = ast.parse(path.read_text())
    roots = {"jax": "jax"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for one in node.names:
                roots[one.asname or one.name] = f"{node.module}.{one.name}"
                yield f"{node.module}.{one.name}"
        elif isinstance(node, ast.Import):
            for one in node.names:
                top = one.name.partition(".")[0]
                roots[one.asname or top] = one.name if one.asname else top
                yield one.name
    for node in ast.walk(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in roots:
            yield ".".join([roots[inner.id], *reversed(parts)])


def test_every_name_is_listed():
    used = {
        name
        for folder in ("attnlab", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for name in names_of(path)
        if name.split(".")[0] in {"jax", "jaxlib", "flax", "optax"}
    }
    assert any(name == "jax.numpy" for name in used)
    private = {n for n in used if any(part.startswith("_") for part in n.split("."))}
    assert private - {"jax.__version__"} == set()
    unstable = {n for n in used if n.startswith(UNSTABLE)}
    # Only complete names, not the modules on the way to them.
    known = {n for n in unstable if any(c.startswith(f"{n}.") for c in CHECKS)}
    tails = {c for n in unstable for c in CHECKS if n == c or n.startswith(f"{c}.")}
    assert unstable - known - tails == set()
    assert tails == set(CHECKS)


@pytest.mark.parametrize(
    "check", sorted(set(CHECKS.values()), key=lambda c: c.__name__)
)
def test_it_does_what_is_asked(check):
    check()
