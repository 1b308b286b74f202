"""The operations of a traced rule as JavaScript, number by number."""

from collections.abc import Callable
from typing import Any

import numpy as np


class NotTranslated(Exception):
    """Some step of a rule has no translation; the message names it."""


#: Types whose numbers a page computes as XLA does.
TYPES = ("bool", "int32", "uint32", "float32")


def number(value: Any) -> str:
    """A known number, as it is written in JavaScript."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if np.issubdtype(np.asarray(value).dtype, np.integer):
        return f"({int(value)})"
    value = float(value)
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "Infinity" if value > 0 else "(-Infinity)"
    return f"({value!r})"


def is_float(dtype: Any) -> bool:
    """Whether numbers of a type are floats (of 32 bits; others are not translated)."""
    return np.dtype(dtype) == np.float32


def checked(dtype: Any) -> None:
    """Checks that numbers of a type are computed here as in XLA.

    Raises:
        NotTranslated: if they are not.
    """
    if str(dtype) not in TYPES:
        raise NotTranslated(f"numbers of type {dtype}")


def wrapped(text: str, dtype: Any) -> str:
    """A number brought back into its type."""
    return {
        "int32": f"(({text}) | 0)",
        "uint32": f"(({text}) >>> 0)",
        "float32": f"Math.fround({text})",
        "bool": f"Boolean({text})",
    }[str(dtype)]


def _of_integers(write: Callable[..., str]) -> Callable[..., str]:
    """Of floats, XLA may compute it otherwise: by a reciprocal, or fused with a sum."""

    def checked_write(*given: Any) -> str:
        if is_float(given[-1]):
            raise NotTranslated("products and quotients of floats")
        return write(*given)

    return checked_write


def _arithmetic_shift(a: str, b: str, dtype: Any) -> str:
    if str(dtype) != "int32":
        raise NotTranslated(f"arithmetic shifts of {dtype}")
    return f"{a} >> Math.min({b} >>> 0, 31)"


def _logical(word: str, symbol: str) -> Callable[..., str]:
    def both(a: str, b: str, dtype: Any) -> str:
        return f"{a} {word if str(dtype) == 'bool' else symbol} {b}"

    return both


#: Of two numbers, in the type of the result.
ARITHMETIC: dict[str, Callable[..., str]] = {
    "add": lambda a, b, dtype: f"{a} + {b}",
    "sub": lambda a, b, dtype: f"{a} - {b}",
    "mul": _of_integers(lambda a, b, dtype: f"Math.imul({a}, {b})"),
    "div": _of_integers(lambda a, b, dtype: f"{b} === 0 ? -1 : {a} / {b}"),
    "rem": _of_integers(lambda a, b, dtype: f"{b} === 0 ? {a} : {a} % {b}"),
    "max": lambda a, b, dtype: f"Math.max({a}, {b})",
    "min": lambda a, b, dtype: f"Math.min({a}, {b})",
    "and": _logical("&&", "&"),
    "or": _logical("||", "|"),
    "xor": _logical("!==", "^"),
    # The amount of a shift counts as unsigned.
    "shift_left": lambda a, b, dtype: f"({b} >>> 0) > 31 ? 0 : {a} << {b}",
    "shift_right_logical": lambda a, b, dtype: f"({b} >>> 0) > 31 ? 0 : {a} >>> {b}",
    "shift_right_arithmetic": _arithmetic_shift,
}
#: Comparisons do not depend on the type.
COMPARED = {"eq": "===", "ne": "!==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
#: Of one number.
UNARY: dict[str, Callable[..., str]] = {
    "neg": lambda a, dtype: f"-{a}",
    "abs": lambda a, dtype: f"Math.abs({a})",
    "sign": lambda a, dtype: f"Math.sign({a})",
    "not": lambda a, dtype: f"!{a}" if str(dtype) == "bool" else f"~{a}",
    "floor": lambda a, dtype: f"Math.floor({a})",
    "ceil": lambda a, dtype: f"Math.ceil({a})",
    "square": _of_integers(lambda a, dtype: f"Math.imul({a}, {a})"),
    "copy": lambda a, dtype: a,
    "stop_gradient": lambda a, dtype: a,
}
REDUCED = {
    "reduce_or": "or",
    "reduce_and": "and",
    "reduce_xor": "xor",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_sum": "add",
}


def converted(a: str, before: Any, after: Any) -> str:
    """A number in another type."""
    if str(after) == "bool":
        return f"!({a} === 0)"  # what is no number is true
    if str(before) == "bool":
        return f"Number({a})"
    if is_float(before) and not is_float(after):
        # Beyond the range it stays at the end; what is no number becomes 0.
        limits = np.iinfo(after)
        a = f"Math.min(Math.max(Math.trunc({a}) || 0, {limits.min}), {limits.max})"
    return wrapped(a, after)


def outside(dtype: Any) -> str:
    """What a gather yields beyond the ends of an array, if it fills."""
    if str(dtype) == "bool":
        return "true"
    if is_float(dtype):
        return "NaN"
    limits = np.iinfo(dtype)
    return str(limits.max if limits.min == 0 else limits.min)
