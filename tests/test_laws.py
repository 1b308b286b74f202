"""The laws of the design (attnlab/README.md), in order.

Law 1 is tested in ``test_conformance.py``, law 17 in ``test_not_finite.py``.
"""

import functools
import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnlab import (
    attention,
    attention_with_stats,
    explain,
    masks,
    modifiers,
    scores,
)
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.tile import kept
from attnlab._src.ops import prepare
from attnlab._src.ops.primitive import attention_p, compute
from tests.conftest import forget, verb
from tests.grid import NATIVE, few, in_turn
from tests.implementations import interpreted

B, T, S, N, K, H, D = 2, 17, 13, 6, 3, 7, 5
BOTH = ("reference", "tiled", NATIVE)
SLOW = pytest.mark.slow
GENERATORS = ("threefry2x32", "rbg", "unsafe_rbg")


def arrays(seed=0, *, t=T, s=S, n=N, k=K, d=D, b=B):
    rng = np.random.default_rng(seed)
    shapes = (b, t, n, H), (b, s, k, H), (b, s, k, d)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def like(x, seed=1):
    return np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)


def with_gradients(**options):
    """Jitted: (differentiated, other arguments) -> (output, lse), all gradients."""

    def run(data, traced):
        def forward(data):
            return attention_with_stats(**data, **traced, **options)[:2]

        results, pull = jax.vjp(forward, data)
        return results, pull(tuple(like(x, i) for i, x in enumerate(results)))[0]

    return jax.jit(run)


def close(found, wanted, factor=1.0):
    """Equal up to float32 rounding of sums of some dozen terms."""

    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        hidden = np.isneginf(y)
        assert (np.isneginf(x) == hidden).all()
        x, y = np.where(hidden, 0, x), np.where(hidden, 0, y)
        bound = factor * 64 * np.finfo(np.float32).eps * (1 + np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound)

    jax.tree.map(one, found, wanted)


# Law 2: a query that may attend to nothing.


def _empty_rows(name):
    if name == "dense":
        array = np.random.default_rng(0).random((B, N, T, S)) < 0.3
        array[:, :, [0, 7, T - 1]] = False
        array[1, 2] = False
        return array
    return dict(
        window=masks.sliding_window(2, 0),
        documents=masks.documents(
            np.tile(np.repeat([0, -1, 1], [5, 6, T - 11]), (B, 1)),
            np.tile(np.repeat([0, 2], [6, S - 6]), (B, 1)),
        ),
        nothing=~masks.full(),
    )[name]


@pytest.mark.parametrize(
    ("name", "implementation"),
    in_turn(["window", "dense", "documents", "nothing"], BOTH),
)
def test_2_empty_rows(name, implementation, tile):
    tile(8, 4)
    mask = _empty_rows(name)
    q, k, v = arrays()
    visible = dense_of(masks.as_mask(mask), T, S)
    visible = np.broadcast_to(visible, (B, N, T, S))
    empty = ~visible.any(-1).swapaxes(1, 2)
    assert empty.any()
    sinks = like(np.zeros(N), 3)
    run = with_gradients(implementation=implementation)
    (output, lse), gradients = run(dict(query=q, key=k, value=v), dict(mask=mask))
    assert (np.asarray(output)[empty] == 0).all()
    assert (np.asarray(lse)[empty] == -np.inf).all()
    assert np.isfinite(np.asarray(lse)[~empty]).all()
    assert (np.asarray(gradients["query"])[empty] == 0).all()
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()

    data = dict(query=q, key=k, value=v, sinks=sinks)
    (output, lse), gradients = run(data, dict(mask=mask))
    assert (np.asarray(output)[empty] == 0).all()
    np.testing.assert_array_equal(
        np.asarray(lse)[empty], np.broadcast_to(sinks, empty.shape)[empty]
    )
    assert (np.asarray(gradients["query"])[empty] == 0).all()
    for gradient in gradients.values():
        assert np.isfinite(gradient).all()
    if name == "nothing":
        # lse is the sink alone.
        np.testing.assert_allclose(
            gradients["sinks"], like(lse, 1).sum((0, 1)), rtol=1e-5, atol=1e-5
        )


def test_2_empty_rows_of_the_adapter():
    q, k, v = arrays(d=H)
    array = _empty_rows("dense")

    def loss(q, k, v):
        output = attention(q, k, v, mask=array, implementation="jax_nn")
        return (output * like(output)).sum(), output

    gradients, output = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    empty = ~array.any(-1).swapaxes(1, 2)
    assert (np.asarray(output)[empty] == 0).all()
    assert (np.asarray(gradients[0])[empty] == 0).all()


# Law 3: what a mask hides from every query does not exist.


def _poison_case(name):
    """(T, S), the mask, and further options of the call."""
    rng = np.random.default_rng(4)
    if name == "padding":
        own = masks.lengths(query=np.array([9, T]), key=np.array([5, 11]))
        return (T, S), own, {}
    if name == "documents":
        ids = np.sort(rng.integers(-2, 3, (B, T)))
        return (T, T), masks.documents(ids), {}
    if name == "documents of two":
        ids = np.sort(rng.integers(-1, 5, (2, B, T)))
        return (T, T), masks.documents(*ids), {}
    if name == "either":
        ids = np.sort(rng.integers(-2, 3, (B, T)))
        return (T, T), masks.documents(ids) | masks.prefix(1), {}
    if name == "causal":
        return (5, S), masks.causal(), {}
    if name == "window":
        return (T, S), masks.sliding_window(1, 0) & ~masks.anchor([3]), {}
    if name == "cache":
        positions = np.where(rng.random((B, S)) < 0.4, -1, np.arange(S))
        return (3, S), masks.causal(), dict(query_offset=8, key_positions=positions)
    if name == "slots":
        positions = np.where(np.arange(T) % 4 == 1, -1, np.arange(T))
        return (T, S), None, dict(query_positions=positions)
    if name == "heads":
        half = [masks.lengths(key=np.array([4, 7]))] * 2
        kinds = [*half, masks.causal(), masks.sliding_window(0, 0), ~masks.full()]
        return (T, S), masks.per_head([*kinds, masks.prefix(2)]), {}
    assert name == "dense"
    array = rng.random((B, N, T, S)) < 0.5
    array[0, :, 4] = array[1, :, :, 6] = array[0, 2:4, :, 3] = False
    return (T, S), masks.dense(array), {}


