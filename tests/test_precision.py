"""16-bit inputs, compared with the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, attention_with_stats, scores
from benchmarks.precision import arrays, both_passes, errors
from tests.grid import NATIVE, few, in_turn
from tests.implementations import interpreted

EVERYONE = ("reference", "tiled", NATIVE, interpreted.NAME)


@pytest.fixture(autouse=True)
def as_users_do(monkeypatch):
    """JAX's default precision, which lets kernels multiply 16-bit inputs directly."""
    interpreted.register(monkeypatch)
    with jax.default_matmul_precision("default"):
        yield


def exact(q, k, v, d_output, scale):
    """Exact results in float64.

    Output, gradients of query, key and value, the terms ``[B, N, T, S]`` of the
    gradient of the scale, and log-sum-exp.
    """
    q, k, v, d_output = (np.asarray(x, np.float64) for x in (q, k, v, d_output))
    factor = np.broadcast_to(scale, q.shape[2]).astype(np.float64)[:, None, None]
    products = np.einsum("btnh,bsnh->bnts", q, k)
    lse = np.logaddexp.reduce(products * factor, -1)
    weights = np.exp(products * factor - lse[..., None])
    output = np.einsum("bnts,bsnd->btnd", weights, v)
    d_weights = np.einsum("btnd,bsnd->bnts", d_output, v)
    less = (weights * d_weights).sum(-1, keepdims=True)
    d_logits = weights * (d_weights - less)
    d_query = np.einsum("bnts,bsnh->btnh", d_logits * factor, k)
    d_key = np.einsum("bnts,btnh->bsnh", d_logits * factor, q)
    d_value = np.einsum("bnts,btnd->bsnd", weights, d_output)
    return [output, d_query, d_key, d_value, d_logits * products, lse.swapaxes(1, 2)]


@functools.cache
def problem(dtype, head_size):
    """Inputs, exact results, the errors of ``jax.nn`` and of rounding exact results."""
    given = arrays(128, head_size, jnp.dtype(dtype))
    wanted = exact(*given, head_size**-0.5)[:4]
    given = [jnp.asarray(x) for x in given]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = both_passes(jax.nn.dot_product_attention, given)
    stored = [x.astype(given[0].dtype) for x in wanted]
    return given, wanted, errors(theirs, wanted), errors(stored, wanted)


@pytest.mark.parametrize("implementation", EVERYONE)
@pytest.mark.parametrize(
    ("dtype", "head_size"),
    few(
        [("bfloat16", 64), ("bfloat16", 128), ("float16", 128)],
        ("bfloat16", 128),
        ("float16", 128),
    ),
)
def test_no_less_accurate_than_jax_nn(dtype, head_size, implementation):
    if dtype == "float16" and implementation == interpreted.NAME:
        pytest.skip("it computes float32 and bfloat16")
    given, wanted, theirs, stored = problem(dtype, head_size)
    ours = jax.jit(functools.partial(attention, implementation=implementation))
    found = errors(both_passes(ours, given), wanted)
    # These may round weights to 16 bits, as jax.nn does. Their gradients also use an
    # output computed from such weights: one more rounding.
    kernels = dtype == "bfloat16" and implementation in ("native", interpreted.NAME)
    limits = np.hypot(theirs, stored) if kernels else theirs
    assert (found <= np.array(limits)).all(), (found, theirs)


@pytest.mark.parametrize(("length", "implementation"), in_turn([3, 40], EVERYONE))
def test_a_learned_scale_is_never_applied_in_16_bits(length, implementation):
    """Scaled queries would be infinite in float16."""
    narrow = implementation == interpreted.NAME
    dtype = jnp.bfloat16 if narrow else jnp.float16
    random = np.random.default_rng(1)
    factors = (30, 3.75e-5, 1, 0.03)
    shape = (1, length, 2, 64)
    given = [(random.standard_normal(shape) * x).astype(dtype) for x in factors]
    scale = np.array([1000, 723.5], np.float32)
    *wanted, terms, _ = exact(*given, scale)

    @jax.jit
    def both(q, k, v, d_output, scale):
        def attend(q, k, v, scale):
            score = scores.scaled_dot(scale)
            return attention(q, k, v, score=score, implementation=implementation)

        output, pull = jax.vjp(attend, q, k, v, scale)
        return output, *pull(d_output)

    *found, d_scale = both(*given, scale)
    eps = float(jnp.finfo(dtype).eps)
    assert max(errors(found, wanted)) <= eps
    # Terms may be rounded; the error of their sum must not be larger than that.
    assert d_scale.dtype == jnp.float32
    off = np.abs(d_scale - terms.sum((0, 2, 3)))
    assert (off <= eps * np.abs(terms).sum((0, 2, 3))).all()


@pytest.mark.parametrize("implementation", EVERYONE)
def test_unit_vectors_are_not_rounded(implementation):
    q, k, v, d = arrays(40, 64, jnp.bfloat16)
    units = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(wide, (q, k)))
    *_, wanted = exact(*units, v, d, 10.0)

    @functools.partial(jax.jit, static_argnames="projected")
    def lse(q, k, v, projected):
        score = scores.cosine(10.0)
        if projected:
            k, score = score.project_key(k), scores.projected_keys(score)
        return attention_with_stats(
            q, k, v, score=score, implementation=implementation
        ).lse

    # Rounding of each element and of each sum of products, in float32.
    limit = 10 * (64 + 8) * 2.0**-24
    for projected in (False, True):
        found = lse(q, k, v, projected)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit)


def wide(x):
    return np.asarray(x, np.float64)


def test_what_is_projected_keeps_its_type_or_is_wider():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    for score in (scores.scaled_dot(0.3), scores.scaled_dot(), scores.cosine()):
        assert score.project_query(x).dtype == jnp.float32
        assert score.project_query(x.astype(jnp.float32)).dtype == jnp.float32
    with pytest.raises(TypeError, match="key: dtype float32 differs"):
        attention(x, x.astype(jnp.float32), x)
