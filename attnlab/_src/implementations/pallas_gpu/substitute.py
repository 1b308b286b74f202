"""Primitives of users' functions that kernels for GPUs lack, or compute roughly.

Some are replaced; a modifier with another one is refused, and a mask becomes bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from attnlab._src.implementations.elementwise import mask_is_elementwise
from attnlab._src.masks.base import Mask
from attnlab._src.types import Array, PyTree

#: Primitives that some supported JAX cannot compile for this GPU, or that have a fast
#: form there that is wrong by more than float32 rounding.
LACKING = frozenset({"cos", "floor", "log1p", "pow", "sin", "sqrt"})
#: Further ones that a mask must not have: nothing is replaced there, and where their
#: results are rounded otherwise than by XLA, other pairs would be visible.
_LACKING_IN_MASKS = LACKING | {
    "add_any", "copy", "exp", "exp2", "float div", "integer_pow", "log", "logistic",
    "not", "one_minus_square", "rsqrt", "stop_gradient", "tanh",
}  # fmt: skip


def knows(mask: Mask, operands: PyTree) -> bool:
    """Whether the kernels evaluate a mask, and do not get it as bits."""
    if any(min(x.shape[2:4]) > 1 for x in jax.tree.leaves(operands)):
        return False
    return mask_is_elementwise(mask, operands, _LACKING_IN_MASKS)


_TWICE_LOG2_E = 2 * math.log2(math.e)


def _tanh(x: Array) -> Array:
    """With an absolute error of 1e-7; the hardware's own is wrong by 5e-4."""
    return 1 - 2 / (lax.exp2(x * _TWICE_LOG2_E) + 1)


def _integer_pow(x: Array, y: int) -> Array:
    if y == 0:
        return x * 0 + 1
    found = x if abs(y) == 1 else lax.integer_pow(x, abs(y))
    return found if y > 0 else 1 / found


#: By primitive, a function of its arguments and of its parameters.
_SUBSTITUTES: dict[str, Callable[..., Array]] = {
    "add_any": lambda x, y, **_: x + y,
    "copy": lambda x, **_: x,
    "integer_pow": lambda x, *, y, **_: _integer_pow(x, y),
    # JAX 0.12 cannot compile this of booleans.
    "not": lambda x, **_: x ^ True if x.dtype == bool else ~x,
    "one_minus_square": lambda x, **_: (1 - x) * (1 + x),
    "stop_gradient": lambda x, **_: x,
    "tanh": lambda x, **_: _tanh(x),
}


def substituted(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, an elementwise function, with the substitutes."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    found = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _consts(inner: Any) -> Sequence[Any]:
    """The constants of a jaxpr, which an open one has none of."""
    return getattr(inner, "consts", ())


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: list[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def value(x: Any) -> Any:
        return x.val if hasattr(x, "val") else values[x]  # a literal, or a variable

    for step in jaxpr.eqns:
        given, params = [value(x) for x in step.invars], step.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if inner is not None:  # an elementwise function has no loops or branches
            found = _evaluate(getattr(inner, "jaxpr", inner), _consts(inner), given)
        elif step.primitive.name in _SUBSTITUTES:
            found = [_SUBSTITUTES[step.primitive.name](*given, **params)]
        else:
            found = step.primitive.bind(*given, **params)
            found = found if step.primitive.multiple_results else [found]
        values |= dict(zip(step.outvars, found, strict=True))
    return [value(x) for x in jaxpr.outvars]
