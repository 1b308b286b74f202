"""Edge cases of fast paths, shortcuts and folding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, attention_with_stats, explain, masks, modifiers, scores
from attnlab._src.types import Score, pytree
from attnlab.masks import Mask
from tests.grid import NATIVE, few, in_turn
from tests.implementations import interpreted

IMPLEMENTATIONS = ("reference", "tiled", NATIVE)


def arrays(t, s, n=2, k=1, h=4, d=3, b=1):
    rng = np.random.default_rng(0)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, d)
    return tuple(jnp.asarray(rng.standard_normal(x, np.float32)) for x in shapes)


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "lengths": lambda n: masks.lengths(query=n),
        "anchor": lambda n: masks.anchor(n[None]) | masks.sliding_window(1, 0),
        "random": lambda n: masks.random_blocks(jax.random.key(n), 1, 2, 4),
    }.items(),
)
def test_vmap_over_the_data_of_a_mask(name, make, tile):
    tile(4, 4)
    x = arrays(7, 7)
    data = jnp.array([1, 4, 6])

    def run(n):
        return attention(*x, mask=make(n) & masks.causal())

    mapped = jax.vmap(run)(data)
    looped = jnp.stack([run(n) for n in data])
    np.testing.assert_allclose(mapped, looped, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"key_positions": jnp.array([0, -1, 2, 3])},
        {"query_offset": 3, "mask": masks.sliding_window(0, 0)},
        {"query_positions": jnp.array([1, 2, 3, 5]), "mask": ~masks.prefix(1)},
    ],
    ids=["empty slot", "offset", "positions"],
)
def test_hidden_slots_where_lengths_are_equal(options, implementation):
    hidden = 1 if "key_positions" in options else 0
    q, k, v = arrays(4, 4)

    def loss(q, k, v):
        return attention(q, k, v, implementation=implementation, **options).sum()

    poisoned = [np.array(x) for x in (k, v)]
    for x in poisoned:
        x[:, hidden] = np.nan
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, gradients = both(q, *poisoned)
    assert np.isfinite(value)
    assert value == both(q, k, v)[0]
    assert all(np.isfinite(g).all() for g in gradients)


def test_rows_with_different_numbers_of_intervals():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    chosen = explain(shape, shape, shape, mask=~masks.sliding_window(100, 100))
    assert chosen.implementation in {"native", "tiled"}


@pytest.mark.parametrize("shape", [(6, 1), (1, 6)])
def test_a_modifier_that_divides_by_an_array(shape, tile):
    tile(4, 4)
    x = arrays(6, 6)
    cap = jnp.full(shape, 2.0)

    def loss(q, k, v, cap, implementation):
        capped = [modifiers.soft_cap(cap)]
        return (
            attention(q, k, v, modifiers=capped, implementation=implementation) ** 2
        ).sum()

    names = ("reference", "tiled")
    both = [jax.grad(loss, argnums=(0, 1, 2, 3))(*x, cap, i) for i in names]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vectors_without_numbers_are_all_alike(implementation):
    *_, v = arrays(5, 5)
    nothing = v[..., :0]
    found = attention(nothing, nothing, v, implementation=implementation)
    np.testing.assert_allclose(found, jnp.broadcast_to(v.mean(1), v.shape), atol=1e-6)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, interpreted.NAME])
def test_gradients_from_above_stop_at_a_query_that_sees_nothing(
    implementation, monkeypatch
):
    interpreted.register(monkeypatch)
    x = arrays(5, 5)
    mask = masks.lengths(query=np.array([3]))

    def loss(q, k, v):
        found = attention_with_stats(q, k, v, mask=mask, implementation=implementation)
        z = jnp.where(jnp.isfinite(found.lse), found.lse**2, 0).sum()
        return z + jnp.linalg.norm(found.output, axis=-1).sum()

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(*x):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "jax_nn"])
def test_a_bias_of_minus_infinity_hides(implementation):
    q, k, v = arrays(3, 3, d=4)
    bias = jnp.zeros((3, 3)).at[1].set(-jnp.inf)
    output = attention(
        q, k, v, modifiers=[modifiers.bias(bias)], implementation=implementation
    )
    assert (output[:, 1] == 0).all()
    assert jnp.isfinite(output).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_bias_of_the_lowest_float_is_no_hiding(implementation):
    q, k, v = arrays(2, 4)
    bias = jnp.full((2, 4), jnp.finfo(jnp.float32).min)
    output = attention(
        q * 0, k, v, modifiers=[modifiers.bias(bias)], implementation=implementation
    )
    np.testing.assert_allclose(output[:, 0, 0], v.mean(1)[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("t", "implementation"),
    few(
        itertools.product([3, 40], [*IMPLEMENTATIONS, interpreted.NAME]),
        (3, "reference"),
        (3, NATIVE),
        (40, "tiled"),
    ),
)
def test_what_is_no_number_shows(t, implementation, monkeypatch):
    """NaN and infinity show where they are seen, and only there.

    Such a query is never taken for one without visible keys.
    """
    interpreted.register(monkeypatch)
    q, k, v = arrays(t, 40)
    options = {"mask": masks.causal(), "query_offset": 40 - t}
    options["implementation"] = implementation
    at = np.arange(40 - t, 40)[None, :, None]
    none = np.zeros((t, 40), "f")
    added = none.copy()
    added[1, 5] = np.inf
    for arrays_, bias, lost in (
        (
            (q.at[0, 1, 1].set(jnp.nan), k, v),
            none,
            (at == at[0, 1]) & [False, True],
        ),
        ((q, k.at[0, 38].set(jnp.nan), v), none, (at >= 38) & [True, True]),
        ((q, k, v), added, (at == at[0, 1]) & (at >= 5) & [True, True]),
    ):
        found = attention_with_stats(
            *arrays_, modifiers=[modifiers.bias(jnp.asarray(bias))], **options
        )
        assert lost.any() or t == 40
        np.testing.assert_array_equal(jnp.isnan(found.lse[0]), lost[0])
        np.testing.assert_array_equal(jnp.isnan(found.output[0]).all(-1), lost[0])
        np.testing.assert_array_equal(jnp.isnan(found.output[0]).any(-1), lost[0])

    def loss(k):
        return attention(q, k, v, **options).sum()

    assert jnp.isnan(jax.grad(loss)(k.at[0, 38].set(jnp.nan))).any()


@pytest.mark.parametrize(
    ("t", "implementation"),
    [
        *((9, name) for name in ("reference", "tiled", interpreted.NAME)),
        *(pytest.param(t, "native", marks=NATIVE.marks) for t in (2, 9)),
    ],
)
def test_what_modifiers_make_of_hidden_pairs_has_no_gradient(
    t, implementation, monkeypatch
):
    interpreted.register(monkeypatch)
    x = arrays(t, 9)
    visible = np.tri(t, 9, 9 - t, dtype=bool)
    bias = jax.random.normal(jax.random.key(1), (2, t, 9))
    caps = jnp.full((2, 1, 1), 3.0), jnp.full((t, 9), 2.0)

    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def slopes(x, bias, caps):
        added, first, last = modifiers.bias(bias), *map(modifiers.soft_cap, caps)
        given = dict(modifiers=[added, first, modifiers.alibi(2), last])
        given |= dict(mask=masks.causal(), query_offset=9 - t)
        return (attention(*x, **given, implementation=implementation) ** 2).sum()

    wanted = slopes(x, jnp.where(visible, bias, 0), caps)
    for hidden in (jnp.nan, jnp.inf):
        found = slopes(x, jnp.where(visible, bias, hidden), caps)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("mask", [None, masks.lengths(key=np.array([1]))])
def test_nothing_in_nothing_out(lengths, mask):
    x = arrays(*lengths)
    found = attention_with_stats(*x, mask=mask, sinks=jnp.ones(2))
    assert found.output.shape == (1, lengths[0], 2, 3)
    assert (found.output == 0).all()
    assert (found.lse == 1).all()
    gradients = jax.grad(lambda *x: attention(*x, mask=mask).sum(), (0, 1, 2))(*x)
    assert all((g == 0).all() for g in gradients)


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = arrays(4, 4)
    mask = masks.lengths(query=np.array([3]))
    sinks = jnp.full(2, -jnp.inf)
    without = attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(attention(q, k, v, mask=mask, sinks=sinks), without)


@pytest.mark.parametrize("sink", [-np.inf, -200.0, 0.0])
def test_gradients_of_sinks_where_a_query_sees_nothing(sink):
    q, k, v = arrays(4, 4)
    mask = masks.lengths(query=np.array([3]))

    def loss(q, sinks, queries=4):
        found = attention_with_stats(
            q[:, :queries], k, v, mask=mask if queries == 4 else None, sinks=sinks
        )
        lse = found.lse
        return found.output.sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    found = jax.grad(loss, (0, 1))(q, jnp.full(2, sink))
    np.testing.assert_array_equal(found[0][:, 3], 0)
    # The log-sum-exp of a query without visible keys is the sink itself.
    d_q, d_sinks = jax.grad(functools.partial(loss, queries=3), (0, 1))(
        q, jnp.full(2, sink)
    )
    np.testing.assert_allclose(found[0], d_q, atol=1e-6)
    np.testing.assert_allclose(found[1], d_sinks + float(np.isfinite(sink)), atol=1e-6)


def test_keys_that_minus_infinity_hides_are_none_of_the_greatest():
    q, k, v = arrays(4, 4)
    bias = jnp.zeros((4, 4)).at[1, 1:].set(-jnp.inf)
    found = attention_with_stats(q, k, v, modifiers=[modifiers.bias(bias)], top_k=3)
    np.testing.assert_array_equal(found.indices[0, :, 1], [[0, -1, -1]] * 2)
    assert (found.indices[0, :, 0] >= 0).all()


@pytree
class WideProjection(Score):
    """Projects by a float32 matrix, whatever the dtype of the inputs."""

    weight: jax.Array

    def project_query(self, query):
        return query.astype(jnp.float32) @ self.weight

    def project_key(self, key):
        return key.astype(jnp.float32) @ self.weight


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_output_has_the_dtype_of_the_query(implementation):
    x = [a.astype(jnp.bfloat16) for a in arrays(4, 4)]
    score = WideProjection(jnp.eye(4))
    assert (
        attention(*x, score=score, implementation=implementation).dtype == jnp.bfloat16
    )


def test_gradients_pass_by_the_data_of_a_mask():
    q, k, v = arrays(4, 4)

    def loss(q):
        above = masks.predicate(
            lambda t, s, x: x > 0, q[..., 0].swapaxes(1, 2)[..., None]
        )
        return attention(q, k, v, mask=above).sum()

    plain = jax.grad(loss)(q)
    mapped = jax.vmap(jax.grad(loss))(jnp.stack([q, -q]))
    np.testing.assert_allclose(mapped[0], plain, atol=1e-6)


def test_wide_layers_of_a_perceptron_are_never_held_for_all_pairs():
    score = scores.mlp.init(jax.random.key(0), 8, hidden_sizes=(4, 256))
    x = jax.ShapeDtypeStruct((1, 512, 1, 8), jnp.float32)

    def loss(score, q):
        return attention(q, q, q, score=score, implementation="tiled").sum()

    program = jax.jit(jax.grad(loss)).lower(score, x).compile()
    # One float for each pair and hidden unit would take 268 MB.
    assert program.memory_analysis().temp_size_in_bytes < 8e6


def test_a_scale_for_each_head():
    q, k, v = arrays(5, 5, n=4, h=4)
    scale = jnp.array([0.1, 1.0, 2.0, 3.0])
    output = attention(q, k, v, score=scores.scaled_dot(scale=scale))
    for head in range(4):
        one = attention(
            q[:, :, head : head + 1], k, v, score=scores.scaled_dot(scale[head])
        )
        np.testing.assert_allclose(output[:, :, head], one[:, :, 0], atol=1e-6)


def test_numpy_array_on_the_left_of_a_mask():
    array = np.tril(np.ones((4, 4), bool), 1)
    left, right = array & masks.causal(), masks.causal() & array
    np.testing.assert_array_equal(left.to_dense(4), right.to_dense(4))
    with pytest.raises(TypeError, match="None"):
        masks.causal() & None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinities_that_nobody_asked_for_are_not_seen(implementation):
    """A query without visible keys has log-sum-exp -inf and output 0."""
    mask = masks.lengths(*[np.array([0, 2])] * 2)
    x = jnp.ones((2, 4, 2, 8))

    def run(x):
        return attention(x, x, x, mask=mask, implementation=implementation)

    with jax.debug_infs(True):
        assert not np.asarray(run(x))[0].any()
        gradient = jax.grad(lambda x: run(x).sum())(x)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_infinities_that_were_asked_for_are_named():
    mask = masks.lengths(*[np.array([0, 2])] * 2)
    x = jnp.ones((2, 4, 2, 8))
    with jax.debug_infs(True), pytest.raises(FloatingPointError):
        attention_with_stats(x, x, x, mask=mask, implementation="tiled")


@pytree
class Everything(Mask):
    """A user's mask whose blocks are all full."""

    def visible(self, tile, operands):
        return tile.query_positions >= tile.key_positions * 0

    def bounds(self, rows, cols, operands):
        where = np.ones((1, 1, rows.count), bool)
        return cols.every(where), cols.every_complete(where)


