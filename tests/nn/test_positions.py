"""Positions: a model without them ignores order; with each kind it does not."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import nn

KINDS = {
    "rotary": nn.Rotary,
    "rotary, neighbours": lambda: nn.Rotary(interleaved=True),
    "alibi": lambda: nn.Alibi(2),
    "relative": lambda: nn.RelativeBias(2, buckets=8, rngs=nnx.Rngs(1)),
    "clipped": lambda: nn.ClippedRelative(8, left=2, right=2, rngs=nnx.Rngs(1)),
}


def model(position):
    layer = nn.MultiHeadAttention(16, 2, position=position, rngs=nnx.Rngs(0))
    if hasattr(position, "table"):
        position.table[...] *= 50  # from 0.02 to order one
    return layer


x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 16), np.float32))
shuffled = np.random.default_rng(0).permutation(12)


def test_without_positions_order_is_lost():
    layer = model(None)
    np.testing.assert_allclose(layer(x[:, shuffled]), layer(x)[:, shuffled], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_positions_order_matters(kind):
    layer = model(KINDS[kind]())
    run, given = jax.jit(layer), np.asarray(x)
    difference = (
        np.asarray(run(given[:, shuffled])) - np.asarray(run(given))[:, shuffled]
    )
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_only_offsets_count(kind):
    layer = model(KINDS[kind]())
    run, where = jax.jit(layer), np.arange(12) + 7
    moved = run(x, query_positions=where, key_positions=where)
    np.testing.assert_allclose(moved, run(x), atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
def test_added_positions_bring_order(learned):
    added = nn.Learned(12, 16, rngs=nnx.Rngs(1)) if learned else nn.Sinusoidal()
    if learned:
        added.table[...] *= 50
    layer, where = model(None), jnp.arange(12)
    one = layer(added(x, where))[:, shuffled]
    other = layer(added(x[:, shuffled], where))
    assert float(jnp.abs(one - other).max()) > 1e-2


def test_sinusoids_are_the_papers():
    found = nn.sinusoids(jnp.arange(5), 6)
    for t in range(5):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert found[t, 2 * i] == pytest.approx(np.sin(angle), abs=1e-6)
            assert found[t, 2 * i + 1] == pytest.approx(np.cos(angle), abs=1e-6)
    halves = nn.sinusoids(jnp.arange(5), 6, interleaved=False)
    np.testing.assert_array_equal(halves[:, :3], found[:, 0::2])
    np.testing.assert_array_equal(halves[:, 3:], found[:, 1::2])


def test_rotary_is_a_rotation_by_the_papers_angle():
    q = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = nn.Rotary(interleaved=True)(q, jnp.array([3]))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), np.sin(3), 0, 0], atol=1e-6)
    turned = nn.Rotary()(q, jnp.array([3]))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), 0, np.sin(3), 0], atol=1e-6)


def test_rotary_scaling_offset_and_part():
    q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    plain, where = nn.Rotary(), jnp.arange(4)
    np.testing.assert_allclose(
        nn.Rotary(scaling=2.0, offset=2)(q, 2 * where), plain(q, where + 1), atol=1e-5
    )
    part = nn.Rotary(size=4)(q, where)
    np.testing.assert_array_equal(part[..., 4:], q[..., 4:])
    np.testing.assert_allclose(part[..., :4], plain(q[..., :4], where), atol=1e-6)


#: Positions up to 131,071, beyond the integers of float32, and up to the last int32.
FAR = np.array([0, 1, 3, 131_071, 2**24 + 1, 2**30 + 12_345, 2**31 - 1], np.int32)


def angles(positions, features, base, *, scaling=1, offset=0):
    """Exact angles in float64, reduced to one turn with 60 digits."""
    number = decimal.Decimal
    with decimal.localcontext(prec=60):
        turn = 2 * number("3.14159265358979323846264338327950288419716939937511")
        steps = [(number(int(p)) + offset) / number(scaling) for p in positions]
        rates = [number(base) ** (number(-i) / features) for i in range(0, features, 2)]
        return np.array([
            [float((s * r).remainder_near(turn)) for r in rates] for s in steps
        ])


@pytest.mark.parametrize("wide", [False, True])
def test_far_positions_are_as_exact_as_their_type(wide):
    """Also traced; an error of one position would be noticed at every position."""
    dtype, eps = (np.float64, 5e-16) if wide else (np.float32, 1.2e-7)
    rotary = nn.Rotary(base=5e5, scaling=4.0, offset=1, interleaved=True)
    with jax.enable_x64(wide):
        where = jnp.asarray(FAR)
        ones = jnp.ones((1, len(FAR), 1, 8), dtype)

        @jax.jit
        def run(where):
            embedded = nn.Sinusoidal()(jnp.zeros((1, len(FAR), 6), dtype), where)
            added = nn.sinusoids(where, 6, dtype=dtype)
            return embedded[0], added, rotary(ones, where)[0, :, 0]

        *both, turned = jax.tree.map(np.asarray, run(where))
    angle = angles(FAR, 6, 10_000)
    for found in both:
        assert found.dtype == dtype
        np.testing.assert_allclose(found[:, 0::2], np.sin(angle), atol=eps, rtol=0)
        np.testing.assert_allclose(found[:, 1::2], np.cos(angle), atol=eps, rtol=0)
    angle = angles(FAR, 8, 5e5, scaling=4, offset=1)
    wanted = np.stack([np.cos(angle) - np.sin(angle), np.cos(angle) + np.sin(angle)], 2)
    np.testing.assert_allclose(turned, wanted.reshape(-1, 8), atol=2 * eps, rtol=0)
    assert turned.dtype == dtype


def test_small_angles_are_exact_relative_to_themselves():
    found = nn.sinusoids(np.arange(1, 4), 8, base=1e6)[:, 0::2]
    wanted = np.sin(angles([1, 2, 3], 8, 1e6))
    np.testing.assert_allclose(found, wanted, rtol=3e-7)


def test_positions_are_integers():
    for run in (lambda p: nn.sinusoids(p, 4), lambda p: nn.Rotary()(x[:, :, None], p)):
        with pytest.raises(TypeError, match="positions: expected integers, got float"):
            run(np.arange(12.0))


def test_clipped_relative_is_the_papers_equation():
    layer = model(KINDS["clipped"]())
    table = layer.position.table[...]
    q, k, v = (part(x) for part in (layer.query, layer.key, layer.value))
    offset = np.clip(np.arange(12) - np.arange(12)[:, None], -2, 2) + 2
    keys = k[:, None] + table[offset][None, :, :, None]  # [1, T, S, N, H]
    logits = jnp.einsum("btnh,btsnh->bnts", q, keys) / np.sqrt(8)
    heads = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)
    np.testing.assert_allclose(layer(x), layer.out(heads), atol=1e-5)


def test_parts_of_logits_are_never_in_16_bits():
    types = dict(param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    position = nn.ClippedRelative(8, left=2, right=1, **types)
    query = jax.random.normal(jax.random.key(0), (1, 3, 2, 8), jnp.bfloat16)
    (made,) = position.modifiers(query)
    q, table = (np.asarray(x, np.float64) for x in (query, position.table[...]))
    wanted = np.einsum("btnh,rh->bntr", q, table) / 8**0.5
    assert made.sums.dtype == jnp.float32
    np.testing.assert_allclose(made.sums, wanted, rtol=1e-5, atol=1e-7)


def test_learned_positions_end():
    learned = nn.Learned(4, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions: expected less than 4.* got 4"):
        learned(jnp.zeros((1, 5, 8)), jnp.arange(5))
    traced = jax.jit(lambda p: learned(jnp.zeros((1, 5, 8)), p))(jnp.arange(5))
    assert np.isnan(traced[0, 4]).all()
    assert not np.isnan(traced[0, :4]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.sinusoids(jnp.arange(2), 5), "features: expected an even"),
        (lambda: nn.Rotary(size=3), "size: expected an even number"),
        (lambda: nn.Rotary(scaling=0), "scaling: expected a positive"),
        (lambda: nn.Rotary()(jnp.ones((1, 1, 1, 5)), jnp.arange(1)), "size: 5 feat"),
        (
            lambda: nn.ClippedRelative(8, left=-1, right=1, rngs=nnx.Rngs(0)),
            "left, right: expected at least 0",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
