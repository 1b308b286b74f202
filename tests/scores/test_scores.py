"""Each score against its formula, written out over all pairs at once."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attnlab import attention_with_stats, scores
from attnlab._src.scores.pairwise import tanh_sum
from attnlab._src.types import pytree
from tests.grid import Distance

B, T, S, N, K, H, Q, P, M = 2, 5, 7, 6, 3, 4, 9, 11, 8


def inputs(query_size=H):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, T, N, query_size)).astype("f")
    k = rng.normal(size=(B, S, K, H)).astype("f")
    return q, k


def logits_of(score, q, k):
    """The logits, computed back as log weights + log-sum-exp."""
    v = np.ones((B, S, K, 1), np.float32)
    result = attention_with_stats(q, k, v, score=score, top_k="all")
    lse = np.asarray(result.lse).swapaxes(1, 2)[..., None]
    return np.log(np.asarray(result.weights, np.float64)) + lse


def perturbed(score):
    """Adds noise to all parameters, so that biases are not zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype("f") * 0.1, score)


def heads(x):
    return np.repeat(x, N // K, 2)


def pairs(q, k):
    """Query and key broadcast against each other: ``[B, N, T or 1, S or 1, X]``."""
    return q.swapaxes(1, 2)[:, :, :, None], k.swapaxes(1, 2)[:, :, None]


def test_dot_and_scaled_dot():
    q, k = inputs()
    product = np.einsum("btnh,bsnh->bnts", q, heads(k))
    np.testing.assert_allclose(logits_of(scores.dot(), q, k), product, atol=1e-5)
    found = logits_of(scores.scaled_dot(), q, k)
    np.testing.assert_allclose(found, product / math.sqrt(H), atol=1e-5)
    found = logits_of(scores.scaled_dot(0.7), q, k)
    np.testing.assert_allclose(found, product * 0.7, atol=1e-5)
    scale = np.linspace(0.1, 1, N, dtype=np.float32)
    found = logits_of(scores.scaled_dot(scale), q, k)
    np.testing.assert_allclose(found, product * scale[:, None, None], atol=1e-5)


@pytest.mark.parametrize("num_heads", [1, N])
def test_bilinear(num_heads):
    q, k = inputs(Q)
    score = scores.bilinear.init(jax.random.key(0), Q, H, num_heads=num_heads)
    weight = np.broadcast_to(score.weight, (N, Q, H))
    wanted = np.einsum("btnq,nqh,bsnh->bnts", q, weight, heads(k))
    np.testing.assert_allclose(logits_of(score, q, k), wanted, atol=1e-5)


def test_cosine():
    q, k = inputs()
    temperature = np.linspace(1, 5, N, dtype=np.float32)
    wide = heads(k)
    norms = np.linalg.norm(q, axis=-1)[:, :, None], np.linalg.norm(wide, axis=-1)
    cosine = np.einsum("btnh,bsnh->bnts", q, wide)
    cosine /= np.linalg.norm(q, axis=-1).swapaxes(1, 2)[..., None]
    cosine /= np.linalg.norm(wide, axis=-1).swapaxes(1, 2)[:, :, None]
    assert norms[0].min() > 0
    wanted = cosine * temperature[:, None, None]
    found = logits_of(scores.cosine(temperature), q, k)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Inputs of any size; a zero vector has cosine 0, with a finite gradient.
    found = logits_of(scores.cosine(temperature), q * 1000, k / 1000)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    gradient = jax.grad(lambda q: scores.cosine(2.0).project_query(q).sum())(q * 0)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(scores.cosine(2.0).project_query(q * 0), 0)


@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(1, 1), (N, K), (N, 1)])
def test_additive_and_concat(num_heads, num_key_heads):
    q, k = inputs(Q)
    options = dict(hidden_size=P, num_heads=num_heads, num_key_heads=num_key_heads)
    for kind in (scores.additive, scores.concat):
        score = perturbed(kind.init(jax.random.key(0), Q, H, **options))
        assert type(score) is kind
        w_q = np.broadcast_to(score.query_weight, (N, Q, P))
        w_k = heads(np.broadcast_to(score.key_weight, (K, H, P))[None, None])[0, 0]
        one = np.einsum("btnq,nqp->btnp", q, w_q)
        if kind is scores.additive:
            one = one + np.asarray(score.bias)
        other = np.einsum("bsnh,nhp->bsnp", heads(k), w_k)
        q_p, k_p = pairs(one, other)
        weight = np.broadcast_to(score.weight, (N, P))[:, None, None]
        wanted = (weight * np.tanh(q_p + k_p)).sum(-1)
        np.testing.assert_allclose(logits_of(score, q, k), wanted, atol=2e-5)
    assert score.bias is None


