"""Masks: which query may attend to which key, how masks combine, and their plans."""

from attnlab._src.masks.base import Mask as Mask
from attnlab._src.masks.base import as_mask as as_mask
from attnlab._src.masks.base import dense as dense
from attnlab._src.masks.base import full as full
from attnlab._src.masks.data import documents as documents
from attnlab._src.masks.data import lengths as lengths
from attnlab._src.masks.data import predicate as predicate
from attnlab._src.masks.layouts import blocks as blocks
from attnlab._src.masks.layouts import random_blocks as random_blocks
from attnlab._src.masks.patterns import anchor as anchor
from attnlab._src.masks.patterns import big_bird as big_bird
from attnlab._src.masks.patterns import longformer as longformer
from attnlab._src.masks.patterns import streaming as streaming
from attnlab._src.masks.per_head import per_head as per_head
from attnlab._src.masks.selected import selected as selected
from attnlab._src.masks.structural import causal as causal
from attnlab._src.masks.structural import chunked as chunked
from attnlab._src.masks.structural import dilated_window as dilated_window
from attnlab._src.masks.structural import prefix as prefix
from attnlab._src.masks.structural import sliding_window as sliding_window

__all__ = [
    "Mask",
    "anchor",
    "as_mask",
    "big_bird",
    "blocks",
    "causal",
    "chunked",
    "dense",
    "dilated_window",
    "documents",
    "full",
    "lengths",
    "longformer",
    "per_head",
    "predicate",
    "prefix",
    "random_blocks",
    "selected",
    "sliding_window",
    "streaming",
]
