"""What you need to write your own score, mask, modifier or implementation."""

from attnlab._src.checks.check import check as check
from attnlab._src.checks.report import Finding as Finding
from attnlab._src.checks.report import LawBroken as LawBroken
from attnlab._src.checks.report import Report as Report
from attnlab._src.masks.base import Mask as Mask
from attnlab._src.masks.geometry import Blocks as Blocks
from attnlab._src.masks.planning import plan_of as plan_of
from attnlab._src.masks.planning import visible as visible
from attnlab._src.masks.rule import Bounds as Bounds
from attnlab._src.ops.registration import register as register
from attnlab._src.ops.registration import unregister as unregister
from attnlab._src.pytrees import pytree as pytree
from attnlab._src.pytrees import static as static
from attnlab._src.types import AttentionInputs as AttentionInputs
from attnlab._src.types import Implementation as Implementation
from attnlab._src.types import Intervals as Intervals
from attnlab._src.types import Live as Live
from attnlab._src.types import Modifier as Modifier
from attnlab._src.types import Operand as Operand
from attnlab._src.types import Plan as Plan
from attnlab._src.types import Score as Score
from attnlab._src.types import Sizes as Sizes
from attnlab._src.types import Tile as Tile

__all__ = [
    "AttentionInputs",
    "Blocks",
    "Bounds",
    "Finding",
    "Implementation",
    "Intervals",
    "LawBroken",
    "Live",
    "Mask",
    "Modifier",
    "Operand",
    "Plan",
    "Report",
    "Score",
    "Sizes",
    "Tile",
    "check",
    "plan_of",
    "pytree",
    "register",
    "static",
    "unregister",
    "visible",
]
