"""Replaces primitives of a user's function that kernels lack, or compute roughly."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from attnlab._src.types import Array

#: Primitives that some supported JAX cannot compile for this GPU, or that have a fast
#: form there that is wrong by more than float32 rounding.
LACKING = frozenset({"cos", "floor", "log1p", "pow", "sin", "sqrt"})


_TWICE_LOG2_E = 2 * math.log2(math.e)


def _tanh(x: Array, **_: Any) -> Array:
    """To 1e-7; the fast form of the hardware is wrong by 5e-4."""
    return 1 - 2 / (lax.exp2(x * _TWICE_LOG2_E) + 1)


def _integer_pow(x: Array, *, y: int) -> Array:
    if y == 0:
        return x * 0 + 1
    found = x if abs(y) == 1 else lax.integer_pow(x, abs(y))
    return found if y > 0 else 1 / found


_SUBSTITUTES: dict[str, Callable[..., Array]] = {
    "add_any": lambda x, y: x + y,
    "copy": lambda x: x,
    "integer_pow": _integer_pow,
    "stop_gradient": lambda x: x,
    "tanh": _tanh,
}


def substituted(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, an elementwise function, with the substitutes."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return jax.tree.unflatten(
        jax.tree.structure(shapes), _evaluate(closed, jax.tree.leaves(args))
    )


def _evaluate(closed: ClosedJaxpr, args: list[Any]) -> list[Any]:
    jaxpr: Jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def value(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for step in jaxpr.eqns:
        given, params = [value(x) for x in step.invars], step.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None:  # an elementwise function has no loops or branches
            found = _evaluate(inner, given)
        elif step.primitive.name in _SUBSTITUTES:
            found = [_SUBSTITUTES[step.primitive.name](*given, **_own(step))]
        else:
            found = step.primitive.bind(*given, **params)
            found = found if step.primitive.multiple_results else [found]
        values |= dict(zip(step.outvars, found, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _own(step: Any) -> dict[str, Any]:
    """The parameters of a step that its substitute takes."""
    return step.params if step.primitive.name in ("integer_pow", "tanh") else {}