def even_sum(t, s):
    return (t + s) % 2 == 0


#: Masks whose plans have no full, no partial or no live block; kernels support only
#: some of them.
EMPTY = {
    "no partial block": masks.predicate(even_sum) | masks.sliding_window(512, 512),
    "no partial block of a chunk": masks.predicate(even_sum) | masks.chunked(1024),
    "own": Everything(),
    "no live block": masks.predicate(even_sum) & ~masks.full(),
    "no anchor": masks.anchor(np.zeros((0,), np.int32), see_all=False),
    "no block": masks.blocks(np.zeros((2, 0), np.int32), 4),
}


@pytest.mark.parametrize(
    ("name", "implementation"), in_turn(EMPTY, ["tiled", NATIVE, None])
)
def test_lists_of_blocks_may_be_empty(name, implementation):
    q, k, v = (np.random.default_rng(i).normal(size=(1, 8, 2, 4)) for i in range(3))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))

    def both(implementation):
        def loss(q, k, v):
            given = dict(mask=EMPTY[name], implementation=implementation)
            output = attention(q, k, v, **given)
            return (output**2).sum(), output

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
        both(implementation),
        both("reference"),
    )


def test_there_may_be_no_heads():
    q, k = np.zeros((1, 3, 0, 4), np.float32), np.zeros((1, 5, 1, 4), np.float32)
    assert attention(q, k, k).shape == (1, 3, 0, 4)