def dense_of(mask, t, s):
    return np.asarray(jax.jit(lambda mask: mask.to_dense(t, s))(mask))


def _dead(mask, t, s, options):
    """Boolean ``[B, T, N]`` and ``[B, S, K]``: dead queries and dead keys."""
    queries, keys = np.arange(t) + options.get("query_offset", 0), np.arange(s)
    queries = np.broadcast_to(options.get("query_positions", queries), (B, t))
    keys = np.broadcast_to(options.get("key_positions", keys), (B, s))
    if options:  # structural masks only: index a larger dense mask by position
        dense = dense_of(masks.as_mask(mask), 32, 32)
        visible = dense[queries[:, :, None], keys[:, None, :]][:, None]
    else:
        visible = dense_of(masks.as_mask(mask), t, s)
    occupied = (queries >= 0)[:, None, :, None] & (keys >= 0)[:, None, None, :]
    visible = np.broadcast_to(visible & occupied, (B, N, t, s))
    dead_q = ~visible.any(3).swapaxes(1, 2)
    dead_k = ~visible.reshape(B, K, N // K, t, s).any((2, 3)).swapaxes(1, 2)
    return dead_q, dead_k


POISON_SCORES = {
    "default": lambda r: scores.scaled_dot(),
    "scaled_dot": lambda r: scores.scaled_dot(np.float32(0.4)),
    "bilinear": lambda r: scores.bilinear.init(r, H, num_heads=N),
    "additive": lambda r: scores.additive.init(
        r, H, hidden_size=5, num_heads=N, num_key_heads=K
    ),
    "cosine": lambda r: scores.cosine.init(r, num_heads=N),
    "mlp": lambda r: scores.mlp.init(
        r, H, hidden_sizes=(5,), num_heads=N, num_key_heads=K
    ),
}

POISON = [
    "padding",
    "documents",
    "documents of two",
    "either",
    "causal",
    "window",
    "cache",
    "slots",
    "heads",
    "dense",
]
#: Every case, alternately with a score that has parameters and with one that has none.
TURNS = [(case, ("additive", "default")[i % 2]) for i, case in enumerate(POISON)]
POISON_CELLS = few(
    [
        *itertools.product(POISON, ("additive", "default"), ("tiled", NATIVE)),
        *(("padding", score, "tiled") for score in [*POISON_SCORES][1:3]),
        *(("padding", score, "tiled") for score in [*POISON_SCORES][4:]),
        *itertools.product(["cache"], ["scaled_dot"], ["tiled", NATIVE]),
        *itertools.product(["heads"], ["bilinear"], BOTH),
        ("heads", "default", "reference"),
        ("padding", "additive", "reference"),
        ("cache", "cosine", "reference"),
    ],
    *((*turn, NATIVE) for turn in TURNS),
    *((*turn, "tiled") for turn in TURNS if turn[0] == "padding"),
    ("heads", "default", "reference"),
    ("cache", "cosine", "reference"),
)


@pytest.mark.parametrize(("case", "score", "implementation"), POISON_CELLS)
def test_3_poison_in_hidden_slots(case, score, implementation, tile):
    tile(8, 4)
    (t, s), mask, options = _poison_case(case)
    q, k, v = arrays(t=t, s=s)
    dead_q, dead_k = _dead(mask, t, s, options)
    assert dead_q.any() or dead_k.any()
    assert not (dead_q.all() and dead_k.all())
    run = with_gradients(implementation=implementation)
    made = POISON_SCORES[score](jax.random.key(0))

    def results(poison):
        def fill(x, dead):
            return np.where(dead[..., None], np.float32(poison), x)

        data = dict(
            query=fill(q, dead_q),
            key=fill(k, dead_k),
            value=fill(v, dead_k),
            score=made,
        )
        return jax.tree.map(np.asarray, run(data, dict(mask=mask, **options)))

    clean = results(0.5)
    for name, dead in (("query", dead_q), ("key", dead_k), ("value", dead_k)):
        assert (clean[1][name][dead] == 0).all()
        assert (clean[1][name][~dead] != 0).any()
    for poison in (np.nan, np.inf, -np.inf):
        jax.tree.map(np.testing.assert_array_equal, results(poison), clean)


# Law 4: masks and modifiers speak in positions.

POSITIONAL = dict(
    causal=(masks.causal(), ()),
    window=(masks.sliding_window(3, 1) | masks.anchor([2, 9]), (modifiers.alibi(N),)),
    drawn=(
        masks.random_blocks(0, 2, 3, 8) | masks.chunked(4),
        (modifiers.relative_bias(like(np.zeros((N, 8))), max_distance=9),),
    ),
)


#: Names and implementations in turn, and the cells that tests/mutants names.
SOME_POSITIONAL = few(
    itertools.product(POSITIONAL, BOTH),
    ("causal", "reference"),
    ("window", "tiled"),
)


def _call(q, k, v, mask, own, **options):
    return attention_with_stats(q, k, v, mask=mask, modifiers=own, **options)[:2]


@pytest.mark.parametrize(("name", "implementation"), SOME_POSITIONAL)
def test_4_offsets_select_rows(name, implementation, tile):
    tile(4, 3)
    q, k, v = arrays()
    call = jax.jit(
        functools.partial(_call, mask=POSITIONAL[name][0], own=POSITIONAL[name][1]),
        static_argnames="implementation",
    )
    call = functools.partial(call, implementation=implementation)
    whole = call(q, k, v)
    some = q[:, 5:12]
    rows = jax.tree.map(lambda x: x[:, 5:12], whole)
    close(call(some, k, v, query_offset=5), rows)
    close(call(some, k, v, query_offset=jnp.int32(5)), rows)
    close(call(some, k, v, query_positions=np.arange(5, 12)), rows)
    # Another offset for each example.
    offsets = np.array([5, 2])
    mixed = np.stack([q[b, o : o + 7] for b, o in enumerate(offsets)])
    rows = jax.tree.map(
        lambda x: np.stack([x[b, o : o + 7] for b, o in enumerate(offsets)]), whole
    )
    close(call(mixed, k, v, query_offset=offsets), rows)
    positions = offsets[:, None] + np.arange(7)
    close(call(mixed, k, v, query_positions=positions), rows)


@pytest.mark.parametrize(("name", "implementation"), SOME_POSITIONAL)
def test_4_permuted_keys(name, implementation, tile):
    tile(4, 3)
    q, k, v = arrays()
    mask, own = POSITIONAL[name]
    call = functools.partial(_call, mask=mask, own=own, implementation=implementation)
    rng = np.random.default_rng(2)
    order = np.stack([rng.permutation(S) for _ in range(B)])
    moved = [np.take_along_axis(x, order[..., None, None], 1) for x in (k, v)]
    found = call(q, *moved, key_positions=order)
    wanted = call(q, k, v)
    close(found, wanted)
    # Without key_positions the result differs.
    other = call(q, *moved)
    assert np.abs(other[0] - wanted[0]).max() > 0.1


@pytest.mark.parametrize("implementation", few(BOTH, "tiled", NATIVE))
def test_4_empty_slots_are_hidden_from_all(implementation, tile):
    tile(4, 3)
    q, k, v = arrays()
    kept_slots = np.array([0, 1, 2, 4, 7, 8, 12])
    positions = np.full(S, -1)
    positions[kept_slots] = kept_slots
    for mask in (None, masks.causal(), ~masks.sliding_window(1, 1)):
        call = functools.partial(
            _call, mask=mask, own=(), implementation=implementation
        )
        found = call(q, k, v, key_positions=positions)
        wanted = call(q, k[:, kept_slots], v[:, kept_slots], key_positions=kept_slots)
        close(found, wanted)


@pytest.mark.parametrize(
    "implementation", few([*BOTH, interpreted.NAME], "tiled", NATIVE)
)
def test_4_positions_may_be_as_far_as_32_bits_go(implementation, tile, monkeypatch):
    tile(4, 3)
    interpreted.register(monkeypatch)
    most = 2**31 - 1
    rules = (
        (masks.causal(), lambda t, s: s <= t),
        (masks.sliding_window(5, None), lambda t, s: s >= t - 5),
        (masks.sliding_window(2**29, 0), lambda t, s: (t - 2**29 <= s) & (s <= t)),
        (
            masks.dilated_window(9, most - 1, 3),
            lambda t, s: (s >= t - 9) & ((s - t) % 3 == 0),
        ),
        (masks.chunked(2**30), lambda t, s: s // 2**30 == t // 2**30),
        (
            masks.anchor(np.array([3, 1_700_000_003, most])),
            lambda t, s: np.isin([t, s], [3, 1_700_000_003, most]).any(0),
        ),
    )
    mask = masks.per_head([mask for mask, _ in rules])
    q, k, v = arrays(b=1, s=T)
    call = jax.jit(
        lambda mask, **positions: _call(
            q, k, v, mask, (), implementation=implementation, **positions
        )
    )
    exact = jax.jit(lambda mask: _call(q, k, v, mask, (), implementation="reference"))
    for first in (2**30 - 6, 1_700_000_000, most - T + 1):
        places = first + np.arange(T)
        keys = places[::-1].copy()
        keys[4:7] = 0, 3, -1
        pairs = np.meshgrid(places, keys, indexing="ij")
        wanted = np.stack([rule(*pairs) for _, rule in rules]) & (keys >= 0)
        found = call(mask, query_offset=first, key_positions=keys)
        close(found, exact(wanted[None]))


# Law 5: a window is two inclusive offsets.


@pytest.mark.parametrize("left", [None, 0, 1, 4])
@pytest.mark.parametrize("right", [None, 0, 1, 30])
def test_5_window_bounds_are_inclusive(left, right):
    visible = np.asarray(masks.sliding_window(left, right).to_dense(7, 9))
    for t, s in itertools.product(range(7), range(9)):
        wanted = (left is None or s - t >= -left) and (right is None or s - t <= right)
        assert visible[t, s] == wanted


# Law 6: types and precision.


@pytest.mark.parametrize("implementation", BOTH)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_6_accumulation_is_float32(dtype, implementation):
    # 2048 equal keys: a sum in the narrow type would stop growing at 256 (or 2048).
    count = 4097
    q, k = jnp.zeros((1, 1, 1, 1), dtype), jnp.zeros((1, count, 1, 1), dtype)
    v = jnp.ones((1, count, 1, 1), dtype)
    result = attention_with_stats(q, k, v, implementation=implementation)
    assert result.output.dtype == dtype
    assert result.lse.dtype == jnp.float32
    np.testing.assert_allclose(result.output, 1, rtol=float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(result.lse, np.log(count), rtol=1e-6)


@pytest.mark.parametrize("implementation", BOTH[:2])
def test_6_precision_is_honoured(implementation):
    q, k, v = arrays()
    call = functools.partial(attention, implementation=implementation)

    def program(function=call, **options):
        return jax.jit(functools.partial(function, **options)).lower(q, k, v).as_text()

    def inside(q, k, v):
        with jax.default_matmul_precision("highest"):
            return call(q, k, v).sum()

    with jax.default_matmul_precision("default"):
        assert "HIGHEST" not in program()
        assert "HIGHEST" in program(precision="highest")
        assert "DEFAULT" in program()
        assert "DEFAULT" not in program(inside) + program(jax.grad(inside))
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in program()


@pytest.mark.parametrize("implementation", BOTH[:2])
@pytest.mark.parametrize("name", ["bilinear", "additive", "mlp"])
def test_6_precision_reaches_the_products_of_scores(name, implementation):
    q, k, v = arrays()
    size = q.shape[-1]
    rng = jax.random.key(0)
    score = {
        "bilinear": lambda: scores.bilinear.init(rng, size),
        "additive": lambda: scores.additive.init(rng, size, hidden_size=4),
        "mlp": lambda: scores.mlp.init(rng, size, hidden_sizes=(4, 3)),
    }[name]()

    def loss(score, q, precision):
        return attention(
            q, k, v, score=score, precision=precision, implementation=implementation
        ).sum()

    for precision, other in (("highest", "DEFAULT"), ("default", "HIGHEST")):
        with jax.default_matmul_precision(other.lower()):
            gradient = jax.grad(functools.partial(loss, precision=precision), (0, 1))
            text = jax.jit(gradient).lower(score, q).as_text()
            assert other not in text


# Law 7: dropout is a pure function of (rng, example, head, positions).

RATE = 0.3


def _dropped(q, k, v, implementation="tiled", **options):
    return attention(
        q,
        k,
        v,
        dropout_rate=RATE,
        dropout_rng=jax.random.key(7),
        implementation=implementation,
        **options,
    )


@pytest.mark.parametrize("sizes", [(8, 4), pytest.param((5, 3), marks=SLOW), (64, 64)])
def test_7_dropout_does_not_depend_on_tiles(sizes, tile):
    q, k, v = arrays()
    wanted = _dropped(q, k, v, "reference")
    plain = attention(q, k, v)
    assert np.abs(wanted - plain).max() > 0.1
    tile(*sizes)
    close(_dropped(q, k, v), wanted)
    mask = masks.sliding_window(5, 2)
    close(_dropped(q, k, v, mask=mask), _dropped(q, k, v, "reference", mask=mask))


@pytest.mark.parametrize("implementation", few(BOTH, "tiled", NATIVE))
def test_7_dropout_follows_positions(implementation):
    q, k, v = arrays()
    whole = _dropped(q, k, v, implementation)
    close(_dropped(q[:, 5:], k, v, implementation, query_offset=5), whole[:, 5:])
    order = np.random.default_rng(0).permutation(S)
    moved = _dropped(q, k[:, order], v[:, order], implementation, key_positions=order)
    close(moved, whole)
    later = _dropped(q, k, v, implementation, query_offset=1)
    assert np.abs(later - whole).max() > 0.1


def test_7_dropout_rate_and_independence():
    q, k, v = arrays(t=64, s=64)
    q = q * 0
    result = attention_with_stats(
        q, k, v, dropout_rate=RATE, dropout_rng=jax.random.key(1), top_k="all"
    )
    weights = np.asarray(result.weights)
    survives = weights > 0
    deviation = np.sqrt(RATE * (1 - RATE) / survives.size)
    assert abs(survives.mean() - (1 - RATE)) < 4 * deviation
    np.testing.assert_allclose(weights[survives], 1 / 64 / (1 - RATE), rtol=1e-5)
    # Every row, column, example and head has its own pattern, and two of them agree
    # only as often as random ones.
    flat = survives.reshape(B * N, -1)
    agreement = (1 - RATE) ** 2 + RATE**2
    for a, b in itertools.combinations(range(B * N), 2):
        assert abs((flat[a] == flat[b]).mean() - agreement) < 0.05
    per_row, per_column = survives.mean(-1), survives.mean(-2)
    spread = np.sqrt(RATE * (1 - RATE) / 64)
    for means in (per_row, per_column):
        assert 0.7 * spread < means.std() < 1.3 * spread
    other = attention_with_stats(
        q, k, v, dropout_rate=RATE, dropout_rng=jax.random.key(2), top_k="all"
    )
    assert (np.asarray(other.weights > 0) != survives).any()


@pytest.mark.parametrize("implementation", BOTH)
def test_7_output_is_weights_times_value(implementation):
    q, k, v = arrays()
    result = attention_with_stats(
        q,
        k,
        v,
        mask=masks.causal(),
        sinks=like(np.zeros(N)),
        dropout_rate=RATE,
        dropout_rng=jax.random.key(1),
        top_k="all",
        implementation=implementation,
    )
    wide = np.repeat(v, N // K, 2)
    close(result.output, np.einsum("bnts,bsnd->btnd", result.weights, wide))


@pytest.mark.parametrize("generator", GENERATORS)
def test_7_another_key_of_any_generator_is_another_pattern(generator):
    class Inputs:
        dropout_rate = RATE

    t, s = 48, 40
    places = jnp.arange(t)[None, None, :, None], jnp.arange(s)[None, None, None]

    @jax.jit
    def pattern(rng):
        rows, columns = prepare._dropout_words(rng, 2, 2, *places)
        return kept(Inputs, (rows, columns)).reshape(4, t * s)

    first = jax.random.key(0, impl=generator)
    keys = [first, jax.random.key(1, impl=generator), *jax.random.split(first)]
    keys += [jax.random.fold_in(first, n) for n in (7, 8)]
    patterns = np.concatenate([pattern(rng) for rng in keys])
    spread = np.sqrt(RATE * (1 - RATE) / (t * s))
    assert (np.abs(patterns.mean(1) - (1 - RATE)) < 5 * spread).all()
    by_row = patterns.reshape(-1, t, s)
    for axis, count in ((1, t), (2, s)):
        deviation = by_row.mean(axis).std() / np.sqrt(RATE * (1 - RATE) / count)
        assert 0.8 < deviation < 1.2
    # Any two agree only as often as random ones.
    agreement = (1 - RATE) ** 2 + RATE**2
    for a, b in itertools.combinations(patterns, 2):
        assert abs((a == b).mean() - agreement) < 0.07


def test_7_the_mixing_function():
    rows = np.array([[0], [1], [0xDEADBEEF], [2**32 - 1]], np.uint32)
    cols = np.array([[0, 1, 0x12345678]], np.uint32)

    class Inputs:
        dropout_rate = 0.25

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    wanted = [[mix(int(r) ^ int(c)) >> 8 >= 2**22 for c in cols[0]] for r in rows[:, 0]]
    found = kept(Inputs, (jnp.asarray(rows), jnp.asarray(cols)))
    np.testing.assert_array_equal(found, wanted)


# Law 8: a random pattern is a pure function of its rng and a number of blocks.


@pytest.mark.parametrize("generator", GENERATORS)
def test_8_any_generator(generator):
    def drawn(rng):
        return masks.random_blocks(rng, 2, 4, 10).rows

    keys = jax.random.split(jax.random.key(0, impl=generator), 3)
    one_by_one = np.stack([drawn(rng) for rng in keys])
    assert not (one_by_one[1:] == one_by_one[:-1]).all((1, 2)).any()
    np.testing.assert_array_equal(jax.vmap(drawn)(keys), one_by_one)


def test_8_a_prefix_stays_a_prefix():
    mask = masks.random_blocks(jax.random.key(3), 2, 4, 10)
    long = np.asarray(mask.to_dense(40))[0, 0]
    for length in (1, 7, 20, 39):
        short = np.asarray(jax.jit(lambda m, n=length: m.to_dense(n))(mask))[0, 0]
        np.testing.assert_array_equal(short, long[:length, :length])
    # Each block of queries sees exactly two blocks, each block is seen by two.
    coarse = long[::4, ::4]
    assert (coarse.sum(0) == 2).all()
    assert (coarse.sum(1) == 2).all()


def test_8_resampling_does_not_trace_again():
    q, k, v = arrays(t=20, s=20)
    traces = []

    @jax.jit
    def call(rng):
        traces.append(1)
        return attention(q, k, v, mask=masks.random_blocks(rng, 2, 4, 5))

    results = [np.asarray(call(jax.random.key(seed))) for seed in range(4)]
    assert len(traces) == 1
    for a, b in itertools.combinations(results, 2):
        assert np.abs(a - b).max() > 1e-3
    drawn = masks.random_blocks(jax.random.key(2), 2, 4, 5)
    wanted = attention(q, k, v, mask=drawn.to_dense(20), implementation="reference")
    close(results[2], wanted)


@pytest.fixture
def traced(monkeypatch):
    """A list that grows by one whenever ``attention`` is traced."""
    found = []
    prepare = verb().prepare

    def counting(*args, **options):
        found.append(None)
        return prepare(*args, **options)

    forget()
    monkeypatch.setattr(verb(), "prepare", counting)
    yield found
    forget()


# Law 9: structure is static, data is traced.


def _data_of(name, seed):
    rng = np.random.default_rng(seed)
    return dict(
        lengths=lambda: dict(
            mask=masks.lengths(query=rng.integers(1, T, B), key=rng.integers(1, S, B))
        ),
        documents=lambda: dict(
            mask=masks.causal()
            & masks.documents(
                np.sort(rng.integers(0, 4, (B, T))), np.sort(rng.integers(0, 4, (B, S)))
            )
        ),
        random=lambda: dict(
            mask=masks.big_bird(
                window=1,
                anchors=rng.integers(0, S, 2),
                random_blocks=1,
                rng=jax.random.key(seed),
                block_size=4,
                num_blocks=5,
            )
        ),
        dense=lambda: dict(mask=rng.random((T, S)) < 0.5),
        blocks=lambda: dict(mask=masks.blocks(rng.integers(-1, 3, (5, 2)), 4)),
        offset=lambda: dict(mask=masks.causal(), query_offset=seed + 1),
        offsets=lambda: dict(mask=masks.causal(), query_offset=rng.integers(0, 9, B)),
        positions=lambda: dict(
            mask=masks.causal(), key_positions=rng.permutation(S).astype(np.int32)
        ),
        dropout=lambda: dict(dropout_rate=0.5, dropout_rng=jax.random.key(seed)),
        parameters=lambda: dict(
            score=scores.cosine(rng.random(N).astype("f") * 9),
            modifiers=[modifiers.soft_cap(rng.random((N, 1, 1)).astype("f") + 1)],
            sinks=rng.random(N).astype("f"),
        ),
    )[name]()


@pytest.mark.parametrize(
    "name",
    few(
        [
            *("lengths", "documents", "random", "dense", "blocks", "offset"),
            *("offsets", "positions", "dropout", "parameters"),
        ],
        *("documents", "offsets", "dropout", "parameters"),
    ),
)
def test_9_new_data_never_recompiles(name, traced):
    q, k, v = arrays()
    first = attention(q, k, v, **_data_of(name, 0))
    before = len(traced)
    others = [attention(q, k, v, **_data_of(name, seed)) for seed in (1, 2)]
    assert len(traced) == before
    assert np.abs(others[0] - first).max() > 1e-3
    traces = []

    @jax.jit
    def user(q, options):
        traces.append(1)
        return attention(q, k, v, **options)

    rate = {}
    for seed in range(3):
        options = _data_of(name, seed)
        if "dropout_rate" in options:
            rate = dict(dropout_rate=options.pop("dropout_rate"))
        if "query_offset" in options:
            options["query_offset"] = np.int32(options["query_offset"])
        call = functools.partial(attention, **rate)
        if rate:

            @jax.jit
            def user_dropout(q, options, call=call):
                traces.append(1)
                return call(q, k, v, **options)

            user = user_dropout if seed == 0 else user
        found = user(q, options)
        close(found, first if seed == 0 else others[seed - 1])
    assert len(traces) == 1


def test_9_another_structure_does_recompile(traced):
    """The counter of the other tests notices a recompilation."""
    q, k, v = arrays()
    attention(q, k, v, mask=masks.sliding_window(3, 0))
    before = len(traced)
    attention(q, k, v, mask=masks.sliding_window(4, 0))
    assert len(traced) == before + 1


# Law 10: an explicit implementation never falls back.

REFUSED = {
    "score": (
        dict(score=scores.additive.init(jax.random.key(0), H, hidden_size=3)),
        "sc",
    ),
    "modifier": (dict(modifiers=[modifiers.soft_cap(2.0)]), "modifier"),
    "dropout": (dict(dropout_rate=0.1, dropout_rng=jax.random.key(0)), "dropout"),
    "precision": (dict(precision="highest"), "precision"),
    "sinks": (dict(sinks=np.zeros(N, "f")), "log-sum-exp"),
    "value size": ({}, "head size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_10_a_refusal_gives_its_reason(name):
    options, words = REFUSED[name]
    q, k, v = arrays(d=D if name == "value size" else H)
    with pytest.raises(NotImplementedError, match=words):
        attention(q, k, v, implementation="jax_nn", **options)


def test_10_a_refusal_gives_every_reason():
    q, k, v = arrays()
    options = {}
    for own, _ in REFUSED.values():
        options |= own
    with pytest.raises(NotImplementedError) as caught:
        attention(q, k, v, implementation="jax_nn", **options)
    for _, words in REFUSED.values():
        assert words in str(caught.value)
    with pytest.raises(NotImplementedError, match="log-sum-exp"):
        attention_with_stats(q, k, v, implementation="jax_nn")


def test_10_explain_says_what_runs_and_why_not_the_others(monkeypatch):
    q, k, v = arrays()
    answer = explain(q, k, v, mask=masks.causal(), dropout_rate=0.0)
    chosen = answer.implementation
    assert chosen in {"native", "tiled"}
    assert set(answer.passed_over) == set(IMPLEMENTATIONS) - {chosen}
    assert all(all(reasons) and reasons for reasons in answer.passed_over.values())
    assert "head size" in " ".join(answer.passed_over["jax_nn"])
    assert chosen in str(answer)
    ran = []
    for name, implementation in IMPLEMENTATIONS.items():
        forward = type(implementation).forward

        def spy(self, inputs, name=name, forward=forward):
            ran.append(name)
            return forward(self, inputs)

        monkeypatch.setattr(type(implementation), "forward", spy)
    forget()
    attention(q, k, v, mask=masks.causal())
    assert set(ran) == {answer.implementation}
    for name in ("reference", "tiled"):
        ran.clear()
        forget()
        attention(q, k, v, mask=masks.causal(), implementation=name)
        assert set(ran) == {name}
    ran.clear()
    attention(q, k, np.repeat(v, 7, -1)[..., :H], implementation="jax_nn")
    assert set(ran) == {"jax_nn"}
    forget()


# Law 11: plans. See also tests/masks/test_planning.py.


def test_11_a_predicate_never_refines():
    window = masks.sliding_window(3, 3)
    alone = window.plan(64, 64, block_size=4)
    both = (window & masks.predicate(lambda t, s: (t + s) % 2 == 0)).plan(
        64, 64, block_size=4
    )
    for one, other in ((alone.rows, both.rows), (alone.cols, both.cols)):
        np.testing.assert_array_equal(other.full.per_row(), 0)
        np.testing.assert_array_equal(
            other.partial.per_row(), one.partial.per_row() + one.full.per_row()
        )


@pytest.mark.slow
def test_11_capacity_of_traced_plans():
    """The number of intervals in a row does not depend on the length."""

    def capacities(make, length):
        mask = make(length)
        plan = jax.jit(lambda m: m.plan(length, length, block_size=4))(mask)
        assert plan.rows.partial.lo.shape[2] == length // 4
        return [x.lo.shape[-1] for live in (plan.rows, plan.cols) for x in live]

    for make in (
        lambda n: masks.documents(np.repeat(np.arange(4), n // 4)),
        lambda n: masks.lengths(key=np.array([30, n])),
        lambda n: masks.random_blocks(0, 3, 4, n // 4),
        lambda n: masks.anchor(np.array([3, 9])),
    ):
        short, long = capacities(make, 64), capacities(make, 256)
        assert short == long
        assert max(long) < 16


# Law 12: transforms.

VMAP_PARTS = ("query", "key", "value", "ids", "bias")
VMAP_COMBINATIONS = [
    ("query",),
    ("key",),
    ("value",),
    ("ids",),
    ("bias",),
    ("query", "ids"),
    ("key", "value", "bias"),
    VMAP_PARTS,
]
VMAP_SHORT = [("key",), ("bias",), VMAP_PARTS]


def _everything(query, key, value, ids, bias):
    return attention_with_stats(
        query,
        key,
        value,
        mask=masks.causal() & masks.documents(ids),
        modifiers=[modifiers.bias(bias)],
        implementation="tiled",
    )[:2]


def _loss(floats, ids):
    output, lse = _everything(ids=ids, **floats)
    total = (output * like(output)).sum()
    return total + jnp.where(jnp.isfinite(lse), lse * like(lse, 2), 0).sum()


def _vmap_data(mapped, count=3):
    rng = np.random.default_rng(0)
    shapes = dict(
        query=(B, S, N, H), key=(B, S, K, H), value=(B, S, K, D), bias=(1, N, S, S)
    )
    data = {
        name: rng.normal(size=((count,) if name in mapped else ()) + shape).astype("f")
        for name, shape in shapes.items()
    }
    shape = ((count,) if "ids" in mapped else ()) + (B, S)
    return data, np.sort(rng.integers(-1, 3, shape), -1)


@pytest.mark.parametrize(
    "mapped",
    [
        pytest.param(mapped, marks=() if mapped in VMAP_SHORT else SLOW)
        for mapped in VMAP_COMBINATIONS
    ],
    ids="+".join,
)
def test_12_vmap_equals_a_loop(mapped, tile):
    tile(4, 4)
    floats, ids = _vmap_data(mapped)
    axes = {name: 0 if name in mapped else None for name in floats}
    axis = 0 if "ids" in mapped else None
    step = jax.value_and_grad(_loss)
    found = jax.jit(jax.vmap(step, (axes, axis)))(floats, ids)
    step = jax.jit(step)
    each = [
        step(
            {n: x[i] if n in mapped else x for n, x in floats.items()},
            ids[i] if "ids" in mapped else ids,
        )
        for i in range(3)
    ]
    close(found, jax.tree.map(lambda *x: np.stack(x), *each), factor=8)


def test_12_grad_of_vmap_is_vmap_of_grad(tile):
    tile(4, 4)
    mapped = ("query", "key", "ids")
    floats, ids = _vmap_data(mapped)
    axes = {name: 0 if name in mapped else None for name in floats}

    def total(floats):
        return jax.vmap(_loss, (axes, 0))(floats, ids).sum()

    found = jax.jit(jax.grad(total))(floats)
    each = jax.jit(jax.vmap(jax.grad(_loss), (axes, 0)))(floats, ids)
    wanted = {n: x if n in mapped else x.sum(0) for n, x in each.items()}
    close(found, wanted, factor=8)


def test_12_nested_vmap_equals_a_loop(tile):
    tile(4, 4)
    floats, ids = _vmap_data(VMAP_PARTS)
    outer = jax.tree.map(lambda x: np.stack([x, x[::-1]]), floats)
    step = jax.vmap(jax.vmap(lambda f, i: _everything(ids=i, **f)), (0, None))
    found = jax.jit(step)(outer, ids)
    call = jax.jit(lambda f, i: _everything(ids=i, **f))
    wanted = [
        [
            call(jax.tree.map(lambda x, at=(a, b): x[at], outer), ids[b])
            for b in range(3)
        ]
        for a in range(2)
    ]
    stack = lambda rows: jax.tree.map(lambda *x: np.stack(x), *rows)
    close(found, stack([stack(row) for row in wanted]), factor=8)


def _subjaxprs(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive is attention_p:
            static = {n: equation.params[n] for n in ("wanted", "structure")}
            call = functools.partial(compute, name="tiled", **static)
            avals = [v.aval for v in equation.invars]
            inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
            yield from _subjaxprs(jax.make_jaxpr(call)(*inputs).jaxpr)
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _subjaxprs(inner)


def _mapped_bounds(jaxpr):
    """For each loop of a jaxpr, whether its bound depends on a mapped axis."""
    loops = [e for e in _subjaxprs(jaxpr.jaxpr) if e.primitive.name == "while"]
    return [e.params["cond_jaxpr"].out_avals[0].shape != () for e in loops]


def test_12_a_mapped_bound_is_noticed():
    count = lambda n: lax.fori_loop(0, n, lambda i, x: x + i, 0)
    assert _mapped_bounds(jax.make_jaxpr(jax.vmap(count))(jnp.arange(3))) == [True]


@pytest.mark.parametrize("gradient", [False, True])
def test_12_skipping_is_alive_under_vmap(gradient, tile):
    """No loop bound is mapped: all examples would run as long as the longest."""
    tile(4, 4)
    floats, ids = _vmap_data(VMAP_PARTS)
    fn = jax.grad(_loss) if gradient else _loss
    mapped = _mapped_bounds(jax.make_jaxpr(jax.vmap(fn))(floats, ids))
    assert mapped
    assert not any(mapped)


@pytest.mark.parametrize("implementation", BOTH)
def test_12_remat_equals_plain(implementation):
    q, k, v = arrays(t=S)
    policy = jax.checkpoint_policies.save_only_these_names(
        "attnlab_output", "attnlab_lse"
    )
    bias = like(np.zeros((N, S, S)))
    ids = np.sort(np.random.default_rng(0).integers(0, 3, S))

    def loss(q, k, v, bias, ids):
        mask = masks.documents(ids) & masks.causal()
        own = [modifiers.bias(bias)]
        result = attention_with_stats(
            q * 2, k, v, mask=mask, modifiers=own, implementation=implementation
        )
        return (result.output**2).sum() + jnp.sin(result.lse).sum()

    wanted = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias, ids)
    for chosen in (None, policy):
        again = jax.checkpoint(loss, policy=chosen)
        found = jax.jit(jax.grad(again, (0, 1, 2, 3)))(q, k, v, bias, ids)
        close(found, wanted, factor=8)


def test_12_named_residuals_spare_the_second_forward():
    q, k, v = arrays(t=S)
    names = jax.checkpoint_policies.save_only_these_names(
        "attnlab_output", "attnlab_lse"
    )

    def loops(policy):
        def loss(q):
            return (attention(q, k, v, implementation="tiled") ** 2).sum()

        again = jax.checkpoint(loss, policy=policy)
        compiled = jax.jit(jax.value_and_grad(again)).lower(q).compile()
        return compiled.as_text().count(" while(")

    assert loops(names) < loops(None)


def test_12_scan_equals_a_loop():
    q, k, v = arrays(t=S, k=N, d=H)
    weights = like(np.zeros((3, H, H)))
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, S)))

    def layer(x, weight):
        mask = masks.documents(ids) & masks.sliding_window(4, 4)
        return x + attention(x @ weight, x, x, mask=mask, implementation="tiled")

    def scanned(weights):
        x, _ = lax.scan(lambda x, w: (layer(x, w), None), q, weights)
        return (x * like(x)).sum()

    def looped(weights):
        x = q
        for weight in weights:
            x = layer(x, weight)
        return (x * like(x)).sum()

    found = jax.jit(jax.value_and_grad(scanned))(weights)
    close(found, jax.jit(jax.value_and_grad(looped))(weights), factor=64)


def _mesh(count, *names):
    shape = (count,) if len(names) == 1 else (count // 2, 2)
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), names)


@pytest.mark.parametrize(
    ("axis", "implementation"), in_turn(["queries", "batch", "heads"], BOTH)
)
def test_12_shard_map(axis, implementation):
    t = 16
    q, k, v = arrays(t=t, s=t, n=4, k=2)
    score = scores.additive.init(jax.random.key(0), H, hidden_size=5)
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, t)))
    spec = dict(batch=Spec("x"), heads=Spec(None, None, "x"), queries=Spec(None, "x"))
    key_spec = Spec() if axis == "queries" else spec[axis]
    id_spec = Spec("x") if axis == "batch" else Spec()

    def local(q, k, v, score, ids):
        offset = 0
        query_ids = ids
        if axis == "queries":
            offset = lax.axis_index("x") * q.shape[1]
            query_ids = lax.dynamic_slice_in_dim(ids, offset, q.shape[1], 1)
        mask = masks.causal() & masks.documents(query_ids, ids)
        return attention_with_stats(
            q,
            k,
            v,
            score=score,
            mask=mask,
            query_offset=offset,
            implementation=implementation,
        )[:2]

    sharded = jax.shard_map(
        local,
        mesh=_mesh(2, "x"),
        in_specs=(spec[axis], key_spec, key_spec, Spec(), id_spec),
        out_specs=spec[axis],
        check_vma=True,
    )

    def whole(q, k, v, score, ids):
        mask = masks.causal() & masks.documents(ids)
        return attention_with_stats(
            q, k, v, score=score, mask=mask, implementation=implementation
        )[:2]

    def loss(fn, q, k, v, score):
        output, lse = fn(q, k, v, score, ids)
        return (output * like(output)).sum() + (lse * like(lse)).sum()

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, fn), (0, 1, 2, 3)))(
            q, k, v, score
        )
        for fn in (sharded, whole)
    ]
    close(*results, factor=16)


