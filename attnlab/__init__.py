"""Attention with any score, any mask, on any backend."""

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
