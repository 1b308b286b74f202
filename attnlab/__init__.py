"""Attention with any score, any mask, on any backend."""

import importlib
from typing import TYPE_CHECKING, Any

from attnlab import masks as masks
from attnlab import modifiers as modifiers
from attnlab import scores as scores
from attnlab.ops import attention as attention
from attnlab.ops import attention_with_stats as attention_with_stats
from attnlab.ops import cost as cost
from attnlab.ops import dot_product_attention as dot_product_attention
from attnlab.ops import explain as explain
from attnlab.types import AttentionResult as AttentionResult
from attnlab.types import Modifier as Modifier
from attnlab.types import Score as Score

if TYPE_CHECKING:
    from attnlab import nn as nn

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


def __getattr__(name: str) -> Any:
    # The modules need Flax, which takes as long to import as all the rest.
    if name == "nn":
        return importlib.import_module("attnlab.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