@pytest.mark.parametrize(
    ("axis", "implementation"), in_turn(["batch", "heads", "queries"], BOTH)
)
def test_12_explicit_axes(axis, implementation):
    """With explicit mesh axes, results are sharded like the queries."""
    q, k, v = arrays(t=16, s=16, n=4, k=2)
    spec = dict(batch=Spec("x"), heads=Spec(None, None, "x"), queries=Spec(None, "x"))
    lengths = np.array([3, 16])

    def loss(q, k, v, lengths):
        result = attention_with_stats(
            q,
            k,
            v,
            mask=masks.causal() & masks.lengths(key=lengths),
            implementation=implementation,
            top_k=2,
        )
        return (result.output**2).sum(), result

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    wanted = run(q, k, v, lengths)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, spec[axis]))
        by_example = Spec("x") if axis == "batch" else Spec()
        placed = jax.device_put(lengths, NamedSharding(mesh, by_example))
        found = run(*map(put, (q, k, v)), placed)
    close(found[0][1][:3], wanted[0][1][:3], factor=16)
    close(found[1], wanted[1], factor=16)
    lies = found[0][1].output.sharding
    assert lies.is_equivalent_to(NamedSharding(mesh, spec[axis]), 4)
    np.testing.assert_array_equal(found[0][1].indices, wanted[0][1].indices)


