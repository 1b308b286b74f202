"""The mathematics of one tile, shared by every implementation written in JAX."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import default_matmul_precision, lax
from jax.lax import PrecisionLike

from attnlab._src.operands import tile_shape
from attnlab._src.scores.projected import unwrapped
from attnlab._src.types import Array, AttentionInputs, PyTree, Tile

#: Precisions that allow products of 16-bit inputs without conversion to float32.
_ROUGH = (None, "default", "fastest", "bfloat16", lax.Precision.DEFAULT)


def matmul(inputs: AttentionInputs, a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contracts one axis of each array, in the accumulation type."""
    dtype = inputs.accumulation_dtype
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=inputs.precision,
        preferred_element_type=dtype,
    )


@jax.custom_jvp
def finite(x: Array) -> Array:
    """``x`` with 0 in place of NaN and infinity; its derivative is that of ``x``.

    Otherwise the weight 0 of a hidden pair times NaN would be NaN in a product.
    """
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


@finite.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return finite(*primals), tangents[0]


def spoilt(x: Array) -> Array:
    """Which rows have a number that is not finite: ``[..., X] -> bool [...]``."""
    return ~jnp.isfinite(x).all(-1)


def precision_name(precision: Any) -> str | None:
    """A precision as the name that ``jax.default_matmul_precision`` takes.

    Returns:
        The name; None for None, a ``DotAlgorithm``, or a pair of different precisions,
        which have no name.

    Raises:
        ValueError: if it is not a precision.
    """
    if precision is None or isinstance(precision, lax.DotAlgorithm):
        return None
    if isinstance(precision, tuple) and len(precision) == 2:
        left, right = map(precision_name, precision)
        return left if left == right else None
    presets = lax.DotAlgorithmPreset
    if isinstance(precision, str) and precision in presets.__members__:
        precision = presets[precision]
    if isinstance(precision, presets):
        return "default" if precision is presets.DEFAULT else precision.name
    try:
        hash(precision)  # static arguments must be hashable
        return lax.Precision(precision).name.lower()
    except (TypeError, ValueError):
        raise ValueError(
            "precision: expected None, 'default', 'high', 'highest', a "
            f"jax.lax.Precision or a jax.lax.DotAlgorithmPreset, got {precision!r}"
        ) from None


@contextlib.contextmanager
def precision_of(precision: PrecisionLike) -> Iterator[None]:
    """A context that sets the default precision of products, if it has a name."""
    name = precision_name(precision)
    with contextlib.nullcontext() if name is None else default_matmul_precision(name):
        yield


def may_round(inputs: AttentionInputs) -> bool:
    """Whether 16-bit inputs may be multiplied in 16 bits; weights are rounded then.

    It depends on ``precision=`` or, without that, on JAX's own setting.
    """
    config: Any = jax.config
    asked = inputs.precision
    if asked is None:
        asked = config.jax_default_matmul_precision
    return asked in _ROUGH


def scaled(inputs: AttentionInputs, x: Array, head_scale: Array | None) -> Array:
    """A tile times the scales of the logits; ``head_scale`` is ``[1, 1]`` or None."""
    if inputs.logit_scale != 1:
        x = x * inputs.logit_scale
    return x if head_scale is None else x * head_scale


def widened(inputs: AttentionInputs, tree: PyTree) -> PyTree:
    """Floating arrays in the accumulation type, so that their gradients are, too."""
    dtype = inputs.accumulation_dtype

    def one(x: Array) -> Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


def compare(
    inputs: AttentionInputs,
    params: PyTree,
    head_scale: Array | None,
    query: Array,
    key: Array,
) -> Array:
    """Logits of one tile before modifiers: ``[q, P], [k, P] -> [q, k]``."""
    if inputs.score.is_inner_product:
        # Scales the logits, not the query, which may be rounded to 16 bits.
        return scaled(inputs, matmul(inputs, query, key, (1, 1)), head_scale)
    dtype = inputs.accumulation_dtype
    shape = query.shape[0], key.shape[0]
    name = f"score: {type(unwrapped(inputs.score)).__name__}.compare"
    with precision_of(inputs.precision):
        sides = widened(inputs, (params, query, key))
        return _logits(name, shape, dtype, inputs.score.compare, *sides)


