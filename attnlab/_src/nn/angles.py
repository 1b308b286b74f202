"""Sines and cosines of positions times rates, accurate to their dtype at any position.

A rate is stored in turns per position, as a binary fraction of 64 or 96 bits. Its
product with a position overflows as an unsigned integer does, which leaves the angle
modulo a full turn: large positions lose no accuracy.
"""

import decimal
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from attnlab._src.arguments import integers
from attnlab._src.types import Array, ArrayLike

_PI = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097")


def sinusoids(
    positions: ArrayLike,
    features: int,
    *,
    base: float = 10_000.0,
    interleaved: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """``sin`` and ``cos`` of positions, with wavelengths in a geometric series.

    They are accurate to their dtype at every position.

    Args:
        positions: ``[*, T]`` integers.
        features: number of features, even.
        base: the wavelengths go from ``2 pi`` to nearly ``2 pi base``.
        interleaved: whether even features are ``sin`` and odd ones ``cos``, as in the
            paper, instead of all ``sin`` before all ``cos`` (Marian).
        dtype: float32 or float64.

    Returns:
        ``[*, T, features]``.

    Raises:
        TypeError: if positions are not integers.
        ValueError: if ``features`` is odd.

    References:
        Vaswani et al., 2017, section 3.5.
    """
    if features % 2:
        raise ValueError(f"features: expected an even number, got {features}")
    sin, cos = sin_cos(positions, features, base=base, dtype=dtype)
    pairs = jnp.stack([sin, cos], -1 if interleaved else -2)
    return pairs.reshape(*sin.shape[:-1], features)


def sin_cos(
    positions: ArrayLike,
    features: int,
    *,
    base: float,
    scaling: float = 1.0,
    offset: int = 0,
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    """Sine and cosine of ``(positions + offset) / scaling * base ** (-i / features)``.

    Args:
        positions: ``[*]`` integers.
        features: number of features, even; i is 0, 2, ..., ``features - 2``.
        base: the longest wavelength is nearly ``2 pi base``.
        scaling: number that positions are divided by.
        offset: number added to positions before the division.
        dtype: float32 or float64.

    Returns:
        Sines and cosines ``[*, features / 2]``.
    """
    words = 3 if np.dtype(dtype) == np.float64 else 2
    rates, starts = _turns(float(base), features, float(scaling), offset, words)
    positions = jnp.asarray(integers("positions", positions))
    return _sin_cos(positions, rates, starts, np.dtype(dtype))


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _sin_cos(
    positions: Array, rates: ArrayLike, starts: ArrayLike, dtype: np.dtype
) -> tuple[Array, Array]:
    """Sines and cosines of positions times rates plus starts, both in turns."""
    shape = (1,) * positions.ndim + (-1,)
    # Position + 2^31 is an unsigned integer; ``starts`` corrects for it.
    counts = lax.bitcast_convert_type(positions, jnp.uint32) ^ np.uint32(1 << 31)
    counts = counts[..., None]

    found, above, carries = [], jnp.zeros_like(counts), [jnp.zeros_like(counts)] * 2
    for rate, start in zip(rates[::-1], starts[::-1], strict=True):  # low word first
        high, low = _product(counts, rate.reshape(shape))
        word, carries[0] = _sum(low, above, carries[0])
        word, carries[1] = _sum(word, start.reshape(shape), carries[1])
        found.append(word)
        above = high
    most, *less = found[::-1]
    # The nearest quarter of a turn, and a remainder of at most an eighth.
    quarter = (most + np.uint32(1 << 29)) >> 30
    left = lax.bitcast_convert_type(most - (quarter << 30), jnp.int32)
    turn = left.astype(dtype) * 2.0**-32
    for place, word in enumerate(less, 2):
        turn = turn + word.astype(dtype) * 2.0 ** (-32 * place)
    sin, cos = jnp.sin(turn * (2 * math.pi)), jnp.cos(turn * (2 * math.pi))
    odd, half = quarter % 2 == 1, quarter >= 2
    sin, cos = jnp.where(odd, cos, sin), jnp.where(odd, sin, cos)
    return jnp.where(half, -sin, sin), jnp.where(half ^ odd, -cos, cos)


@functools.lru_cache(maxsize=64)
def _turns(
    base: float, features: int, scaling: float, offset: int, words: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rates and angles at position -2^31, in turns: uint32 ``[words, features / 2]``.

    The first word is the most significant one.
    """
    whole = 1 << 32 * words
    with decimal.localcontext(prec=60):
        unit = whole / (2 * _PI * decimal.Decimal(scaling))
        powers = (decimal.Decimal(-i) / features for i in range(0, features, 2))
        rates = [round(unit * decimal.Decimal(base) ** power) for power in powers]

    def split(numbers: list[int]) -> np.ndarray:
        shifts = [32 * place for place in reversed(range(words))]
        parts = [[x % whole >> shift & 0xFFFFFFFF for x in numbers] for shift in shifts]
        return np.array(parts, np.uint32)

    return split(rates), split([(offset - (1 << 31)) * rate for rate in rates])


def _product(a: Array, b: np.ndarray) -> tuple[Array, Array]:
    """The upper and the lower word of a product of two words."""
    a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
    middle = a1 * b0 + (a0 * b0 >> 16)
    other = a0 * b1 + (middle & 0xFFFF)
    return a1 * b1 + (middle >> 16) + (other >> 16), a * b


def _sum(a: Array, b: Array, carry: Array) -> tuple[Array, Array]:
    """The sum of two words and a carry: a word, and the carry to the next word."""
    part = a + b
    total = part + carry
    return total, ((part < a) | (total < part)).astype(jnp.uint32)
