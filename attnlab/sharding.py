"""Attention on several devices."""

from attnlab._src.ops.across import attention as attention
from attnlab._src.ops.across import attention_with_stats as attention_with_stats
from attnlab._src.ops.across import cost as cost
from attnlab._src.ops.mesh_cost import MeshCost as MeshCost
from attnlab._src.ops.sequence.balance import balanced_order as balanced_order
from attnlab._src.ops.sequence.costs import StrategyCost as StrategyCost
from attnlab._src.placement import use as use

__all__ = [
    "MeshCost",
    "StrategyCost",
    "attention",
    "attention_with_stats",
    "balanced_order",
    "cost",
    "use",
]
