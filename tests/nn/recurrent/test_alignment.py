"""The attention of recurrent decoders: all steps in one call, or step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, nn, scores
from tests.grid import few
from tests.nn.recurrent import reference
from tests.nn.recurrent.test_layers import drawn

B, T, S, Q, E, P = 3, 3, 5, 11, 13, 17
LENGTHS = np.array([3, S, 0])
POSITIONS = np.where(np.arange(S) < LENGTHS[:, None], np.arange(S), -1)


def rng():
    return jax.random.key(5)


ALIGNMENTS = {
    "dot": lambda: nn.Alignment.projected(
        Q, E, P, score=scores.dot(), rngs=nnx.Rngs(0)
    ),
    "scaled_dot": lambda: nn.Alignment.projected(Q, E, P, rngs=nnx.Rngs(0)),
    "bilinear": lambda: nn.Alignment(scores.bilinear.init(rng(), Q, E)),
    "additive": lambda: nn.Alignment(scores.additive.init(rng(), Q, E, hidden_size=P)),
    "concat": lambda: nn.Alignment(scores.concat.init(rng(), Q, E, hidden_size=P)),
    "mlp": lambda: nn.Alignment(scores.mlp.init(rng(), Q, E, hidden_sizes=(P, 3))),
    "local_m": lambda: nn.Alignment(
        scores.bilinear.init(rng(), Q, E), mask=masks.sliding_window(1, 1)
    ),
    "local_p": lambda: nn.PredictiveAlignment(
        scores.bilinear.init(rng(), Q, E), features=Q, half_width=2, rngs=nnx.Rngs(0)
    ),
    "local_p additive": lambda: nn.PredictiveAlignment(
        scores.additive.init(rng(), Q, E, hidden_size=P),
        features=Q,
        half_width=1,
        hidden_size=3,
        rngs=nnx.Rngs(1),
    ),
}
EACH = pytest.mark.parametrize("name", ALIGNMENTS)


def window(name):
    return 1 if name == "local_m" else None


def data():
    rng = np.random.default_rng(0)
    query, states = (rng.normal(size=shape) for shape in ((B, T, Q), (B, S, E)))
    return jnp.asarray(2 * query, jnp.float32), jnp.asarray(states, jnp.float32)


def wanted(name, alignment, query, states, xp):
    """Contexts and weights of all examples, by the reference."""
    contexts, rows = [], []
    for b, n in enumerate(LENGTHS):
        found = [
            reference.align(alignment, q, states[b, :n], t, window(name), xp)
            for t, q in enumerate(query[b])
        ]
        contexts.append(xp.stack([c for c, _ in found]))
        row = xp.stack([w for _, w in found])
        rows.append(xp.concatenate([row, xp.zeros((T, S - n))], 1))
    return xp.stack(contexts), xp.stack(rows)


@pytest.mark.parametrize(
    "name", few(ALIGNMENTS, "dot", "additive", "mlp", "local_m", "local_p additive")
)
def test_contexts_and_weights(name):
    alignment = drawn(ALIGNMENTS[name])
    query, states = data()
    where = dict(query_positions=np.tile(np.arange(T), (B, 1)), key_positions=POSITIONS)

    @jax.jit
    def run(alignment, query, states):
        context = alignment.attend(query, alignment.project(states), **where)
        return context, alignment.with_stats(query, states, top_k="all", **where)

    context, found = run(alignment, query, states)
    expected, rows = wanted(
        name,
        reference.in_float64(alignment),
        np.asarray(query, float),
        np.asarray(states, float),
        np,
    )
    np.testing.assert_allclose(context, expected, atol=1e-5)
    np.testing.assert_allclose(found.output, expected, atol=1e-5)
    np.testing.assert_allclose(found.weights[:, 0], rows, atol=1e-6)
    assert (rows[0, :, 3:] == 0).all()
    assert (context[2] == 0).all()  # a sentence without words


@pytest.mark.parametrize("name", few(ALIGNMENTS, "local_p additive"))
def test_gradients(name):
    """Gradients of queries, states and parameters, also through predicted positions."""
    alignment = drawn(ALIGNMENTS[name])
    query, states = data()
    where = dict(query_positions=np.tile(np.arange(T), (B, 1)), key_positions=POSITIONS)
    above = np.random.default_rng(2).normal(size=(B, T, E)).astype(np.float32)

    def mine(alignment, query, states):
        context = alignment.attend(query, alignment.project(states), **where)
        return (context * above).sum()

    def plain(alignment, query, states):
        contexts, _ = wanted(name, alignment, query, states, jnp)
        return (contexts * above).sum()

    arguments = alignment, query, states
    found, expected = (
        jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments) for loss in (mine, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    if isinstance(alignment, nn.PredictiveAlignment):
        assert float(jnp.abs(found[0].place.kernel[...]).max()) > 1e-3


def test_center_is_within_the_sentence():
    alignment = ALIGNMENTS["local_p"]()
    query, _ = data()
    center = alignment.center(100 * query, LENGTHS)
    assert (center >= 0).all()
    assert (np.asarray(center) <= np.asarray(LENGTHS)[:, None]).all()
    with pytest.raises(ValueError, match="half_width: expected at least 1, got 0"):
        nn.PredictiveAlignment(features=Q, half_width=0, rngs=nnx.Rngs(0))


def test_a_mask_of_a_call_joins_the_own():
    alignment = ALIGNMENTS["local_m"]()
    query, states = data()
    found = alignment.with_stats(query, states, mask=masks.causal(), top_k="all")
    seen = masks.causal() & masks.sliding_window(1, 1)
    assert found.weights is not None
    np.testing.assert_array_equal(found.weights[0, 0] > 0, seen.to_dense(T, S))


def test_numbers_of_a_score_are_not_learned():
    states, query = jnp.ones((2, 7, 5)), jnp.ones((2, 3, 5))
    for score in (scores.cosine(), scores.scaled_dot(scale=0.3)):
        alignment = nn.Alignment(score)
        assert not jax.tree.leaves(nnx.state(alignment, nnx.Param))
        assert alignment.attend(query, alignment.project(states)).shape == (2, 3, 5)


def test_windows_hide_without_infinities():
    """No infinities for ``jax.debug_infs``, even for queries without visible keys."""
    alignment = ALIGNMENTS["local_p"]()
    memory = alignment.project(jnp.ones((B, S, E)))

    def total(query):
        mask = masks.lengths(key=LENGTHS)
        return alignment.attend(query, memory, mask=mask).sum()

    with jax.debug_infs(True):
        gradient = jax.grad(total)(jnp.ones((B, T, Q)))
    assert np.isfinite(gradient).all()
    assert (gradient[2] == 0).all()
