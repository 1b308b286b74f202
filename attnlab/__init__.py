"""Attention with any score, any mask, on any backend."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlab import masks as masks
    from attnlab import modifiers as modifiers
    from attnlab import nn as nn
    from attnlab import scores as scores
    from attnlab.ops import attention as attention
    from attnlab.ops import attention_with_stats as attention_with_stats
    from attnlab.ops import cost as cost
    from attnlab.ops import dot_product_attention as dot_product_attention
    from attnlab.ops import explain as explain
    from attnlab.types import AttentionResult as AttentionResult
    from attnlab.types import Modifier as Modifier
    from attnlab.types import Score as Score

__all__ = [
    "AttentionResult",
    "Modifier",
    "Score",
    "attention",
    "attention_with_stats",
    "cost",
    "dot_product_attention",
    "explain",
    "masks",
    "modifiers",
    "nn",
    "scores",
]

_ROOMS = ("masks", "modifiers", "nn", "scores", "types")
_OF_TYPES = ("AttentionResult", "Modifier", "Score")


# Each name comes when it is first used: JAX and Flax take a while to import, and the
# command line wants to be there before them.
def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"attnlab.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "types" if name in _OF_TYPES else "ops"
    value = getattr(importlib.import_module(f"attnlab.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