@pytest.mark.parametrize("sizes", [(P,), (P, M), (P, M, 3)])
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_mlp(sizes, activation):
    q, k = inputs(Q)
    score = scores.mlp.init(
        jax.random.key(0),
        Q,
        H,
        hidden_sizes=sizes,
        num_heads=N,
        num_key_heads=K,
        activation=activation,
    )
    score = perturbed(score)
    act = (lambda x: np.maximum(x, 0)) if activation is jax.nn.relu else np.tanh
    one = np.einsum("btnq,nqp->btnp", q, score.query_weight) + np.asarray(score.bias)
    w_k = np.repeat(score.key_weight, N // K, 0)
    other = np.einsum("bsnh,nhp->bsnp", heads(k), w_k)
    q_p, k_p = pairs(one, other)
    x = act(q_p + k_p)
    for matrix, bias in score.hidden:
        x = np.einsum("bntsp,npm->bntsm", x, matrix)
        x = act(x + np.asarray(bias)[:, None, None])
    wanted = (x * np.asarray(score.weight)[:, None, None]).sum(-1)
    np.testing.assert_allclose(logits_of(score, q, k), wanted, atol=5e-5)


def test_a_users_own_score():
    q, k = inputs()
    weight = np.linspace(0.5, 1, N, dtype=np.float32)
    q_p, k_p = pairs(q, heads(k))
    wanted = -np.sqrt((q_p - k_p) ** 2 + 0.5).sum(-1) * weight[:, None, None]
    np.testing.assert_allclose(logits_of(Distance(weight), q, k), wanted, atol=1e-5)


@pytree
class Negative(scores.scaled_dot):
    def project_query(self, query):
        return -super().project_query(query)


@pytest.mark.parametrize("wrap", [lambda score: score, scores.projected_keys])
def test_a_subclass_keeps_what_it_adds(wrap):
    q, k = inputs()
    found = logits_of(wrap(Negative()), q, k)
    np.testing.assert_allclose(found, -logits_of(scores.scaled_dot(), q, k), atol=1e-5)


def test_shapes_of_parameters():
    rng = jax.random.key(0)
    assert jax.tree.leaves(scores.dot.init(rng)) == []
    assert jax.tree.leaves(scores.scaled_dot.init(rng)) == []
    assert scores.bilinear.init(rng, Q).weight.shape == (1, Q, Q)
    assert scores.bilinear.init(rng, Q, H, num_heads=N).weight.shape == (N, Q, H)
    assert scores.cosine.init(rng, num_heads=N).temperature.shape == (N,)
    made = scores.additive.init(
        rng, Q, H, hidden_size=P, num_heads=N, num_key_heads=K, dtype=jnp.bfloat16
    )
    assert made.query_weight.shape == (N, Q, P)
    assert made.key_weight.shape == (K, H, P)
    assert made.bias.shape == made.weight.shape == (N, P)
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}
    made = scores.mlp.init(rng, Q, H, hidden_sizes=(P, M), num_heads=N)
    assert [x.shape for x in made.hidden[0]] == [(N, P, M), (N, M)]
    assert made.weight.shape == (N, M)
    assert made.key_weight.shape == (N, H, P)
    with pytest.raises(ValueError, match="hidden_sizes: expected at least one"):
        scores.mlp.init(rng, Q, hidden_sizes=())