def test_12_no_tracer_leaks():
    q, k, v = arrays(t=S)
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, S)))
    forget()
    gc.collect()
    gc.freeze()  # otherwise the search for leaks goes through all objects
    with jax.checking_leaks():

        def loss(q, ids):
            static = attention(q, k, v, mask=masks.causal(), implementation="tiled")
            mask = masks.documents(ids)
            score = scores.cosine(jnp.float32(3))
            traced = attention(q, k, v, mask=mask, score=score, implementation="tiled")
            return (static * traced).sum()

        jax.block_until_ready(jax.jit(jax.grad(loss))(q, ids))


SECOND = {
    "scaled_dot": (lambda r: scores.scaled_dot(np.float32(0.4)), ()),
    "additive": (POISON_SCORES["additive"], (modifiers.soft_cap(3.0),)),
    "bias": (
        lambda r: scores.cosine(np.float32(2)),
        (modifiers.bias(like(np.zeros((N, T, S)))),),
    ),
}


@pytest.mark.parametrize("name", few(SECOND, "bias"))
def test_12_second_derivatives_equal_the_references(name, tile):
    tile(8, 4)
    make, own = SECOND[name]
    q, k, v = arrays()
    data = (q, k, v, make(jax.random.key(0)), own)
    direction = jax.tree.map(lambda x: like(np.asarray(x), 5), data)

    def products(implementation):
        def loss(data):
            q, k, v, score, own = data
            result = attention_with_stats(
                q,
                k,
                v,
                score=score,
                modifiers=own,
                mask=masks.sliding_window(4, 2),
                implementation=implementation,
            )
            lse = jnp.where(jnp.isfinite(result.lse), result.lse, 0)
            return (jnp.sin(result.output)).sum() + (lse**2).sum()

        def slope(data):
            parts = jax.tree.map(
                lambda g, d: (g * d).sum(), jax.grad(loss)(data), direction
            )
            return sum(jax.tree.leaves(parts))

        return jax.jit(jax.grad(slope))(data)

    close(products("tiled"), products("reference"), factor=64)


