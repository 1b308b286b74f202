"""Shared checks of arguments: an error names the argument and what is expected."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def dtype_of(name: str, x: object) -> Any:
    """The type of an array's numbers (or of its PRNG keys).

    Raises:
        TypeError: if it is no array of JAX's or NumPy's.
    """
    dtype: Any = getattr(x, "dtype", None)
    try:
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return dtype
        if dtype is not None and hasattr(x, "shape"):
            return np.dtype(dtype)
    except TypeError:
        pass
    kind = type(x)
    plain = kind.__module__ == "builtins"
    got = kind.__name__ if plain else f"{kind.__module__}.{kind.__name__}"
    hint = "" if dtype is None else "; convert it with jnp.asarray"
    raise TypeError(f"{name}: expected an array of JAX's or NumPy's, got {got}{hint}")


def size(name: str, value: object, least: int = 1) -> int:
    """An int that is at least ``least``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def sizes(least: int = 1, **named: object) -> None:
    """:func:`size` of each."""
    for name, value in named.items():
        size(name, value, least)


def as_array(x: object) -> Any:
    """``x`` if it has a shape and a dtype, else ``np.asarray(x)``."""
    return x if hasattr(x, "dtype") and hasattr(x, "shape") else np.asarray(x)


def real(name: str, x: object) -> Any:
    """An array of real numbers; lists and numbers become NumPy arrays.

    Raises:
        TypeError: if it is something else: booleans, complex numbers, text, None.
    """
    array = as_array(x)
    dtype = dtype_of(name, array)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        got = repr(x) if array is not x else dtype
        raise TypeError(f"{name}: expected real numbers, got {got}")
    return array


#: The range of int32.
_LEAST, _MOST = -(2**31), 2**31 - 1


def integers(name: str, x: object) -> Any:
    """Integers as an int32 array; lists and numbers become NumPy arrays.

    Traced integers of a wider type cannot be checked; they are clipped to int32.

    Raises:
        TypeError: if it is something else.
        ValueError: if it is known here and does not fit 32 bits.
    """
    array = as_array(x)
    check_integers(name, array)
    return as_int32(array)


def check_integers(name: str, x: Any) -> None:
    """The checks of :func:`integers`, for an array or for its shape and dtype."""
    dtype = dtype_of(name, x)
    # NumPy holds integers beyond 64 bits as Python objects.
    huge = dtype == np.object_ and all(type(n) is int for n in x.flat)
    if not (huge or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name}: expected integers, got {dtype}")
    known = values(x) if is_wide(dtype) else None
    if known is None or known.size == 0:
        return
    for number in (known.min(), known.max()):
        if not _LEAST <= number <= _MOST:
            raise ValueError(
                f"{name}: expected integers from {_LEAST} to {_MOST} (32 bits), "
                f"got {number}"
            )


def check_kept(name: str, x: object) -> None:
    """Checks that JAX can hold an array: without x64 mode, it wraps wide integers.

    Raises:
        TypeError: if it is no array of numbers, of booleans or of keys.
        ValueError: if it holds integers, known here, that do not fit.
    """
    dtype = dtype_of(name, x)
    kinds = (jnp.number, jnp.bool_, jax.dtypes.prng_key)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise TypeError(f"{name}: expected numbers or booleans, got {dtype}")
    if not jnp.issubdtype(dtype, jnp.integer):
        return
    held: Any = jax.dtypes.canonicalize_dtype(dtype)
    known = None if held == dtype else values(x)
    if known is None or known.size == 0:
        return
    least, most = jnp.iinfo(held).min, jnp.iinfo(held).max
    for number in (known.min(), known.max()):
        if not least <= number <= most:
            raise ValueError(
                f"{name}: expected integers from {least} to {most} where JAX has no "
                f"{dtype}, got {number}; set jax_enable_x64, or give smaller integers"
            )


def is_wide(dtype: np.dtype) -> bool:
    """Whether int32 does not hold every integer of this type."""
    return not np.can_cast(dtype, np.int32)


def as_int32(x: Any) -> Any:
    """An integer array as int32; numbers that do not fit are clipped."""
    if is_wide(x.dtype):
        least = 0 if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else _LEAST
        x = x.clip(least, _MOST)
    return x.astype(np.int32)


def values(x: object) -> np.ndarray | None:
    """The values of an array as NumPy; None if it is traced or not addressable here."""
    known = isinstance(x, (np.ndarray, np.generic, jax.Array))
    if not known or isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def floating(name: str, x: object, hint: str = "; cast it with .astype") -> Any:
    """A floating array; lists and numbers become NumPy arrays.

    Args:
        name: of the argument.
        x: what was given.
        hint: how the error ends for an array of another type.

    Raises:
        TypeError: if it is something else.
    """
    array = real(name, x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating array, got {array.dtype}{hint}")
    return array


def prng_key(name: str, rng: object, hint: str = "; jax.random.key makes one") -> None:
    """Checks for one PRNG key, typed or not.

    Args:
        name: of the argument.
        rng: what was given.
        hint: how the error ends for anything that is no array.

    Raises:
        TypeError: if it is none.
        ValueError: if they are several.
    """
    if not isinstance(rng, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: expected a PRNG key, got {type(rng).__name__}{hint}")
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not typed and rng.dtype != np.uint32:
        raise TypeError(
            f"{name}: expected a PRNG key, got an array of {rng.dtype}; "
            "jax.random.key makes one"
        )
    if rng.ndim != (0 if typed else 1):
        raise ValueError(
            f"{name}: expected one PRNG key, got an array of shape {rng.shape}"
        )
    if not typed:
        try:
            jax.eval_shape(jax.random.wrap_key_data, rng)
        except TypeError:
            raise ValueError(
                f"{name}: {rng.shape[0]} words are no key of JAX's default generator; "
                "jax.random.key makes one"
            ) from None


def describe(array: jax.Array | np.ndarray | None) -> str:
    """An array in a repr: its dtype and shape."""
    if array is None:
        return "-"
    return f"{np.dtype(array.dtype).name}{list(array.shape)}".replace(", ", ",")