def modify(
    inputs: AttentionInputs,
    logits: Array,
    tile: Tile,
    operands: PyTree,
    seen: Array | None = None,
) -> Array:
    """Applies the modifiers in the order given.

    Args:
        inputs: the canonical record.
        logits: ``[q, k]``.
        tile: positions and head of the logits.
        operands: operands of each modifier.
        seen: ``[q or 1, k or 1]``, which pairs are visible: no gradient flows through
            others, even if a modifier's derivative is not finite; None: all pairs.
    """
    shape, dtype = logits.shape, logits.dtype
    for modifier, own in zip(inputs.modifiers, operands, strict=True):
        name = f"modifiers: {type(modifier).__name__}.apply"
        given = [logits, *widened(inputs, own)]
        if seen is not None:
            given = [_only_where(seen, x) if x.shape == shape else x for x in given]
        logits, *given = given
        logits = _logits(name, shape, dtype, modifier.apply, logits, tile, *given)
    return logits


def _only_where(seen: Array, x: Array) -> Array:
    """``x``, but for pairs that are not seen made finite and without gradient."""
    other = lax.stop_gradient(x)
    return jnp.where(seen, x, jnp.where(jnp.isfinite(other), other, 0))


def _logits(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    make: Callable[..., Array],
    *args: PyTree,
) -> Array:
    """``make(*args)``, checked to be floating and of the shape of the tile."""
    where = f"for a tile of {shape[0]} x {shape[1]} pairs"
    try:
        found = make(*args)
        got = jnp.result_type(found)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        said = str(error).partition("\n")[0].rstrip(".")
        raise kind(
            f"{name} fails {where}: {said}; it must work on tiles of any size, and "
            "read arrays only through its arguments"
        ) from error
    if not jnp.issubdtype(got, jnp.floating):
        raise TypeError(f"{name} yields {got}, expected a real floating type")
    if jnp.shape(found) != shape:
        raise ValueError(
            f"{name} yields shape {jnp.shape(found)} {where}, expected {shape}"
        )
    return jnp.asarray(found).astype(dtype)


def check_tile(inputs: AttentionInputs) -> None:
    """Checks score and modifiers by tracing them on a small tile.

    The check does not depend on the implementation. The tile is not square, so that a
    transposed or broadcast result is detected.

    Raises:
        TypeError, ValueError: if the result is wrong; names the class, what it yields
            and what is expected.
    """
    traced = _of_small_tile(inputs)
    if any(isinstance(x, jax.core.Tracer) for x in traced.consts):
        names = [type(x).__name__ for x in (unwrapped(inputs.score), *inputs.modifiers)]
        raise TypeError(
            f"score, modifiers: one of {', '.join(names)} reads a traced array that is "
            "none of its arguments; give it as a field, through pair_params or operands"
        )


def modifiers_read_head(inputs: AttentionInputs) -> bool:
    """Whether a modifier reads the head of a tile, as user-defined ones may."""
    if not inputs.modifiers:
        return False
    traced = _of_small_tile(inputs).jaxpr
    return any(x is traced.invars[4] for step in traced.eqns for x in step.invars)


def _of_small_tile(inputs: AttentionInputs) -> Any:
    """Jaxpr of the logits of a tile.

    Its arguments are query, key, their positions, the head, and the operands.
    """
    sides = 2, 3

    def logits(arrays: Sequence[Array], params: PyTree, modifiers: PyTree) -> Array:
        query, key, *places = arrays
        found = compare(inputs, squeeze_params(params), None, query, key)
        return modify(inputs, found, Tile(*places), modifiers)

    shapes = [(2, inputs.sizes.P), (3, inputs.sizes.P), (2, 1), (1, 3), ()]
    types = [inputs.query.dtype, inputs.key.dtype, *[jnp.int32] * 3]
    arrays = list(map(jax.ShapeDtypeStruct, shapes, types))
    operands = inputs.pair_params, inputs.modifier_operands
    tiles = jax.tree.map(lambda x: tile_shape(x, sides), operands)
    return jax.make_jaxpr(logits)(arrays, *tiles)


def kept(inputs: AttentionInputs, words: tuple[Array, Array]) -> Array:
    """Which weights dropout keeps: words ``[q, 1], [1, k] -> bool [q, k]``."""
    x = words[0] ^ words[1]
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= jnp.uint32(0x846CA68B)
    x ^= x >> 16
    return x >> 8 >= jnp.uint32(round(inputs.dropout_rate * 2**24))


def squeeze_params(tree: PyTree) -> PyTree:
    """Removes the leading axes of a tile's pair parameters, ``[1, 1, *payload]``."""
    return jax.tree.map(lambda x: x[0, 0], tree)
