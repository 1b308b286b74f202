"""The mathematics of one tile, shared by every implementation written in JAX."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import default_matmul_precision, lax

from attnlab.types import Array, AttentionInputs, PyTree, Tile

#: Precisions that let 16-bit inputs be multiplied as such.
_ROUGH = (None, "default", "fastest", "bfloat16", lax.Precision.DEFAULT)


def matmul(inputs: AttentionInputs, a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contracts one axis of each, accumulating in the accumulation type."""
    dtype = inputs.accumulation_dtype
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=inputs.precision,
        preferred_element_type=dtype,
    )


def precision_name(precision: Any) -> str | None:
    """A precision as the name that ``jax.default_matmul_precision`` takes.

    Returns:
        The name; None where there is none: of None, of a ``DotAlgorithm``, and of a
        pair of two.

    Raises:
        ValueError: if it is no precision.
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
        return lax.Precision(precision).name.lower()
    except ValueError:
        raise ValueError(
            "precision: expected None, 'default', 'high', 'highest', a "
            f"jax.lax.Precision or a jax.lax.DotAlgorithmPreset, got {precision!r}"
        ) from None


@contextlib.contextmanager
def precision_of(precision: Any) -> Iterator[None]:
    """Within this, products that name no precision have this one, if it is one."""
    name = precision_name(precision)
    with contextlib.nullcontext() if name is None else default_matmul_precision(name):
        yield


def may_round(inputs: AttentionInputs) -> bool:
    """Whether 16-bit inputs may be multiplied as such (weights are rounded then).

    As ``precision=``, or else JAX's own setting, asks.
    """
    config: Any = jax.config
    asked = inputs.precision
    if asked is None:
        asked = config.jax_default_matmul_precision
    return asked in _ROUGH


def scaled(inputs: AttentionInputs, x: Array, head_scale: Array | None) -> Array:
    """A tile times the factors of inner products; ``head_scale``: ``[1, 1]``."""
    if inputs.logit_scale != 1:
        x = x * inputs.logit_scale
    return x if head_scale is None else x * head_scale


def compare(
    inputs: AttentionInputs,
    params: PyTree,
    head_scale: Array | None,
    query: Array,
    key: Array,
) -> Array:
    """Logits of one tile before modifiers: ``[q, P], [k, P] -> [q, k]``."""
    if inputs.score.is_inner_product:
        # Not the query: a matrix unit may round it to 16 bits, or it has no more.
        return scaled(inputs, matmul(inputs, query, key, (1, 1)), head_scale)
    dtype = inputs.accumulation_dtype
    with precision_of(inputs.precision):
        return inputs.score.compare(params, query, key).astype(dtype)


def modify(
    inputs: AttentionInputs, logits: Array, tile: Tile, operands: PyTree
) -> Array:
    """Applies the modifiers in the order given."""
    for modifier, own in zip(inputs.modifiers, operands, strict=True):
        logits = modifier.apply(logits, tile, *own)
    return logits


def kept(inputs: AttentionInputs, words: tuple[Array, Array]) -> Array:
    """Which entries survive dropout: words ``[q, 1], [1, k] -> bool [q, k]``."""
    x = words[0] ^ words[1]
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= jnp.uint32(0x846CA68B)
    x ^= x >> 16
    return x >> 8 >= jnp.uint32(round(inputs.dropout_rate * 2**24))


def squeeze_params(tree: PyTree) -> PyTree:
    """Pair parameters of one tile, ``[1, 1, *payload] -> payload``."""
    return jax.tree.map(lambda x: x[0, 0], tree)
