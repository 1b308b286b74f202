"""Each modifier against its formula; buckets and slopes against their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, attention_with_stats, modifiers

B, T, S, N, K, H = 2, 7, 9, 6, 3, 4
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, T, N, H)).astype("f")
KEY = RNG.normal(size=(B, S, K, H)).astype("f")
LOGITS = np.einsum("btnh,bsnh->bnts", QUERY, np.repeat(KEY, N // K, 2)) / 2
OFFSETS = np.arange(S)[None, :] - np.arange(T)[:, None]


def logits_after(*own, **options):
    value = np.ones((B, S, K, 1), np.float32)
    result = attention_with_stats(
        QUERY, KEY, value, modifiers=own, top_k="all", **options
    )
    lse = np.asarray(result.lse).swapaxes(1, 2)[..., None]
    return np.log(np.asarray(result.weights, np.float64)) + lse


def equal(found, wanted):
    np.testing.assert_allclose(found, np.broadcast_to(wanted, found.shape), atol=3e-5)


@pytest.mark.parametrize(
    "shape",
    [(T, S), (S,), (1, S), (T, 1), (N, T, S), (N, 1, 1), (B, 1, 1, S), (B, N, T, S)],
)
def test_bias_of_any_shape(shape):
    array = np.random.default_rng(1).normal(size=shape).astype("f")
    equal(logits_after(modifiers.bias(array)), LOGITS + array)


def test_soft_cap():
    equal(logits_after(modifiers.soft_cap(1.5)), 1.5 * np.tanh(LOGITS / 1.5))
    cap = np.linspace(1, 2, N, dtype=np.float32)[:, None, None]
    equal(logits_after(modifiers.soft_cap(cap)), cap * np.tanh(LOGITS / cap))


def test_a_cap_that_only_a_program_knows():
    closed_over = jnp.float32(1.5)
    for cap in (closed_over, None):
        found = jax.jit(
            lambda given, cap=cap: modifiers.soft_cap(given if cap is None else cap).cap
        )(jnp.float32(1.5))
        assert found == 1.5


def test_alibi():
    slopes = np.linspace(0.1, 0.9, N, dtype=np.float32)
    wanted = LOGITS - slopes[:, None, None] * np.abs(OFFSETS)
    equal(logits_after(modifiers.alibi(slopes)), wanted)
    wanted = LOGITS - modifiers.alibi_slopes(N)[:, None, None] * np.abs(OFFSETS)
    equal(logits_after(modifiers.alibi(N)), wanted)
    moved = logits_after(modifiers.alibi(slopes), query_offset=3)
    equal(moved, LOGITS - slopes[:, None, None] * np.abs(OFFSETS - 3))


def test_alibi_slopes_of_the_paper():
    # Press et al. 2022, section 3: for 8 heads 1/2, 1/4, ..., 1/256.
    np.testing.assert_allclose(
        modifiers.alibi_slopes(8), [2.0**-i for i in range(1, 9)], rtol=1e-6
    )
    np.testing.assert_allclose(
        modifiers.alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)], rtol=1e-6
    )
    # The paper's code for other counts: 12 heads get the 8 above and every other of the
    # 16.
    between = [2 ** (-i / 2) for i in range(1, 9, 2)]
    np.testing.assert_allclose(
        modifiers.alibi_slopes(12), [2.0**-i for i in range(1, 9)] + between, rtol=1e-6
    )
    assert modifiers.alibi_slopes(1).shape == (1,)
    with pytest.raises(ValueError, match="num_heads: expected at least 1, got 0"):
        modifiers.alibi_slopes(0)


def t5_bucket(offset, bidirectional, count, far):
    """Bucket of an offset, as in mesh_tensorflow's ``_relative_position_bucket``."""
    result, n = 0, -offset
    if bidirectional:
        count //= 2
        if n < 0:
            result = count
        n = abs(n)
    else:
        n = max(n, 0)
    exact = count // 2
    if n < exact:
        return result + n
    ratio = np.float32(np.log(np.float32(n) / np.float32(exact)))
    large = exact + int(ratio / np.float32(math.log(far / exact)) * (count - exact))
    return result + min(large, count - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("count", "far"), [(8, 9), (32, 128), (6, 20)])
