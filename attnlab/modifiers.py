"""Modifiers: changes of the logits, in the order given, before the mask."""

from attnlab._src.modifiers.bias import bias as bias
from attnlab._src.modifiers.bias import soft_cap as soft_cap
from attnlab._src.modifiers.relative import alibi as alibi
from attnlab._src.modifiers.relative import alibi_slopes as alibi_slopes
from attnlab._src.modifiers.relative import clipped_relative as clipped_relative
from attnlab._src.modifiers.relative import relative_bias as relative_bias
from attnlab._src.types import Modifier as Modifier

__all__ = [
    "Modifier",
    "alibi",
    "alibi_slopes",
    "bias",
    "clipped_relative",
    "relative_bias",
    "soft_cap",
]
