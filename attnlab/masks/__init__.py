"""Who may attend to whom: lazy masks, their algebra, and the plans they yield."""

from attnlab.masks.base import Mask as Mask
from attnlab.masks.base import as_mask as as_mask
from attnlab.masks.base import full as full
from attnlab.masks.data import dense as dense
from attnlab.masks.data import documents as documents
from attnlab.masks.data import lengths as lengths
from attnlab.masks.data import predicate as predicate
from attnlab.masks.layouts import blocks as blocks
from attnlab.masks.layouts import random_blocks as random_blocks
from attnlab.masks.patterns import anchor as anchor
from attnlab.masks.patterns import big_bird as big_bird
from attnlab.masks.patterns import longformer as longformer
from attnlab.masks.patterns import streaming as streaming
from attnlab.masks.per_head import per_head as per_head
from attnlab.masks.structural import causal as causal
from attnlab.masks.structural import chunked as chunked
from attnlab.masks.structural import dilated_window as dilated_window
from attnlab.masks.structural import prefix as prefix
from attnlab.masks.structural import sliding_window as sliding_window

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
    "sliding_window",
    "streaming",
]
