"""Tells which functions a kernel can evaluate: those that are elementwise over pairs.

They work on a tile of either orientation, ``[queries, keys]`` or ``[keys, queries]``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab._src.exact import exactly
from attnlab._src.masks.base import And, Mask, Not, Or
from attnlab._src.scores.pairwise import Mlp
from attnlab._src.scores.projected import comparison_class, unwrapped
from attnlab._src.types import Array, Modifier, PyTree, Score, Tile

#: Names of elementwise primitives that a kernel may contain; "div" is of integers.
_ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "and", "clamp", "convert_element_type", "copy", "cos",
    "div", "eq", "exp", "exp2", "float div", "floor", "ge", "gt", "integer_pow", "le",
    "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not",
    "one_minus_square", "or", "pow",
    "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sqrt", "square", "stop_gradient", "sub",
    "tanh", "xor",
})  # fmt: skip
_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call")


def is_elementwise(
    fn: Callable[..., Array], *shapes: PyTree, lacking: frozenset[str] = frozenset()
) -> bool:
    """Whether each element of the result depends only on that element of each array.

    Args:
        fn: function of scalars, and of arrays of one common shape.
        shapes: shapes of its arguments.
        lacking: primitives that it must not contain.
    """
    try:
        traced = jax.make_jaxpr(fn)(*shapes)
    except Exception:  # user-defined functions may raise anything
        return False
    if any(x.ndim > 0 for x in map(jnp.asarray, traced.consts)):
        return False
    return _elementwise(traced.jaxpr, _ELEMENTWISE - lacking)


def _elementwise(jaxpr: Any, known: frozenset[str]) -> bool:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        dtype = equation.outvars[0].aval.dtype
        if name == "div" and jnp.issubdtype(dtype, jnp.floating):
            name = "float div"
        if name == "broadcast_in_dim":
            if equation.invars[0].aval.size != 1:
                return False
        elif name in _CALLS:
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if inner is None or not _elementwise(getattr(inner, "jaxpr", inner), known):
                return False
        elif name not in known:
            return False
    return True


def tile_shapes(tree: PyTree) -> PyTree:
    """Shapes for tracing: a small tile for operands along T or S, else a scalar."""

    def one(x: Array) -> jax.ShapeDtypeStruct:
        runs = max(x.shape[2:4]) > 1
        return jax.ShapeDtypeStruct((8, 16) if runs else (), x.dtype)

    return jax.tree.map(one, tree)


_POSITIONS = jax.ShapeDtypeStruct((8, 16), jnp.int32)
_HEAD = jax.ShapeDtypeStruct((), jnp.int32)


def mask_is_elementwise(
    mask: Mask, operands: PyTree, lacking: frozenset[str] = frozenset()
) -> bool:
    """Whether a kernel can evaluate it, which lacks some primitives."""
    if any(x.ndim > 4 for x in jax.tree.leaves(operands)):
        return False

    def visible(t: Array, s: Array, head: Array, operands: PyTree) -> Array:
        return mask.visible(Tile(t, s, head), operands)

    shapes = _POSITIONS, _POSITIONS, _HEAD, tile_shapes(operands)
    return is_elementwise(visible, *shapes, lacking=lacking)


def modifier_is_elementwise(
    modifier: Modifier,
    operands: Sequence[Array],
    lacking: frozenset[str] = frozenset(),
) -> bool:
    """Whether a kernel can evaluate it, which lacks some primitives."""
    if any(x.ndim > 4 for x in operands):
        return False

    def apply(z: Array, t: Array, s: Array, head: Array, operands: PyTree) -> Array:
        return modifier.apply(z, Tile(t, s, head), *operands)

    logits = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    shapes = tile_shapes(tuple(operands))
    given = logits, _POSITIONS, _POSITIONS, _HEAD, shapes
    if not is_elementwise(apply, *given, lacking=lacking):
        return False
    if not lacking:
        return True

    def pulled(d: Array, z: Array, *given: PyTree) -> PyTree:
        return jax.vjp(lambda z: apply(z, *given), z)[1](d)[0]

    return is_elementwise(pulled, logits, *given, lacking=lacking)


#: Tells of a mask and its operands whether a kernel evaluates it.
Knows = Callable[[Mask, PyTree], bool]


def needs_bits(mask: Mask, operands: PyTree, knows: Knows = mask_is_elementwise) -> int:
    """Number of parts of a mask that a kernel cannot evaluate and gets as bits."""
    if exactly(mask, And, Or):
        pairs = zip(mask.parts, operands, strict=True)
        return sum(needs_bits(*pair, knows) for pair in pairs)
    if exactly(mask, Not):
        return needs_bits(mask.part, operands, knows)
    return not knows(mask, operands)


def why_not_score(score: Score) -> str | None:
    """Why no kernel can compute a score; None if one can."""
    kind, score = comparison_class(score), unwrapped(score)
    name = type(score).__name__
    if kind is None:
        return f"it does not know the score {name}"
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    if kind is Mlp and not is_elementwise(score.activation, shape):
        return f"it cannot compute the activation of {name}"
    return None
