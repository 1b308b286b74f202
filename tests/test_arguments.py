"""Checks of arguments that many functions share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, dot_product_attention, explain, masks, nn
from attnlab._src.arguments import integers

#: The least and the greatest int32.
LEAST, MOST = -(2**31), 2**31 - 1
X = jnp.ones((1, 4, 2, 8))
CELL = nn.Recurrent(nn.GRU(2, 2, rngs=nnx.Rngs(0)))

#: Calls that take integers, and the argument that their error must name.
ENTRANCES = {
    "documents": (
        "query_ids",
        lambda n: masks.documents(np.array([0, n, 2, 1])),
    ),
    "documents of keys": (
        "key_ids",
        lambda n: masks.documents(np.zeros(4, int), [n, 0, 0, 0]),
    ),
    "lengths": ("key", lambda n: masks.lengths(key=np.array([n]))),
    "lengths of queries": ("query", lambda n: masks.lengths(query=[n])),
    "anchors": ("positions", lambda n: masks.anchor(np.array([n]))),
    "structural anchors": ("positions", lambda n: masks.anchor([n])),
    "blocks": ("indices", lambda n: masks.blocks(np.array([[n]]), 4)),
    "positions": (
        "query_positions",
        lambda n: attention(X, X, X, query_positions=np.array([0, 1, 2, n])),
    ),
    "positions of keys": (
        "key_positions",
        lambda n: explain(X, X, X, key_positions=np.array([0, 1, 2, n])),
    ),
    "an offset": ("query_offset", lambda n: attention(X, X, X, query_offset=n)),
    "offsets": (
        "query_offset",
        lambda n: attention(X, X, X, query_offset=np.array([n])),
    ),
    "lengths of a drop-in": (
        "key_value_seq_lengths",
        lambda n: dot_product_attention(X, X, X, key_value_seq_lengths=np.array([n])),
    ),
    "lengths of a recurrent layer": (
        "lengths",
        lambda n: CELL(jnp.ones((1, 3, 2)), lengths=np.array([n])),
    ),
    "documents of a recurrent layer": (
        "documents",
        lambda n: CELL(jnp.ones((1, 3, 2)), documents=np.array([[0, n, n]])),
    ),
    "positions of a module": (
        "positions",
        lambda n: nn.Rotary()(X, np.array([0, 1, 2, n])),
    ),
    "positions of sinusoids": (
        "positions",
        lambda n: nn.sinusoids(np.array([0, 1, 2, n]), 4),
    ),
    "tokens": (
        "tokens",
        lambda n: nn.Embedding(4, 2, rngs=nnx.Rngs(0))(np.array([n])),
    ),
}


@pytest.mark.parametrize("number", [2**31, 2**32, 2**70])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_integers_beyond_32_bits_are_refused_by_name(entrance, number):
    name, run = ENTRANCES[entrance]
    with pytest.raises(ValueError, match=rf"{name}: expected .* got {number}"):
        run(number)


def test_integers_within_32_bits_are_kept():
    for dtype in (np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, object):
        found = integers("x", np.array([0, 100], dtype))
        assert found.dtype == np.int32
        assert found.tolist() == [0, 100]
    assert integers("x", [LEAST, MOST]).tolist() == [LEAST, MOST]


def test_what_is_no_integer_is_refused():
    for x in (1.5, True, [1.0], "one", None, np.array([1, "one"], object)):
        with pytest.raises(TypeError, match="x: expected integers, got"):
            integers("x", x)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64])
def test_traced_ids_of_documents_that_differ_stay_different(dtype):
    """No check is possible there: ids are compared whole."""
    far = 2**32 if np.iinfo(dtype).bits > 32 else 2**31
    ids = np.array([0, far, far, far + 1, 1, 0], dtype)
    if np.iinfo(dtype).min < 0:
        ids[4] = -(2**40)  # padding
    with jax.enable_x64(True):
        seen = jax.jit(lambda ids: masks.documents(ids).to_dense(6))(ids)
    wanted = (ids[:, None] == ids) & (ids >= 0)
    np.testing.assert_array_equal(seen[0, 0], wanted)


def test_traced_ids_of_queries_and_of_keys_are_compared_whole():
    with jax.enable_x64(True):
        both = np.array([2**32, 2**33, -1]), np.array([0, 2**33, 2**32, -1])
        run = jax.jit(lambda *ids: masks.documents(*ids).to_dense(3, 4))
        seen = run(*both)
    np.testing.assert_array_equal(
        seen[0, 0].astype(int), [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    )


def test_traced_positions_stop_at_the_ends_of_32_bits():
    def weights(positions):
        return attention(X, X, X, query_positions=positions, mask=masks.causal())

    with jax.enable_x64(True):
        run = jax.jit(weights)
        far = run(np.array([0, 1, 2**32, 2**40]))
        np.testing.assert_array_equal(far, run(np.array([0, 1, MOST, MOST])))


@pytest.mark.parametrize("kind", [int, np.int64, lambda n: np.array([n])])
def test_an_offset_leaves_room_for_the_queries(kind):
    def refused(offset, message):
        with pytest.raises(ValueError, match=message):
            explain(X, X, X, query_offset=kind(offset))

    message = "query_offset: expected positions of at least 0, got -1; for slots that"
    refused(-1, message)
    refused(MOST - 2, rf"query_offset: expected at most {MOST - 3} for 4 queries, got")
    explain(X, X, X, query_offset=kind(MOST - 3))