def test_12_forward_mode_goes_through_the_reference_or_says_so():
    q, k, v = arrays()
    tangent = like(q)
    run = functools.partial(attention, key=k, value=v)
    _, out = jax.jvp(lambda q: run(q, implementation="reference"), (q,), (tangent,))
    step = 1e-2
    up, down = (
        run(q + sign * step * tangent, implementation="reference") for sign in (1, -1)
    )
    np.testing.assert_allclose(out, (up - down) / (2 * step), atol=2e-3)


FORWARD_MODES = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "within jit": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "around jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "hessian": lambda f, x: jax.hessian(lambda x: f(x).sum())(x),
    "of a gradient": lambda f, x: jax.jvp(jax.grad(lambda x: f(x).sum()), (x,), (x,)),
    "in a gradient": lambda f, x: jax.grad(lambda x: jax.jvp(f, (x,), (x,))[1].sum())(
        x
    ),
    "of a pullback": lambda f, x: jax.jvp(jax.vjp(f, x)[1], (x,), (x,)),
    "additive": lambda f, x: jax.jvp(
        functools.partial(f, score=ADDITIVE, implementation="reference"), (x,), (x,)
    ),
}
ADDITIVE = scores.additive.init(jax.random.key(0), 2, hidden_size=1)


@pytest.mark.parametrize("name", FORWARD_MODES)
def test_12_forward_mode_says_what_would_do(name):
    x = jnp.ones((1, 2, 1, 2))
    words = 'forward mode .* of attention needs implementation="reference"'
    if name == "additive":
        words = "forward mode .* of additive and concat scores does not exist"
    with pytest.raises(NotImplementedError, match=words):
        FORWARD_MODES[name](lambda q, **options: attention(q, x, x, **options), x)


