"""Reads masks from Python expressions: ``sliding_window(64, 64) | anchor(1)``."""

import ast
from typing import Any

from attnlab import masks
from attnlab._src.masks.base import Mask

#: Masks whose arguments are literals; all others need arrays or functions.
NAMES = (
    "anchor",
    "big_bird",
    "causal",
    "chunked",
    "dilated_window",
    "full",
    "longformer",
    "prefix",
    "random_blocks",
    "sliding_window",
    "streaming",
)


def read_mask(text: str) -> Mask:
    """The mask that an expression describes; no other code is evaluated.

    Args:
        text: calls of ``attnlab.masks`` with literal arguments, joined by ``&``, ``|``,
            ``~`` and parentheses.

    Raises:
        ValueError: if it is anything else; the message shows the offending part.

    Example:
        >>> read_mask("causal() & ~sliding_window(2, 0)")
        (causal() & ~sliding_window(2, 0))
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no expression: {error.msg}") from None
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from None


def _value(node: ast.expr) -> Mask:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.BitAnd):
            return left & right
        if isinstance(node.op, ast.BitOr):
            return left | right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        if any(k.arg is None for k in node.keywords):
            raise ValueError(
                f"expected plain arguments, without **, got {ast.unparse(node)!r}"
            )
        if name in NAMES:
            named = {str(k.arg): _literal(k.value) for k in node.keywords}
            return getattr(masks, name)(*map(_literal, node.args), **named)
    raise ValueError(
        f"expected a call of {', '.join(NAMES)}, or such calls joined by &, | and ~, "
        f"got {ast.unparse(node)!r}"
    )


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"expected a number, a list or None, got {ast.unparse(node)!r}"
        ) from None