def test_variances_of_parameters():
    rng = jax.random.key(0)
    size = 64
    made = scores.additive.init(rng, size, hidden_size=256, num_heads=8)
    mlp = scores.mlp.init(rng, size, hidden_sizes=(128, 256), num_heads=8)
    for array, variance in (
        (scores.bilinear.init(rng, size, 128, num_heads=4).weight, 1 / (size * 128)),
        (made.query_weight, 1 / size),
        (made.key_weight, 1 / size),
        (made.weight, 1 / 256),
        (mlp.hidden[0][0], 2 / 128),
    ):
        deviation = math.sqrt(2 / array.size)
        assert float(array.var()) == pytest.approx(variance, rel=5 * deviation)
    assert not made.bias.any()


def test_first_layer_of_an_mlp_is_he_normal():
    mlp = scores.mlp.init(jax.random.key(0), 64, hidden_sizes=(128,), num_heads=8)
    for array in (mlp.query_weight, mlp.key_weight):
        # The layer sees query and key together: its fan-in is 64 + 64.
        wanted = 2 / (64 + 64)
        assert float(array.var()) == pytest.approx(
            wanted, rel=5 * math.sqrt(2 / array.size)
        )


def test_initial_logits_have_variance_one():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 64, 4, 32)).astype("f") for _ in range(2))
    score = scores.bilinear.init(jax.random.key(0), 32, num_heads=4)
    logits = np.einsum("btnh,bsnh->bnts", score.project_query(q), k)
    assert logits.var() == pytest.approx(1, abs=0.2)


def test_costs():
    rng = jax.random.key(0)
    assert scores.cost(scores.dot(), 64) == (0, 64, 128, 0, 0, 0)
    assert scores.cost(scores.scaled_dot(), 64) == (0, 64, 128, 0, 64, 0)
    bilinear = scores.bilinear.init(rng, Q, H, num_heads=N)
    assert scores.cost(bilinear, Q, N) == (N * Q * H, H, 2 * H, 0, 2 * Q * H, 0)
    additive = scores.additive.init(rng, H, hidden_size=P)
    cost = scores.cost(additive, H)
    assert cost == (2 * H * P + 2 * P, P, 3 * P, P, 2 * H * P, 2 * H * P)
    mlp = scores.mlp.init(rng, Q, H, hidden_sizes=(P, M), activation=jnp.tanh)
    cost = scores.cost(mlp, Q)
    assert cost.parameters == (Q + H + 1) * P + (P + 1) * M + M
    assert cost.flops_per_pair == 2 * P + (2 * P * M + 2 * M) + 2 * M
    assert cost.transcendentals_per_pair == P + M
    relu = scores.mlp.init(rng, Q, H, hidden_sizes=(P, M))
    assert scores.cost(relu, Q).transcendentals_per_pair == 0
    # The cost is printed.
    assert f"{cost.flops_per_pair:,} FLOPs and {P + M} transc" in str(cost)


def test_tanh_sum():
    rng = np.random.default_rng(0)
    weight, q, k = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((P,), (T, P), (S, P))
    )
    wanted = np.tanh(q[:, None] + k[None]) @ weight
    np.testing.assert_allclose(tanh_sum(weight, q, k), wanted, atol=1e-5)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (weight, q, k)]
        check_grads(jax.jit(tanh_sum), wide, order=1, modes=["rev"])

        def naive(weight, q, k):
            return jnp.tanh(q[:, None] + k[None]) @ weight

        cotangent = rng.normal(size=(T, S))
        found, wanted = (jax.vjp(f, *wide)[1](cotangent) for f in (tanh_sum, naive))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_tanh_sum_keeps_the_types_of_its_arguments():
    q = jnp.ones((T, P), jnp.bfloat16)
    k, weight = jnp.ones((S, P), jnp.bfloat16), jnp.ones(P, jnp.float32)
    out, pull = jax.vjp(tanh_sum, weight, q, k)
    assert out.dtype == jnp.float32
    assert [x.dtype for x in pull(out)] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
