"""Classes that are pytrees: data, structure, equality and hashes."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks, modifiers, nn, scores
from attnlab._src.types import Score, pytree, skeleton, static


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
    """Otherwise a compiled call of one would be reused for the other."""
    assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.structure([one]) != jax.tree.structure([other])


def test_many_scores_of_equal_fields():
    """Compiled programs are found by hash, so only many classes show wrong equality."""
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


def pickled(x):
    return pickle.loads(pickle.dumps(x))


RNG = jax.random.key(0)
SOME = [
    scores.scaled_dot(jnp.ones(2)),
    scores.bilinear.init(RNG, 3),
    scores.cosine(),
    scores.additive.init(RNG, 3, hidden_size=2),
    scores.concat.init(RNG, 3, hidden_size=2),
    *(
        scores.mlp.init(RNG, 3, hidden_sizes=(2, 2), activation=f)
        for f in (jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.silu, jax.nn.gelu)
    ),
    scores.projected_keys(scores.mlp.init(RNG, 3, hidden_sizes=(2,))),
    modifiers.bias(np.ones((2, 2), "f")),
    modifiers.soft_cap(2.0),
    modifiers.alibi(2),
    modifiers.relative_bias(np.ones((1, 32), "f")),
    ~masks.causal() | masks.documents(np.arange(3)) & masks.predicate(jnp.greater),
    masks.per_head([masks.random_blocks(RNG, 1, 2, 4), masks.lengths(key=3)]),
]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled])
def test_copies_are_the_same(way):
    """Also their functions: implementations recognise an activation by identity."""
    for one in SOME:
        other = way(one)
        assert jax.tree.structure(other) == jax.tree.structure(one)
        assert skeleton(other) == skeleton(one)
        jax.tree.map(np.testing.assert_array_equal, other, one)
    mlp = scores.mlp.init(RNG, 4, hidden_sizes=(2,))
    layer = nn.MultiHeadAttention(4, 1, score=mlp, rngs=nnx.Rngs(0))
    assert way(layer).score.activation is jax.nn.relu


def test_functions_are_pickled_by_name():
    leaky = functools.partial(jax.nn.leaky_relu, negative_slope=0.3)
    again = pickled(scores.mlp.init(RNG, 4, hidden_sizes=(2,), activation=leaky))
    assert again.activation.func is jax.nn.leaky_relu
    assert again.activation.keywords == {"negative_slope": 0.3}
    # By their public names, which do not depend on the version of JAX.
    mlp = scores.mlp.init(RNG, 4, hidden_sizes=(2,))
    assert b"jax._src.nn" not in pickle.dumps(mlp)
    nameless = jax.jit(lambda x: x)
    with pytest.raises(pickle.PicklingError, match="<lambda> is not that function"):
        pickle.dumps(scores.mlp.init(RNG, 4, hidden_sizes=(2,), activation=nameless))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled])
def test_models_can_be_copied(way):
    decoder = nn.Decoder.standard(
        5, features=4, num_heads=1, num_layers=1, rngs=nnx.Rngs(0)
    )
    x = jnp.array([[-1.0, 2.0, 0.5, -3.0]])
    layers = [m.stack.each()[0].feed_forward for m in (decoder, way(decoder))]
    np.testing.assert_array_equal(*(layer(x) for layer in layers))


@pytree
class AroundADictionary(Score):
    held: dict


def test_equality_and_hashes_go_by_the_arrays_held():
    """Arrays are compared by identity, as their values may be on a device or traced."""
    table = jnp.ones((2, 2))
    for one in (*SOME, masks.dense(table > 0), AroundADictionary({"a": table, "b": 1})):
        leaves, structure = jax.tree.flatten(one)
        same, copied = jax.tree.unflatten(structure, leaves), copy.deepcopy(one)
        assert one == same
        assert hash(one) == hash(same)
        held = any(isinstance(x, (np.ndarray, jax.Array)) for x in leaves)
        assert (one != copied) == held
        assert [copied, same].index(one) == held
        assert {one: 1, copied: 2}[same] == (1 if held else 2)
    assert masks.dense(table > 0) != masks.full()
    assert Plus(1.0) == Plus(1.0) != Minus(1.0)
    traced = jax.jit(lambda x: masks.dense(x) in {masks.dense(x)})
    assert traced(table > 0)


def test_a_class_may_define_its_own_equality():
    @pytree
    class Same(Score):
        shift: float

        def __eq__(self, other):
            return isinstance(other, Same)

        def __hash__(self):
            return 3

    assert Same(1.0) == Same(2.0)
    assert hash(Same(1.0)) == 3
