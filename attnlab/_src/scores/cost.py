"""What a score costs: parameters, and operations for each pair and each token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab._src import arguments
from attnlab._src.scores.projected import check_score
from attnlab._src.types import Score


class ScoreCost(NamedTuple):
    """The cost of a score, for one head.

    Attributes:
        parameters: how many numbers the score holds, all heads together.
        projected_size: P, the size of projected queries and keys.
        flops_per_pair: floating-point operations for each query-key pair.
        transcendentals_per_pair: evaluations of tanh, exp and their like for each pair.
        flops_per_query: operations to project one query token.
        flops_per_key: operations to project one key token.
    """

    parameters: int
    projected_size: int
    flops_per_pair: int
    transcendentals_per_pair: int
    flops_per_query: int
    flops_per_key: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters; {self.flops_per_pair:,} FLOPs and "
            f"{self.transcendentals_per_pair:,} transcendentals a pair, "
            f"{self.flops_per_query:,} a query, {self.flops_per_key:,} a key"
        )


def cost(score: Score, head_size: int, num_heads: int = 1) -> ScoreCost:
    """What a score costs for queries and keys of ``head_size``.

    Args:
        score: any score.
        head_size: H of the query.
        num_heads: N, the number of query heads.

    Example:
        >>> import jax
        >>> from attnlab import scores
        >>> print(scores.cost(scores.scaled_dot(), 64))
        0 parameters; 128 FLOPs and 0 transcendentals a pair, 64 a query, 0 a key
        >>> additive = scores.additive.init(jax.random.key(0), 64, hidden_size=64)
        >>> print(scores.cost(additive, 64))  # doctest: +NORMALIZE_WHITESPACE
        8,320 parameters; 192 FLOPs and 64 transcendentals a pair,
        8,192 a query, 8,192 a key
    """
    check_score(score)
    arguments.sizes(head_size=head_size, num_heads=num_heads)
    query = jax.ShapeDtypeStruct((1, 1, num_heads, head_size), jnp.float32)
    projected = jax.eval_shape(score.project_query, query).shape[-1]
    return ScoreCost(
        parameters=sum(x.size for x in jax.tree.leaves(score) if hasattr(x, "size")),
        projected_size=projected,
        flops_per_pair=score.flops_per_pair(projected),
        transcendentals_per_pair=score.transcendentals_per_pair(projected),
        flops_per_query=score.flops_per_query(head_size),
        flops_per_key=score.flops_per_key(head_size),
    )
