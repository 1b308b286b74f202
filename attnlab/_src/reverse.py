"""An identity that only reverse mode may pass: forward mode is told what would do.

A function with a backward pass of its own carries no tangents along, and what JAX says
of that speaks of what the caller cannot see.
"""

from typing import Any, NoReturn

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

#: The identity, and what it makes of tangents: reverse mode transposes that and never
#: computes it.
_same_p = jax.extend.core.Primitive("reverse_only")
_tangent_p = jax.extend.core.Primitive("reverse_only_tangent")


def _tangent(primals: Any, tangents: Any, *, of: str) -> tuple[Any, Any]:
    (tangent,) = tangents
    if not isinstance(tangent, ad.Zero):
        tangent = _tangent_p.bind(tangent, of=of)
    return _same_p.bind(*primals, of=of), tangent


def _refuse(*_: Any, of: str, **__: Any) -> NoReturn:
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


def reverse_only(tree: Any, of: str) -> Any:
    """The same arrays, for a function that has no forward mode.

    Args:
        tree: of arrays.
        of: whose derivatives they are, and what would do: "attention needs ...".

    Raises:
        NotImplementedError: where forward mode through them is computed.
    """

    def one(x: Any) -> Any:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return _same_p.bind(x, of=of) if floating else x

    return jax.tree.map(one, tree)
