"""Scores of keys that are projected already: for caches, and for repeated calls."""

from typing import Any

from attnlab._src.exact import exactly, inherits
from attnlab._src.scores.pairwise import Additive, Mlp
from attnlab._src.types import Array, PyTree, Score, pytree


@pytree
class ProjectedKeys(Score):
    """A score of keys that its ``project_key`` has projected already."""

    score: Score

    def project_query(self, query: Array) -> Array:
        """See :class:`attnlab.Score`."""
        return self.score.project_query(query)

    def without_scale(self, head_size: int) -> tuple[Score, float | Array]:
        """See :class:`attnlab.Score`."""
        if not exactly(self, ProjectedKeys):
            return self, 1.0
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
        own = inherits(self, ProjectedKeys, "compare")
        return own and self.score.is_inner_product

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


def check_score(score: object) -> None:
    """Raises a TypeError if it is no score."""
    if not isinstance(score, Score):
        hint = "; that is a class: call it, or its init, to make a score"
        raise TypeError(
            f"score: expected an attnlab score, got {score!r}"
            f"{hint if isinstance(score, type) else ''}"
        )


def unwrapped(score: Score) -> Any:
    """The score within a ``ProjectedKeys``; any other score as it is."""
    return score.score if exactly(score, ProjectedKeys) else score


def comparison_class(score: Score) -> type[Score] | None:
    """The class whose comparison the score has, for kernels with one of their own.

    Returns:
        ``Score`` for inner products, ``Additive`` or ``Mlp``; None for any other
        comparison, such as that of a subclass.
    """
    score = unwrapped(score)
    if score.is_inner_product:
        return Score
    for kind in (Additive, Mlp):
        if inherits(score, kind, "compare", "pair_params"):
            return kind
    return None


def projected_keys(score: Score) -> Score:
    """The score for keys that ``score.project_key`` has projected already.

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
    check_score(score)
    return ProjectedKeys(score)
