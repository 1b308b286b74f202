"""An identity through which forward-mode differentiation raises a clear error.

A function with a backward pass of its own has no forward mode, and JAX's error about it
names internal functions that the caller does not know.
"""

from typing import Any, NoReturn, TypeVar

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

_T = TypeVar("_T")

#: The identity, and its map of tangents, which reverse mode transposes and never
#: computes.
_same_p = jax.extend.core.Primitive("reverse_only")
_tangent_p = jax.extend.core.Primitive("reverse_only_tangent")


def _tangent(primals: Any, tangents: Any, *, of: str) -> tuple[Any, Any]:
    (tangent,) = tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _tangent_p.bind(tangent, of=of)
    return _same_p.bind(*primals, of=of), tangent


def _refuse(*_: object, of: str, **__: object) -> NoReturn:
    raise NotImplementedError(
        f"forward mode (jax.jvp, jacfwd, hessian) of {of}; reverse mode (grad, vjp, "
        "jacrev) works, to second order"
    )


_same_p.def_abstract_eval(lambda x, of: x)
_same_p.def_impl(lambda x, of: x)
mlir.register_lowering(_same_p, lambda _, x, of: [x])
batching.defvectorized(_same_p)
ad.primitive_jvps[_same_p] = _tangent

_tangent_p.def_abstract_eval(lambda x, of: x)
_tangent_p.def_impl(_refuse)
mlir.register_lowering(_tangent_p, _refuse)
batching.primitive_batchers[_tangent_p] = _refuse
ad.primitive_jvps[_tangent_p] = _refuse
ad.primitive_transposes[_tangent_p] = lambda cotangent, _, of: [cotangent]


def reverse_only(tree: _T, of: str) -> _T:
    """The same arrays, for a function that has no forward mode.

    Args:
        tree: a pytree of arrays.
        of: how the error goes on after "forward mode (...) of": "attention needs ...".

    Raises:
        NotImplementedError: where forward mode through them is computed.
    """

    def one(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return _same_p.bind(x, of=of) if floating else x

    return jax.tree.map(one, tree)
