"""Classes that are pytrees: what is data, what is structure, and who is who."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, modifiers, scores
from attnlab.types import Score, pytree, skeleton, static


@pytree
class Plus(Score):
    shift: float
    size: int = static(default=2)

    def compare(self, params, query, key):
        return query @ key.T + self.size


@pytree
class Minus(Score):
    shift: float
    size: int = static(default=2)

    def compare(self, params, query, key):
        return -(query @ key.T) - self.size


def test_data_and_structure():
    leaves, structure = jax.tree.flatten(Plus(1.0, 3))
    assert leaves == [1.0]
    assert jax.tree.unflatten(structure, [4.0]) == Plus(4.0, 3)
    assert structure != jax.tree.structure(Plus(1.0, 4))
    assert skeleton(Plus(1.0, 3)) == Plus(None, 3)
    ((path, _),) = jax.tree.leaves_with_path(Plus(1.0))
    assert jax.tree_util.keystr(path) == ".shift"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Plus(1.0), Minus(1.0)),
        (scores.scaled_dot(jnp.ones(2)), scores.cosine(jnp.ones(2))),
        (modifiers.soft_cap(jnp.ones((2, 2))), modifiers.bias(jnp.ones((2, 2)))),
    ],
)
def test_classes_of_equal_fields_have_different_structures(one, other):
    """Or a compiled call of the one is taken for a call of the other."""
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.structure([one]) != jax.tree.structure([other])


def test_many_scores_of_equal_fields():
    """Programs are found by hashes, so that only many show a wrong equality."""
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 4))

    def made(i):
        class Own(Score):
            scale: float

            def project_query(self, query):
                return query * self.scale * (i + 1)

        return pytree(Own)(jnp.float32(0.1))

    for i in range(40):
        found = attention(x, x, x, score=made(i))
        wanted = attention(x, x, x, score=scores.scaled_dot(0.1 * (i + 1)))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