def test_t5_buckets(bidirectional, count, far):
    t = s = 160
    table = np.arange(count, dtype=np.float32)[None]
    own = modifiers.relative_bias(table, bidirectional=bidirectional, max_distance=far)
    q, k = np.zeros((1, t, 1, 1), "f"), np.zeros((1, s, 1, 1), "f")
    bare = attention_with_stats(
        q, k, k, modifiers=[own], top_k="all", implementation="reference"
    )
    found = np.log(np.asarray(bare.weights[0, 0], np.float64))
    found = found + np.asarray(bare.lse)[0, :, 0][:, None]
    wanted = [
        [t5_bucket(j - i, bidirectional, count, far) for j in range(s)]
        for i in range(t)
    ]
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("leads", [1, N])
def test_clipped_relative(leads):
    table = np.random.default_rng(1).normal(size=(leads, 6)).astype("f")
    own = modifiers.clipped_relative(table, left=2, right=3)
    wanted = LOGITS + table[:, np.clip(OFFSETS, -2, 3) + 2]
    equal(logits_after(own), wanted)


def test_the_order_given():
    array = np.float32(2) * np.ones((T, S), np.float32)
    cap, bias = modifiers.soft_cap(1.0), modifiers.bias(array)
    equal(logits_after(cap, bias), np.tanh(LOGITS) + 2)
    equal(logits_after(bias, cap), np.tanh(LOGITS + 2))


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
def test_minus_infinity_hides(implementation):
    visible = np.random.default_rng(0).random((N, T, S)) < 0.5
    visible[:, 2] = False
    array = np.where(visible, 0, -np.inf).astype("f")
    value = RNG.normal(size=(B, S, K, 5)).astype("f")

    def loss(q, k, v, array, mask):
        own = [] if array is None else [modifiers.bias(array)]
        output = attention(
            q, k, v, modifiers=own, mask=mask, implementation=implementation
        )
        return (output**2).sum(), output

    slope = jax.grad(loss, (0, 1, 2), has_aux=True)
    found = slope(QUERY, KEY, value, array, None)
    wanted = slope(QUERY, KEY, value, None, visible)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, wanted
    )


def test_bias_gradient_is_computed_only_where_wanted():
    array = np.zeros((B, N, T, S), np.float32)
    value = np.ones((B, S, K, 5), np.float32)

    def loss(q, array):
        own = [modifiers.bias(array)]
        return attention(q, KEY, value, modifiers=own, implementation="tiled").sum()

    def shapes(argnums):
        text = jax.jit(jax.grad(loss, argnums)).lower(QUERY, array).as_text()
        return text.count("dynamic_update_slice")

    assert shapes(0) < shapes((0, 1))


def test_bad_arguments():
    with pytest.raises(TypeError, match="bias: expected a floating array, got bool"):
        modifiers.bias(np.ones((T, S), bool))
    with pytest.raises(
        ValueError, match="cap: expected a positive finite number, got 0"
    ):
        modifiers.soft_cap(0)
    with pytest.raises(ValueError, match=r"slopes: expected \[N\], got shape \(\)"):
        modifiers.alibi(np.float32(1))
    with pytest.raises(ValueError, match=r"table: expected \[N or 1, buckets\]"):
        modifiers.relative_bias(np.ones(8, np.float32))
    with pytest.raises(ValueError, match="table: 8 buckets do not fit max_distance=2"):
        modifiers.relative_bias(np.ones((1, 8), np.float32), max_distance=2)
    with pytest.raises(ValueError, match=r"\[N or 1, 4\] for left=2, right=1"):
        modifiers.clipped_relative(np.ones((1, 5), np.float32), left=2, right=1)
    with pytest.raises(ValueError, match="left: expected at least 0, got -1"):
        modifiers.clipped_relative(np.ones((1, 1), np.float32), left=-1, right=1)
    assert modifiers.bias(jnp.ones((1, 1))).array.shape == (1, 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_16_bit_operands_are_summed_in_float32(dtype):
    x = RNG.normal(size=(1, 300, 2, 4)).astype(dtype)
    cap = jnp.full((2, 1, 1), 1.5, dtype)

    def gradient(implementation):
        def loss(cap):
            own = (modifiers.soft_cap(cap),)
            found = attention(
                x, x, x, modifiers=own, implementation=implementation
            ).astype(jnp.float32)
            return (found * x.astype(jnp.float32)).sum()

        return jax.grad(loss)(cap).astype(jnp.float32)

    np.testing.assert_allclose(gradient("tiled"), gradient("reference"), rtol=0.01)
