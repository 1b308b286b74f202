"""The operations of a traced rule as JavaScript, number by number."""

from collections.abc import Callable
from typing import Any

import numpy as np


class NotTranslated(Exception):
    """Some step of a rule has no translation; the message names it."""


def number(value: Any) -> str:
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
    return np.dtype(dtype) == np.float32


def wrapped(text: str, dtype: Any) -> str:
    """A number brought back into its type."""
    name = np.dtype(dtype).name
    rounded = {
        "int32": f"({text} | 0)",
        "uint32": f"({text} >>> 0)",
        "float32": f"Math.fround({text})",
        "bool": text,
        "int8": f"({text} << 24 >> 24)",
        "uint8": f"({text} & 255)",
        "int16": f"({text} << 16 >> 16)",
        "uint16": f"({text} & 65535)",
    }
    if name not in rounded:
        raise NotTranslated(f"numbers of type {name}")
    return rounded[name]


def product(a: str, b: str, dtype: Any) -> str:
    return f"{a} * {b}" if is_float(dtype) else f"Math.imul({a}, {b})"


def _quotient(a: str, b: str, dtype: Any) -> str:
    if is_float(dtype):
        return f"{a} / {b}"
    return f"({b} === 0 ? -1 : {a} / {b})"


def _remainder(a: str, b: str, dtype: Any) -> str:
    return f"{a} % {b}" if is_float(dtype) else f"({b} === 0 ? {a} : {a} % {b})"


def _logical(word: str, symbol: str) -> Callable[..., str]:
    def both(a: str, b: str, dtype: Any) -> str:
        return f"{a} {word if np.dtype(dtype) == np.bool_ else symbol} {b}"

    return both


#: Of two numbers, in the type of the result.
ARITHMETIC: dict[str, Callable[..., str]] = {
    "add": lambda a, b, dtype: f"{a} + {b}",
    "sub": lambda a, b, dtype: f"{a} - {b}",
    "mul": product,
    "div": _quotient,
    "rem": _remainder,
    "max": lambda a, b, dtype: f"Math.max({a}, {b})",
    "min": lambda a, b, dtype: f"Math.min({a}, {b})",
    "and": _logical("&&", "&"),
    "or": _logical("||", "|"),
    "xor": _logical("!==", "^"),
    "shift_left": lambda a, b, dtype: f"({b} > 31 ? 0 : {a} << {b})",
    "shift_right_logical": lambda a, b, dtype: f"({b} > 31 ? 0 : {a} >>> {b})",
    "shift_right_arithmetic": lambda a, b, dtype: f"({a} >> Math.min({b}, 31))",
}
#: Comparisons do not depend on the type.
COMPARED = {"eq": "===", "ne": "!==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
#: Of one number.
UNARY: dict[str, Callable[..., str]] = {
    "neg": lambda a, dtype: f"-{a}",
    "abs": lambda a, dtype: f"Math.abs({a})",
    "sign": lambda a, dtype: f"Math.sign({a})",
    "not": lambda a, dtype: f"!{a}" if np.dtype(dtype) == np.bool_ else f"~{a}",
    "floor": lambda a, dtype: f"Math.floor({a})",
    "ceil": lambda a, dtype: f"Math.ceil({a})",
    "sqrt": lambda a, dtype: f"Math.sqrt({a})",
    "square": lambda a, dtype: product(a, a, dtype),
    "copy": lambda a, dtype: a,
    "copy_p": lambda a, dtype: a,
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
    if np.dtype(after) == np.bool_:
        return f"Boolean({a})"
    if np.dtype(before) == np.bool_:
        return f"Number({a})"
    if np.dtype(before) == np.float32 and not is_float(after):
        a = f"Math.trunc({a})"
    return wrapped(a, after)