def test_12_reverse_mode_passes_whatever_surrounds_it():
    x = jax.random.normal(jax.random.key(0), (1, 3, 1, 2))

    def layer(q):
        return attention(q, x, x, score=ADDITIVE, implementation="tiled")

    def looped(q):
        step = jax.checkpoint(lambda q, _: (layer(q), None))
        return lax.scan(step, q, None, length=2)[0].sum()

    wanted = jax.grad(lambda q: layer(layer(q)).sum())(x)
    found = jax.grad(lambda q: jax.vmap(looped)(q).sum())(x[None])
    np.testing.assert_allclose(found[0], wanted, atol=1e-6)
    transposed = jax.linear_transpose(jax.linearize(looped, x)[1], x)
    np.testing.assert_allclose(*transposed(1.0), wanted, atol=1e-6)


# Law 13: nothing but the reference holds [T, S].


def _temporary(length, gradient, **options):
    x = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v, implementation="tiled", **options).sum()

    fn = jax.grad(loss, (0, 1, 2)) if gradient else loss
    compiled = jax.jit(fn).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


MEMORY = {
    "window": dict(mask=masks.sliding_window(64, 64)),
    "full": {},
    "documents": dict(mask=masks.lengths(key=np.array([1000]))),
    "additive": dict(score=scores.additive.init(jax.random.key(0), 32, hidden_size=32)),
    "mlp": dict(score=scores.mlp.init(jax.random.key(0), 32, hidden_sizes=(16, 8))),
    "dropout": dict(dropout_rate=0.1, dropout_rng=jax.random.key(0)),
}


@pytest.mark.parametrize(
    ("name", "gradient"),
    few(
        itertools.product(MEMORY, [False, True]),
        ("full", True),
        ("additive", True),
        ("mlp", False),
    ),
)
def test_13_memory_grows_with_the_length_not_its_square(name, gradient):
    short, long = (
        _temporary(length, gradient, **MEMORY[name]) for length in (8192, 32768)
    )
    # Tiles take the same memory at both lengths. What grows with the length is at most
    # 1,536 bytes per token (q, k, v, output and their gradients have 128 each);
    # booleans [T, S] alone would be 32,768 bytes per token.
    assert (long - short) / (32768 - 8192) < 1536
    assert long < 32768 * 32768 / 8


def test_13_the_reference_does_hold_it():
    x = jax.ShapeDtypeStruct((1, 4096, 1, 32), jnp.float32)
    fn = jax.jit(functools.partial(attention, implementation="reference"))
    memory = fn.lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes >= 4096 * 4096
