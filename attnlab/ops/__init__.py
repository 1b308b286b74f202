"""The one verb, its validation and dispatch, and what it will cost."""

from attnlab.ops.attention import attend as attend
from attnlab.ops.attention import attention as attention
from attnlab.ops.attention import attention_with_stats as attention_with_stats
from attnlab.ops.cost import Cost as Cost
from attnlab.ops.cost import cost as cost
from attnlab.ops.drop_in import dot_product_attention as dot_product_attention
from attnlab.ops.explain import Explanation as Explanation
from attnlab.ops.explain import explain as explain
from attnlab.ops.hidden import zero_hidden as zero_hidden
from attnlab.ops.prepare import project_key as project_key
