"""Choice of the next token: top-k and top-p restriction, and sampling."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab._src.arguments import integers
from attnlab._src.ops.validate import is_wide_float
from attnlab._src.types import Array, ArrayLike, accumulation_dtype

#: The smallest normal float32; a lower temperature counts as 0.
_SMALLEST = float(np.finfo(np.float32).tiny)


def restrict(
    logits: ArrayLike,
    top_k: int | ArrayLike | None = None,
    top_p: float | ArrayLike | None = None,
) -> Array:
    """Sets the logits of tokens that ``top_k`` or ``top_p`` excludes to -inf.

    Among equal logits, the lower index ranks as more probable, as in ``argmax``.

    Args:
        logits: ``[*, V]``, of at least 16 bits.
        top_k: keep the k most probable tokens, exactly k of them: an int, or integers
            ``[*]``.
        top_p: keep (of those k) the fewest most probable tokens whose probabilities sum
            to at least ``top_p``, in (0, 1]; 1 keeps all. A number, or ``[*]``.

    Returns:
        ``[*, V]``.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it.

    Example:
        >>> restrict(jnp.array([2.0, 1.0, -5.0]), top_p=0.9)
        Array([  2.,   1., -inf], dtype=float32)
    """
    logits = jnp.asarray(logits)
    if not is_wide_float(logits.dtype):
        raise TypeError(
            "logits: expected a floating dtype of at least 16 bits, got "
            f"{logits.dtype}; cast them with .astype(jnp.float32)"
        )
    rows = logits.shape[:-1]
    top_k, top_p = as_top_k(top_k, rows), as_top_p(top_p, rows)
    with jax.debug_infs(False):  # -inf is intended here
        kept, index = _leading(logits, top_k, top_p)
        nothing = jnp.full_like(logits, -jnp.inf)
        return jnp.put_along_axis(nothing, index, kept, axis=-1, inplace=False)


def draw(
    logits: Array,
    rng: Array,
    temperature: Array,
    top_k: int | Array | None,
    top_p: Array | None,
) -> Array:
    """Draws tokens ``[*]`` at random from those that :func:`restrict` keeps.

    Args:
        logits: ``[*, V]``, at least float32.
        rng: a PRNG key.
        temperature: result of :func:`as_temperature`.
        top_k: result of :func:`as_top_k`.
        top_p: result of :func:`as_top_p`.
    """
    cold = temperature < _SMALLEST
    heat = jnp.where(cold, 1, temperature).astype(logits.dtype)
    if top_k is None and top_p is None:
        drawn = jax.random.categorical(rng, _above_greatest(logits) / heat)
    else:
        values, index = _leading(logits, top_k, top_p, heat)
        place = jax.random.categorical(rng, values)
        drawn = jnp.take_along_axis(index, place[..., None], -1)[..., 0]
    best, drawn = (x.astype(jnp.int32) for x in (logits.argmax(-1), drawn))
    return jnp.where(cold.reshape(cold.shape[:-1]), best, drawn)


def _leading(
    logits: Array,
    top_k: int | Array | None,
    top_p: Array | None,
    heat: Array | None = None,
) -> tuple[Array, Array]:
    """Logits sorted by probability, -inf for excluded tokens; and the tokens' indices.

    The logits are divided by ``heat`` after the k greatest are chosen and before
    ``top_p`` is applied.
    """
    size = logits.shape[-1]
    count = min(top_k, size) if isinstance(top_k, int) else size
    # lax.top_k ranks 0 above -0; argmax treats them as equal.
    values, index = lax.top_k(jnp.where(logits == 0, 0, logits), count)
    rank = jnp.arange(count, dtype=jnp.int32).reshape((1,) * (values.ndim - 1) + (-1,))
    if not (top_k is None or isinstance(top_k, int)):
        values = jnp.where(rank < top_k, values, -jnp.inf)
    values = values if heat is None else _above_greatest(values) / heat
    if top_p is not None:
        wide = values.astype(accumulation_dtype(values.dtype))
        # Not normalised: cumulative sums of equal numbers (1 each) are then exact.
        mass = jnp.exp(_above_greatest(wide)).cumsum(-1)
        before = jnp.where(rank == 0, 0, jnp.roll(mass, 1, axis=-1))
        p = top_p.astype(mass.dtype)
        kept = (before < p * mass[..., -1:]) | (p >= 1) | (rank == 0)
        values = jnp.where(kept, values, -jnp.inf)
    return values, index


def _above_greatest(logits: Array) -> Array:
    """Logits minus the greatest, so that the greatest does not overflow if divided."""
    greatest = logits.max(-1, keepdims=True)
    return logits - jnp.where(jnp.isfinite(greatest), greatest, 0)


def as_temperature(value: Any, rows: tuple[int, ...]) -> Array:
    """Checks temperatures: returns a number, or one for each row, ``[*rows, 1]``."""
    return _numbers("temperature", value, rows, "at least 0", lambda x: x >= 0)


def as_top_p(value: Any, rows: tuple[int, ...]) -> Array | None:
    """Checks ``top_p`` and returns it in the shape of :func:`as_temperature`."""
    if value is None:
        return None
    return _numbers(
        "top_p", value, rows, "a number in (0, 1]", lambda x: (x > 0) & (x <= 1)
    )


def as_top_k(value: Any, rows: tuple[int, ...]) -> int | Array | None:
    """Checks ``top_k``: an int stays static, an array as in :func:`as_temperature`."""
    if value is None:
        return None
    if not isinstance(value, (jax.Array, np.ndarray)):
        return as_count("top_k", value)
    numbers = jnp.asarray(integers("top_k", value))
    return _each("top_k", value, numbers, rows, "at least 1", lambda x: x >= 1)


def as_count(name: str, value: Any) -> int:
    """Checks that the value is an int of at least 1.

    Raises:
        TypeError: if it is not an int, or traced.
        ValueError: if it is less than 1.
    """
    try:
        count = operator.index(value)
    except TypeError:
        got = repr(value) if isinstance(value, float) else type(value).__name__
        raise TypeError(f"{name}: expected an int, got {got}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got bool")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
    return count


def _numbers(
    name: str, value: Any, rows: tuple[int, ...], expected: str, fits: Callable
) -> Array:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        real = any(jnp.issubdtype(dtype, k) for k in (jnp.floating, jnp.integer))
    if not real:
        raise TypeError(
            f"{name}: expected {expected}, got {dtype or type(value).__name__}"
        )
    return _each(name, value, jnp.asarray(value, float), rows, expected, fits)


def _each(
    name: str,
    given: Any,
    numbers: Array,
    rows: tuple[int, ...],
    expected: str,
    fits: Callable,
) -> Array:
    if numbers.shape not in ((), rows):
        raise ValueError(
            f"{name}: expected a number or one for each row, shape {rows}, got shape "
            f"{numbers.shape}"
        )
    if not isinstance(given, jax.core.Tracer) and not np.all(fits(np.asarray(given))):
        raise ValueError(f"{name}: expected {expected}, got {given}")
    return numbers[..., None] if numbers.ndim else numbers
