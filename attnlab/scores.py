"""Scores: similarities of a query and a key, as pure functions with parameters.

Each score is a class: call it with its parameters, or let its ``init`` draw them.
"""

from attnlab._src.scores.cost import ScoreCost as ScoreCost
from attnlab._src.scores.cost import cost as cost
from attnlab._src.scores.inner import Bilinear as bilinear
from attnlab._src.scores.inner import Cosine as cosine
from attnlab._src.scores.inner import Dot as dot
from attnlab._src.scores.inner import ScaledDot as scaled_dot
from attnlab._src.scores.pairwise import Additive as additive
from attnlab._src.scores.pairwise import Concat as concat
from attnlab._src.scores.pairwise import Mlp as mlp
from attnlab._src.scores.projected import projected_keys as projected_keys
from attnlab._src.types import Score as Score

__all__ = [
    "Score",
    "ScoreCost",
    "additive",
    "bilinear",
    "concat",
    "cosine",
    "cost",
    "dot",
    "mlp",
    "projected_keys",
    "scaled_dot",
]
