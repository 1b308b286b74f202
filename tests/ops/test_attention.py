"""``attention``: its forms, its edge cases, and its optional results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab import (
    attention,
    attention_with_stats,
    explain,
    masks,
    modifiers,
    scores,
)
from tests.grid import few

B, T, S, N, K, H, D = 2, 7, 11, 6, 3, 4, 5
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, T, N, H)).astype("f")
KEY = RNG.normal(size=(B, S, K, H)).astype("f")
VALUE = RNG.normal(size=(B, S, K, D)).astype("f")
BOTH = ("reference", "tiled")


def by_hand(q, k, v, visible=None):
    """Scaled dot attention of ``[B, T, N, H]``, in NumPy and float64."""
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, 2).astype(np.float64) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    weights = shifted / shifted.sum(-1, keepdims=True)
    lse = np.log(np.exp(logits).sum(-1)).swapaxes(1, 2)
    return np.einsum("bnts,bsnd->btnd", weights, v), lse, weights


def near(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("implementation", [*BOTH, None])
def test_against_numpy(implementation):
    visible = np.tri(T, S, dtype=bool)
    output, lse, weights = by_hand(QUERY, KEY, VALUE, visible)
    found = attention_with_stats(
        QUERY,
        KEY,
        VALUE,
        mask=masks.causal(),
        top_k="all",
        implementation=implementation,
    )
    near(found.output, output)
    near(found.lse, lse)
    near(found.weights, weights)
    assert found.indices is None
    output = attention(
        QUERY, KEY, VALUE, mask=masks.causal(), implementation=implementation
    )
    np.testing.assert_array_equal(output, found.output)


def test_a_key_that_one_head_of_a_group_sees_is_alive():
    mask = masks.per_head([masks.prefix(4), ~masks.prefix(4)] * K)
    visible = np.asarray(mask.to_dense(T, S))[0]
    found = attention(QUERY, KEY, VALUE, mask=mask, implementation="reference")
    near(found, by_hand(QUERY, KEY, VALUE, visible)[0])


def test_the_adapter_against_numpy():
    value = RNG.normal(size=(B, S, K, H)).astype("f")
    for visible in (np.tri(T, S, dtype=bool), None):
        found = attention(QUERY, KEY, value, mask=visible, implementation="jax_nn")
        near(found, by_hand(QUERY, KEY, value, visible)[0])


@pytest.mark.parametrize("implementation", BOTH)
def test_without_a_batch_axis(implementation):
    single = attention_with_stats(
        QUERY[1], KEY[1], VALUE[1], top_k=3, implementation=implementation
    )
    whole = attention_with_stats(
        QUERY, KEY, VALUE, top_k=3, implementation=implementation
    )
    assert single.output.shape == (T, N, D)
    for one, other in zip(single, whole, strict=True):
        assert one.shape == other.shape[1:]
        near(one, other[1])


@pytest.mark.parametrize("implementation", BOTH)
def test_several_batch_axes(implementation):
    lead = (2, 1, 3)
    q, k, v, bias = (
        RNG.normal(size=shape).astype("f")
        for shape in (
            (*lead, T, N, H),
            (*lead, S, K, H),
            (*lead, S, K, D),
            (*lead, N, T, S),
        )
    )
    ids = np.sort(RNG.integers(0, 3, (3, T))), np.sort(RNG.integers(0, 3, (3, S)))
    offset = RNG.integers(0, 5, lead)
    options = dict(implementation=implementation)
    found = attention_with_stats(
        q,
        k,
        v,
        mask=masks.documents(*ids) & masks.causal(),
        modifiers=[modifiers.bias(bias)],
        query_offset=offset,
        **options,
    )
    assert found.output.shape == (*lead, T, N, D)
    assert found.lse.shape == (*lead, T, N)
    for index in np.ndindex(*lead):
        one = attention_with_stats(
            q[index],
            k[index],
            v[index],
            mask=masks.documents(ids[0][index[2]], ids[1][index[2]]) & masks.causal(),
            modifiers=[modifiers.bias(bias[index])],
            query_offset=np.int32(offset[index]),
            **options,
        )
        near(found.output[index], one.output)
        near(found.lse[index], one.lse)


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize(("t", "s", "b"), [(T, 0, B), (0, S, B), (0, 0, B), (T, S, 0)])
def test_nothing_to_attend(t, s, b, implementation):
    q, k, v = QUERY[:b, :t], KEY[:b, :s], VALUE[:b, :s]

    def run(q, k, v, sinks):
        return attention_with_stats(
            q, k, v, sinks=sinks, mask=masks.causal(), implementation=implementation
        )[:2]

    output, lse = run(q, k, v, None)
    np.testing.assert_array_equal(output, np.zeros((b, t, N, D)))
    np.testing.assert_array_equal(lse, np.full((b, t, N), -np.inf))
    sinks = RNG.normal(size=N).astype("f")
    (output, lse), pull = jax.vjp(run, q, k, v, sinks)
    np.testing.assert_array_equal(output, np.zeros((b, t, N, D)))
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, (b, t, N)))
    *rest, d_sinks = pull((jnp.ones_like(output), jnp.ones_like(lse)))
    assert all(not x.any() for x in map(np.asarray, rest))
    np.testing.assert_array_equal(d_sinks, np.full(N, b * t, np.float32))


@pytest.mark.parametrize("implementation", BOTH)
def test_one_query_one_key(implementation):
    output = attention(
        QUERY[:, :1], KEY[:, :1], VALUE[:, :1], implementation=implementation
    )
    np.testing.assert_allclose(output, np.repeat(VALUE[:, :1], N // K, 2), rtol=1e-6)
    found = attention(QUERY[:, :1], KEY, VALUE, implementation=implementation)
    near(found, by_hand(QUERY[:, :1], KEY, VALUE)[0])


@pytest.mark.parametrize("implementation", BOTH)
def test_sinks(implementation):
    sinks = RNG.normal(size=N).astype("f")
    found = attention_with_stats(
        QUERY, KEY, VALUE, sinks=sinks, top_k="all", implementation=implementation
    )
    _, lse, weights = by_hand(QUERY, KEY, VALUE)
    total = np.logaddexp(lse, sinks)
    weights = weights * np.exp(lse - total).swapaxes(1, 2)[..., None]
    near(found.lse, total)
    near(found.weights, weights)
    wide = np.repeat(VALUE, N // K, 2)
    near(found.output, np.einsum("bnts,bsnd->btnd", weights, wide))
    shared = attention(QUERY, KEY, VALUE, sinks=sinks[:1])
    near(shared, attention(QUERY, KEY, VALUE, sinks=np.repeat(sinks[:1], N)))


@pytest.mark.parametrize(
    ("count", "dropout"),
    few([(n, p) for n in (1, 4, S) for p in (0.0, 0.4)], (4, 0.0)),
)
def test_greatest_weights(count, dropout, tile):
    tile(4, 3)
    mask = masks.sliding_window(2, 1) | masks.anchor(np.array([5]))
    options = dict(
        mask=mask,
        score=scores.cosine(np.float32(6)),
        modifiers=[modifiers.alibi(N)],
        sinks=RNG.normal(size=N).astype("f"),
        dropout_rate=dropout,
        dropout_rng=jax.random.key(0),
    )
    everything = attention_with_stats(QUERY, KEY, VALUE, top_k="all", **options)
    found = attention_with_stats(QUERY, KEY, VALUE, top_k=count, **options)
    plain = attention_with_stats(QUERY, KEY, VALUE, **options)
    assert plain.weights is None
    assert plain.indices is None
    for other in (everything, found):
        np.testing.assert_allclose(other.output, plain.output, rtol=2e-6)
        np.testing.assert_array_equal(other.lse, plain.lse)
    dense = np.asarray(everything.weights)
    wanted = -np.sort(-dense, -1)[..., :count]
    near(found.weights, wanted)
    slots = np.asarray(found.indices)
    assert found.weights.shape == found.indices.shape == (B, N, T, count)
    picked = np.take_along_axis(dense, np.maximum(slots, 0), -1)
    near(np.where(slots < 0, 0, picked), found.weights)
    # As many slots as the query sees keys, at most k, all different; then -1.
    visible = np.asarray(mask.to_dense(T, S)).reshape(T, S).sum(-1)
    seen = np.minimum(visible, count)
    np.testing.assert_array_equal(
        (slots >= 0).sum(-1), np.broadcast_to(seen, slots.shape[:-1])
    )
    for row in slots.reshape(-1, count):
        kept = row[row >= 0]
        assert len(set(kept)) == len(kept)
        assert (row[len(kept) :] == -1).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types(dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in (QUERY, KEY, VALUE))
    result = attention_with_stats(q, k, v, top_k=2)
    assert result.output.dtype == dtype
    assert result.lse.dtype == result.weights.dtype == jnp.float32
    assert result.indices.dtype == jnp.int32
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (QUERY, KEY, VALUE)]
        result = attention_with_stats(*wide, top_k="all")
        assert {x.dtype for x in result[:3]} == {np.dtype(np.float64)}
        np.testing.assert_allclose(result.output, by_hand(*wide)[0], rtol=1e-12)


@st.composite
def problems(draw):
    sizes = st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17])
    t, s, d, h = (draw(sizes) for _ in range(4))
    k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    blocks = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return t, s, k * group, k, h, d, blocks, draw(st.integers(0, 2**16))


@pytest.mark.slow
@settings(max_examples=8)
@given(problem=problems())
def test_any_shape(problem, tile):
    computes_like_the_reference(problem, tile)


def computes_like_the_reference(problem, tile):
    t, s, n, k, h, d, blocks, seed = problem
    tile(*blocks)
    rng = np.random.default_rng(seed)
    q, key, v = (
        rng.normal(size=x).astype("f")
        for x in ((2, t, n, h), (2, s, k, h), (2, s, k, d))
    )
    ids = rng.integers(-1, 2, (2, t)), rng.integers(-1, 2, (2, s))
    mask = masks.documents(*ids) | masks.sliding_window(1, 0)

    def run(q, key, v, implementation):
        result = attention_with_stats(
            q, key, v, mask=mask, implementation=implementation
        )
        return (result.output**2).sum(), result[:2]

    results = [
        jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True), static_argnums=3)(
            q, key, v, name
        )
        for name in BOTH
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), *results
    )


@pytest.mark.parametrize(
    "precision",
    [
        "highest",
        jax.lax.Precision.HIGH,
        jax.lax.DotAlgorithmPreset.DEFAULT,
        ("high", "highest"),
        ("highest", "highest"),
    ],
)
def test_precisions_that_products_take(precision):
    score = scores.bilinear.init(jax.random.key(0), H, H)
    found = attention(QUERY, KEY, VALUE, score=score, precision=precision)
    near(found, attention(QUERY, KEY, VALUE, score=score))
    with pytest.raises(ValueError, match="precision: expected None"):
        explain(QUERY, KEY, VALUE, score=score, precision="best")
