"""Attention with any score, any mask, on any backend."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnlab import extend as extend
    from attnlab import masks as masks
    from attnlab import modifiers as modifiers
    from attnlab import nn as nn
    from attnlab import scores as scores
    from attnlab import select as select
    from attnlab import sharding as sharding
    from attnlab._src.ops.attention import attention as attention
    from attnlab._src.ops.attention import attention_with_stats as attention_with_stats
    from attnlab._src.ops.cost import Cost as Cost
    from attnlab._src.ops.cost import cost as cost
    from attnlab._src.ops.drop_in import dot_product_attention as dot_product_attention
    from attnlab._src.ops.explain import Explanation as Explanation
    from attnlab._src.ops.explain import explain as explain
    from attnlab._src.types import AttentionResult as AttentionResult
    from attnlab._src.types import Modifier as Modifier
    from attnlab._src.types import Score as Score
    from attnlab._src.view.page import Page as Page
    from attnlab._src.view.page import show as show
    from attnlab._src.view.page import show_weights as show_weights

#: Where each public name comes from.
_HOMES = {
    "AttentionResult": "_src.types",
    "Cost": "_src.ops.cost",
    "Explanation": "_src.ops.explain",
    "Modifier": "_src.types",
    "Page": "_src.view.page",
    "Score": "_src.types",
    "attention": "_src.ops.attention",
    "attention_with_stats": "_src.ops.attention",
    "cost": "_src.ops.cost",
    "dot_product_attention": "_src.ops.drop_in",
    "explain": "_src.ops.explain",
    "show": "_src.view.page",
    "show_weights": "_src.view.page",
}
_MODULES = ("extend", "masks", "modifiers", "nn", "scores", "select", "sharding")

__all__ = [
    "AttentionResult",
    "Cost",
    "Explanation",
    "Modifier",
    "Page",
    "Score",
    "attention",
    "attention_with_stats",
    "cost",
    "dot_product_attention",
    "explain",
    "extend",
    "masks",
    "modifiers",
    "nn",
    "scores",
    "select",
    "sharding",
    "show",
    "show_weights",
]


# Each name is imported on first use: importing JAX and Flax takes a while, and the
# command line must not wait for it.
def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"attnlab.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attnlab.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
