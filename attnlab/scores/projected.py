"""A score whose keys were projected before: for caches, and for many queries."""

from typing import Any

from attnlab.types import Array, PyTree, Score, pytree


@pytree
class ProjectedKeys(Score):
    """The same score, for keys that ``score.project_key`` has seen already."""

    score: Score

    def project_query(self, query: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return self.score.project_query(query)

    def without_scale(self, head_size: int) -> tuple[Score, float | Array]:
        """See :class:`attnlab.Score`."""
        score, scale = self.score.without_scale(head_size)
        return ProjectedKeys(score), scale

    def pair_params(self) -> PyTree:
        """See :class:`attnlab.Score`."""
        return self.score.pair_params()

    def compare(self, params: PyTree, query: Array, key: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return self.score.compare(params, query, key)

    @property
    def is_inner_product(self) -> bool:
        """See :class:`attnlab.Score`."""
        return self.score.is_inner_product

    @property
    def floats_per_pair(self) -> int | None:
        """See :class:`attnlab.Score`."""
        return self.score.floats_per_pair

    def flops_per_pair(self, projected_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return self.score.flops_per_pair(projected_size)

    def transcendentals_per_pair(self, projected_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return self.score.transcendentals_per_pair(projected_size)

    def flops_per_query(self, head_size: int) -> int:
        """See :class:`attnlab.Score`."""
        return self.score.flops_per_query(head_size)


def bare(score: Score) -> Any:
    """Without the mark that its keys are projected already."""
    return score.score if isinstance(score, ProjectedKeys) else score


def projected_keys(score: Score) -> Score:
    """The score for keys that were projected before.

    Args:
        score: any score.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from attnlab import attention, scores
        >>> score = scores.additive.init(jax.random.key(0), 4, hidden_size=8)
        >>> query, key = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 5, 1, 4))
        >>> projected = score.project_key(key)  # once, for every query to come
        >>> attention(query, projected, key, score=projected_keys(score)).shape
        (1, 2, 1, 4)
    """
    return ProjectedKeys(score)
