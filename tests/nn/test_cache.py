"""Decoding step by step equals the whole sequence, for every cache and pattern."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, nn, scores
from tests.grid import few

B, T, N, K, H = 2, 11, 4, 2, 4


def layer(mask, score=None, position=None):
    return nn.MultiHeadAttention(
        N * H,
        N,
        num_key_heads=K,
        mask=mask,
        score=score,
        position=position,
        rngs=nnx.Rngs(0),
    )


def caches(attention):
    sizes = (K, attention.compared_size)
    window = masks.causal() & masks.sliding_window(3, 0)
    streaming = masks.causal() & (masks.sliding_window(3, 0) | masks.prefix(2))
    value = {"value_size": H}
    return {
        "full": (attention.make_cache(B, T), masks.causal()),
        "full, window": (nn.full_cache(B, T, *sizes, **value), window),
        "full, dilated": (
            nn.full_cache(B, T, *sizes, **value),
            masks.causal() & masks.dilated_window(4, 0, 2),
        ),
        "ring": (nn.CachePolicy(4).make(B, T, *sizes, **value), window),
        "streaming": (nn.CachePolicy(4, 2).make(B, T, *sizes, **value), streaming),
    }


KINDS = ("full", "full, window", "full, dilated", "ring", "streaming")
SCORES = {
    "scaled dot": None,
    "additive": scores.additive.init(
        jax.random.key(1), H, hidden_size=6, num_heads=N, num_key_heads=K
    ),
}
x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, N * H), np.float32))


#: Every kind of cache, score and prompt length; all but some are slow.
PREFILLS = few(
    itertools.product(KINDS, SCORES, [1, 3, 8]),
    *((kind, "scaled dot", 1) for kind in ("full", "ring", "streaming")),
    *(("full, dilated", "scaled dot", 3), ("full, window", "additive", 8)),
)


@pytest.mark.parametrize(("kind", "score", "prompt"), PREFILLS)
def test_prefill_and_steps_equal_the_whole(kind, score, prompt):
    cache, mask = caches(layer(None, SCORES[score]))[kind]
    attention = layer(mask, SCORES[score], nn.Rotary())
    whole = nnx.jit(lambda attention: attention(x))(attention)
    step = nnx.jit(lambda attention, x, cache: attention.decode(x, cache))
    parts = []
    for begin, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, T))]:
        output, cache = step(attention, np.asarray(x)[:, begin:stop], cache)
        parts.append(output)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-5)
    np.testing.assert_array_equal(cache.length, [T, T])


@pytest.mark.parametrize("kind", few(KINDS, "full", "ring", "streaming"))
def test_examples_of_other_lengths_in_one_batch(kind):
    """Prompts of 3 and 7 tokens, padded to 7, each continued from its own length."""
    cache, mask = caches(layer(None))[kind]
    attention = layer(mask, position=nn.Rotary())
    whole = nnx.jit(lambda attention: attention(x))(attention)
    given = np.asarray(x)
    lengths = np.array([3, 7])
    slots = np.arange(7)[None]
    positions = np.where(slots < lengths[:, None], slots, -1)
    prompt = np.where((positions >= 0)[..., None], given[:, :7], np.float32(1e9))
    decode = jax.jit(attention.decode)
    output, cache = decode(prompt, cache, positions=positions)
    for b in range(B):
        np.testing.assert_allclose(
            output[b, : lengths[b]], whole[b, : lengths[b]], atol=2e-5
        )
    for step in range(3):
        where = lengths + step
        token = given[np.arange(B), where][:, None]
        output, cache = decode(token, cache)
        for b in range(B):
            np.testing.assert_allclose(output[b, 0], whole[b, where[b]], atol=2e-5)


@pytest.mark.parametrize("kind", ["ring", "streaming"])
def test_prefill_sees_no_more_than_steps_would(kind):
    """Prefill with a mask that shows more than the cache keeps."""
    cache, kept = caches(layer(None))[kind]
    output, _ = layer(masks.causal()).decode(x, cache)
    np.testing.assert_allclose(output, layer(kept)(x), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_tokens_of_a_prefill_share_a_slot(kind):
    """With duplicate slots, the value that JAX stores would be undefined."""
    cache, _ = caches(layer(None))[kind]
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    count = cache.positions.shape[1]
    for slots in np.asarray(cache._slots(positions, jnp.full(B, T))):
        kept = slots[slots < count]
        assert sorted(kept) == list(range(count))


@pytest.mark.parametrize("kind", ["ring", "streaming"])
def test_padding_takes_no_slot(kind):
    cache, _ = caches(layer(None))[kind]
    positions = jnp.array([[-1, -1, -1], [0, 1, 2]])
    _, cache = layer(None).decode(x[:, :3], cache, positions=positions)
    np.testing.assert_array_equal(cache.positions[0], -1)
    np.testing.assert_array_equal(np.sort(cache.positions[1])[-3:], [0, 1, 2])
    np.testing.assert_array_equal(cache.length, [0, 3])


def test_streaming_memory_is_constant_over_100_000_steps():
    attention = layer(masks.causal())
    cache = nn.streaming_cache(1, 4, 12, K, H)
    token = x[:1, :1]

    def bytes_of(cache):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    before = bytes_of(cache)
    steps = 100_000

    def step(cache, _):
        return attention.decode(token, cache)[1], None

    cache, _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))(cache)
    assert bytes_of(cache) == before
    kept = [*range(4), *range(steps - 12, steps)]
    np.testing.assert_array_equal(np.sort(cache.positions[0]), kept)


def test_outgrown_full_cache_yields_nan():
    attention, cache = layer(masks.causal()), nn.full_cache(B, 4, K, H)
    output, cache = attention.decode(x[:, :4], cache)
    assert np.isfinite(output).all()
    output, _ = jax.jit(attention.decode)(x[:, 4:5], cache)
    assert np.isnan(output).all()
    with pytest.raises(ValueError, match="cache: position 4 does not fit .* of 4;"):
        attention.decode(x[:, 4:5], cache)


def test_a_ring_ends_where_positions_end():
    last = 2**31 - 1
    cache, token = nn.ring_cache(1, 2, 1, 4), jnp.ones((1, 1, 1, 4))
    cache, _ = cache.append(token, token, jnp.array([[last - 1]]))
    assert cache.length == last
    np.testing.assert_array_equal(cache.next_positions(3), [[last] * 3])
    assert cache.overflows(cache.next_positions(1)).all()
    with pytest.raises(ValueError, match="position 2147483647 does not fit a ring"):
        cache.append(token, token, cache.next_positions(1))


def test_a_cache_of_another_type_or_batch_is_refused():
    attention = layer(masks.causal())
    half = nn.full_cache(B, 4, K, H, dtype=jnp.bfloat16)
    message = (
        r"cache: expected dtype float32, .* got bfloat16; .* start\(\.\.\., dtype="
    )
    with pytest.raises(TypeError, match=message):
        attention.decode(x[:, :1], half)
    cache = nn.full_cache(B + 1, 4, K, H)
    for wrong in (x[:, :1], x[0, 0]):
        with pytest.raises(ValueError, match=r"x: expected \[3, T, in_features\]"):
            attention.decode(wrong, cache)


def test_a_cache_keeps_16_bits_of_unit_vectors():
    """The cache is 16-bit, although unit vectors are compared in float32."""
    attention = nn.MultiHeadAttention(
        N * H,
        N,
        mask=masks.causal(),
        score=scores.cosine(2.0),
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (B, T, N * H), jnp.bfloat16)
    whole = attention(x)
    memory = attention.project(x)
    assert memory.key.dtype == jnp.float32
    assert memory.value.dtype == whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(attention.attend(x, memory), whole)
    cache = nn.full_cache(B, T, N, H, dtype=jnp.bfloat16)
    found, cache = attention.decode(x, cache)
    assert cache.key.dtype == jnp.bfloat16
    off = jnp.abs(found.astype(jnp.float32) - whole.astype(jnp.float32)).max()
    assert off <= 2.0**-6 * jnp.abs(whole.astype(jnp.float32)).max()


def test_other_examples():
    cache = nn.full_cache(3, 4, K, H)
    cache = jax.tree.map(
        lambda a: a + jnp.arange(3).reshape(3, *[1] * (a.ndim - 1)).astype(a.dtype),
        cache,
    )
    np.testing.assert_array_equal(cache.take(jnp.array([2, 2, 0])).length, [2, 2, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.full_cache(1, 0, 1, 4), "length: expected at least 1, got 0"),
        (lambda: nn.ring_cache(1, 0, 1, 4), "window: expected at least 1"),
        (lambda: nn.streaming_cache(1, 0, 4, 1, 4), "anchors: expected at least 1"),
        (lambda: nn.CachePolicy(window=0), "window: expected at least 1, got 0"),
        (lambda: nn.CachePolicy(4, -1), "anchors: expected at least 0, got -1"),
        (lambda: nn.CachePolicy(anchors=2), "anchors: expected 0 without a window"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


WINDOW, STREAM = masks.sliding_window(3, 0), masks.streaming(anchors=2, window=3)


def cache_of(mask, window, anchors=0):
    policy = nn.CachePolicy(window, anchors)
    attention = nn.MultiHeadAttention(
        N * H, N, mask=mask, cache=policy, rngs=nnx.Rngs(0)
    )
    return jax.jit(lambda: attention.make_cache(1, 100))()


@pytest.mark.parametrize(
    ("mask", "window", "anchors", "needed"),
    [
        (WINDOW, 3, 0, "window=4"),
        (STREAM, 3, 2, "window=4"),
        (STREAM, 4, 0, "anchors=2"),
        (STREAM, 4, 1, "anchors=2"),
        (masks.chunked(16), 15, 0, "window=16"),
        (masks.per_head([WINDOW, masks.sliding_window(5, 0)] * 2), 4, 0, "window=6"),
        (masks.sliding_window(500, 0), 4, 0, "a longer window"),
        (masks.predicate(lambda t, s: t % 97 == s % 97), 4, 0, "a longer window"),
    ],
    ids=repr,
)
def test_a_policy_that_drops_what_the_mask_shows_is_refused(
    mask, window, anchors, needed
):
    with pytest.raises(ValueError, match=f"{window=}, {anchors=}.*needs {needed}"):
        cache_of(mask, window, anchors)


@pytest.mark.parametrize(
    ("mask", "window", "anchors"),
    [
        (WINDOW, 4, 0),
        (masks.sliding_window(3, 3), 4, 0),
        (STREAM, 4, 2),
        (masks.longformer(window=3, anchors=2), 4, 2),
        (masks.chunked(16), 16, 0),
        (masks.causal(), 2, 0),  # the policy is what limits it
        (masks.causal() & masks.documents(jnp.zeros(100, int)), 2, 0),  # data
    ],
    ids=repr,
)
def test_a_policy_that_keeps_what_the_mask_shows_is_accepted(mask, window, anchors):
    assert cache_of(mask, window, anchors).key.shape[1] == window + anchors
