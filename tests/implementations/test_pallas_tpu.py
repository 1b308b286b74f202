"""Law 1 for the TPU kernels, in interpret mode; no test runs on a TPU."""

import functools
import itertools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab import (
    Modifier,
    attention,
    attention_with_stats,
    explain,
    masks,
    modifiers,
    scores,
)
from attnlab._src.implementations import IMPLEMENTATIONS, pallas_tpu
from attnlab._src.implementations.pallas_tpu import blocks, memory
from attnlab._src.implementations.pallas_tpu.backward import Backward
from attnlab._src.implementations.pallas_tpu.blocks import Blocks, Entry, limit
from attnlab._src.implementations.pallas_tpu.call import Products
from attnlab._src.implementations.pallas_tpu.steps import MOST_BYTES, by_key, by_query
from attnlab._src.implementations.sizes import fit
from attnlab._src.ops.explain import canonical
from attnlab._src.ops.prepare import prepare
from attnlab._src.ops.validate import Options, check
from attnlab._src.types import pytree
from tests import grid
from tests.implementations import interpreted
from tests.implementations.interpreted import NAME, Interpreted
from tests.test_conformance import CELLS, conform, once

#: Levels of the grid that the kernels refuse by design, and their reasons.
REFUSED = {
    "own": "it does not know the score Distance",
    "t5": "RelativeTable is no function of one pair at a time",
    "t5_causal": "RelativeTable is no function of one pair at a time",
    "clipped": "RelativeTable is no function of one pair at a time",
    "float16": "it computes float32 and bfloat16, not float16",
    "float64": "it computes float32 and bfloat16, not float64",
}
TAKEN = [cell for cell in CELLS if not set(REFUSED) & set(cell)]
#: Several blocks of queries and of keys, the last ones incomplete.
LENGTHS = {"wide": (70, 150), "tall": (150, 70), "square": (97, 97)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    interpreted.register(monkeypatch)


#: The cells that are not slow.
SHORT = ("cosine-causal-bias-grouped_square-float32-offset_batch-plain-wide-chunks",)


@pytest.mark.parametrize(
    "cell",
    grid.few(TAKEN[::3], *(cell for cell in TAKEN[::3] if str(cell) in SHORT)),
    ids=str,
)
def test_cell(cell, tile, monkeypatch):
    for name, lengths in LENGTHS.items():
        monkeypatch.setitem(grid.LENGTHS, name, lengths)
    if cell.tiles == "chunks":
        interpreted.one_row_segments(monkeypatch)
    else:
        interpreted.short_slices(monkeypatch)
    conform(cell, tile, monkeypatch, {NAME: once})


@pytest.mark.parametrize("name", grid.few(["dot", "additive"], "dot"))
def test_slices_of_queries_give_the_same_gradients(name, monkeypatch):
    """A mask with data, a bias of pairs, dropout, shared key heads, an offset."""
    q, k, v = random(1, 100, 4, 8), *(random(1, 60, 2, 8, seed=n) for n in (1, 2))
    score = scores.scaled_dot()
    if name == "additive":
        score = scores.additive.init(jax.random.key(0), 8, hidden_size=8)
    ids = np.arange(100)[None] // 40
    mask = masks.documents(ids, ids[:, :60]) & masks.sliding_window(50, 9)
    given = [q, k, v, score, random(4, 100, 60, seed=3), random(1, 1, 60, seed=4)]

    def loss(implementation, q, k, v, score, pairs, keys):
        output = attention(
            q,
            k,
            v,
            score=score,
            mask=mask,
            modifiers=[modifiers.bias(pairs), modifiers.bias(keys)],
            query_offset=5,
            dropout_rate=0.3,
            dropout_rng=jax.random.key(1),
            implementation=implementation,
        )
        return jnp.square(output).sum()

    interpreted.short_slices(monkeypatch)
    found, wanted = (
        jax.grad(functools.partial(loss, each), range(6))(*given)
        for each in (NAME, "reference")
    )
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_of_keys_take_memory_in_proportion_to_the_length(monkeypatch):
    """Not to the square of it, although each segment of queries has its own."""
    made, held = interpreted.PallasTpu(), []
    module = sys.modules["attnlab._src.implementations.pallas_tpu.backward"]

    def call(kernel, steps, lead, arrays, in_specs, out_shape, *more, **named):
        held.append(sum(4 * math.prod(x.shape) for x in out_shape))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr(module, "call", call)
    for kind, heads, length in (("TPU v5 lite", 1, 2**16), ("TPU v4", 8, 2**14)):
        q = jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
        with on(kind):
            options = Options(mask=masks.sliding_window(256, 0))
            *_, inputs = canonical(q, k, k, options)
            wanted = inputs.gradients(query=True, key=True)
            run = functools.partial(made.backward, wanted=[x is True for x in wanted])
            rows = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
            output = jax.ShapeDtypeStruct(q.shape, jnp.float32)
            held.clear()
            jax.eval_shape(run, inputs, output, rows, output, None)
        # The gradients of the queries, and of keys and values for each segment.
        assert len(held) > 1
        assert max(held) <= 5 * 4 * math.prod(q.shape)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_gives_its_reason(name):
    cell = next(c for c in CELLS if set(REFUSED) & set(c) == {name})
    problem = grid.build(cell)
    options: dict[str, Any] = {**problem.data, **problem.fixed}
    options["dropout_rate"] = problem.dropout_rate
    with jax.enable_x64(name == "float64"):
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            explain(**options, implementation="pallas_tpu", platform="tpu")
        assert explain(**options, platform="tpu").implementation == "tiled"


def test_a_tpu_gets_the_kernels():
    x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    answer = explain(x, x, x, mask=masks.causal(), platform="tpu")
    assert answer.implementation == "pallas_tpu"
    assert "it runs on tpu, not on cpu" in str(explain(x, x, x, platform="cpu"))


def random(*shape, seed=0, scale=1.0, dtype=np.float32):
    made = np.random.default_rng(seed).normal(size=shape) * scale
    return made.astype(dtype)


def record(q, k, v, dropout_rate=0.0, **options):
    """The ``AttentionInputs`` of a call."""
    args, settings = check(q, k, v, dropout_rate=dropout_rate, **options)
    return prepare(args, settings.but(stats=True))


def both_passes(implementation, inputs, d_output, d_lse):
    """Output, log-sum-exp, and the gradients of all floating inputs."""
    output, lse = implementation.forward(inputs)
    wanted = [jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(inputs)]
    found = implementation.backward(inputs, output, lse, d_output, d_lse, wanted)
    return output, lse, [x for x in found if x is not None]


def equal(found, wanted):
    """Equal up to the order of float32 sums.

    Terms may be as large as the largest sum, and cancel in a smaller one.
    """

    def near(x, y):
        largest = np.abs(y).max(initial=1, where=np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * largest)

    jax.tree.map(near, found, wanted)


def agrees_with_tiled(implementation, arrays, cotangents, dropout_rate=0.0, **options):
    def run(which, arrays, cotangents, options):
        inputs = record(*arrays, dropout_rate=dropout_rate, **options)
        return both_passes(which, inputs, *cotangents)

    found, wanted = (
        jax.jit(functools.partial(run, which))(arrays, cotangents, options)
        for which in (implementation, IMPLEMENTATIONS["tiled"])
    )
    equal(found, wanted)


EDGES = {
    "causal": lambda t, s: dict(mask=masks.causal(), query_offset=5),
    "lengths": lambda t, s: dict(
        mask=masks.lengths(query=np.array([t, 0]), key=np.array([s, 1]))
    ),
    "documents": lambda t, s: dict(
        mask=masks.documents(np.zeros((2, t), np.int32), np.zeros((2, s), np.int32))
    ),
    "dense": lambda t, s: dict(mask=random(2, 1, t, s) > 0),
    "bias": lambda t, s: dict(modifiers=[modifiers.bias(random(2, 2, t, s))]),
    "alibi": lambda t, s: dict(modifiers=[modifiers.alibi(2)]),
    "dropout": lambda t, s: dict(dropout_rate=0.3, dropout_rng=jax.random.key(1)),
    "places": lambda t, s: dict(
        query_positions=np.arange(t), key_positions=np.arange(s) - 1
    ),
}


#: One query of each, and one key or both in turn.
SINGLES = grid.few(
    [
        (name, *shape)
        for i, name in enumerate(EDGES)
        for shape in ((1, 70), ((70, 1), (1, 1))[i % 2])
    ],
)


@pytest.mark.parametrize(("name", "t", "s"), SINGLES)
def test_one_query_or_one_key(name, t, s):
    arrays = [random(2, n, 2, 8, seed=n) for n in (t, s, s)]
    cotangents = random(2, t, 2, 8, seed=4), random(2, t, 2, seed=5)
    agrees_with_tiled(Interpreted(), arrays, cotangents, **EDGES[name](t, s))


@pytree
class Root(Modifier):
    """A user's modifier with infinite slope at 0, where the logits of padding are."""

    def apply(self, logits, tile, *operands):
        return jnp.sign(logits) * jnp.sqrt(jnp.abs(logits))


@pytree
class Inverse(Modifier):
    """A user's modifier that is infinite at 0."""

    def apply(self, logits, tile, *operands):
        return 0.01 / logits


@pytest.mark.parametrize(
    ("shape", "last"),
    grid.few(
        itertools.product(
            [(2, 1, 1), (1, 40, 1), (1, 1, 40), (2, 40, 40)], [Root, Inverse]
        ),
        ((1, 40, 1), Root),
        ((2, 40, 40), Inverse),
    ),
)
def test_padding_has_no_gradient_that_is_not_finite(shape, last):
    """40 queries and keys are padded to blocks of 64; gradients stay finite."""
    # Logits far from 0, where only those of padding are.
    q, k, v = (0.5 + abs(random(1, 40, 2, 8, seed=n)) for n in range(3))

    def loss(q, k, v, array, name):
        given = dict(modifiers=[modifiers.bias(array), last()], implementation=name)
        return (attention(q, k, v, **given) ** 2).sum()

    array = np.zeros(shape, np.float32)
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=4)
    found, wanted = (gradients(q, k, v, array, name) for name in (NAME, "reference"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        found,
        wanted,
    )


@pytest.mark.parametrize("name", [NAME, "tiled"])
def test_a_slope_that_is_not_finite_counts_only_where_it_is_seen(name):
    q, k, v = (random(1, 40, 2, 8, seed=n) for n in range(3))
    mask = masks.lengths(key=np.array([30]))

    def loss(q, k, v):
        given = dict(mask=mask, modifiers=[Root()], implementation=name)
        return (attention(q, k, v, **given) ** 2).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() for x in gradients)


#: A case for each path through the kernels, for the interpreter that simulates memory.
SIMULATED = {
    "full": {},
    "bits": dict(mask=masks.causal() & masks.dense(random(70, 70) > 0)),
    "documents": dict(mask=masks.documents(np.arange(70) // 30)),
    "additive": dict(
        score=scores.additive.init(jax.random.key(0), 16, hidden_size=5, num_heads=2)
    ),
    "perceptron": dict(
        score=scores.mlp.init(jax.random.key(0), 16, hidden_sizes=[5], num_heads=2)
    ),
    "alibi and dropout": dict(
        mask=masks.sliding_window(9, 3),
        modifiers=[modifiers.alibi(2)],
        dropout_rate=0.2,
        dropout_rng=jax.random.key(3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", grid.few(SIMULATED, "documents"))
def test_memory_is_read_only_where_it_was_written(name):
    class Simulated(Interpreted):
        interpret = pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
        )

    arrays = [random(1, 70, 2, 16, seed=n) for n in range(3)]
    cotangents = random(1, 70, 2, 16, seed=4), random(1, 70, 2, seed=5)
    agrees_with_tiled(Simulated(), arrays, cotangents, **SIMULATED[name])


@pytest.mark.parametrize(
    ("mapped", "name"),
    grid.few(itertools.product([True, False], ["additive", "mlp"]), (True, "mlp")),
)
def test_parameters_of_scores_under_vmap(name, mapped):
    """Mapped parameters, or shared ones, broadcast to get a gradient per example."""
    sizes = {"additive": {"hidden_size": 8}, "mlp": {"hidden_sizes": (8, 4)}}[name]
    init = getattr(scores, name).init
    make = jax.jit(lambda rng: init(rng, 4, num_heads=2, **sizes))
    made = [make(jax.random.key(i)) for i in range(3)]
    score = jax.tree.map(lambda *x: np.stack(x), *made) if mapped else made[0]
    x = random(3, 1, 40, 2, 4)

    def loss(score, x, implementation):
        def one(score, x):
            return attention(x, x, x, score=score, implementation=implementation)

        outputs = jax.vmap(one, (0 if mapped else None, 0))(score, x)
        return (outputs**2).sum()

    both = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    found, wanted = (both(score, x, n) for n in (NAME, "reference"))
    equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("units", "kept"), [(17, 0), (18, 3), (19, 19)])
def test_additive_scores_with_little_memory(units, kept, monkeypatch):
    """The backward pass recomputes the tanh of units that do not fit in memory."""
    rooms = []

    class Little(Backward):
        def __init__(self, inputs, wanted, blocks, limit, interpret):
            super().__init__(inputs, wanted, blocks, limit, interpret)
            self.spare = kept * 4 * blocks.chunk * blocks.q
            rooms.append(self.compare.room(blocks, "backward", self.spare))

    monkeypatch.setattr(pallas_tpu, "Backward", Little)
    score = scores.additive.init(jax.random.key(3), 16, hidden_size=units)
    q, k, v = random(1, 97, 4, 16), random(1, 70, 2, 16, seed=1), random(1, 70, 2, 8)

    def loss(score, q, k, v, implementation):
        given = dict(score=score, mask=masks.causal(), implementation=implementation)
        return jnp.square(attention(q, k, v, **given)).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=4)
    found, wanted = (gradients(score, q, k, v, n) for n in (NAME, "reference"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        found,
        wanted,
    )
    # The first two arrays are for the logits of a part and its sums.
    assert [x.shape[0] // rooms[0][0].shape[0] for x in rooms[0][2:]] == [kept] * (
        kept > 0
    )


@pytest.mark.parametrize(("scale", "bounded"), [(0.5, True), (3.0, False)])
def test_large_logits_go_the_safe_way(scale, bounded):
    q, k, v = (random(1, 97, 2, 16, seed=n) for n in range(3))
    q, k = q * scale, k * scale
    score = scores.dot()
    wanted = attention_with_stats(q, k, v, score=score, implementation="reference")
    # exp of the larger logits would overflow without a running maximum.
    assert (np.asarray(wanted.lse).max() < 60) == bounded
    found = attention_with_stats(q, k, v, score=score, implementation=NAME)
    np.testing.assert_allclose(found.output, wanted.output, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(IMPLEMENTATIONS[NAME].forward)(record(q, k, v)))
    assert "attnlab_forward_bounded" in text
    assert "attnlab_forward_online" in text


def walk(steps, lead):
    """(example, head, step) of every step of a grid, in order."""
    for example in range(lead[0]):
        for head in range(lead[1]):
            for place in np.ndindex(*(int(n) for n in steps.grid)):
                words = [np.asarray(x) for x in steps.words]
                yield example, head, steps.at((example, head, *place), words)


PLANS = {
    "full": masks.full(),
    "causal": masks.causal(),
    "window": masks.sliding_window(20, 5),
    "nothing": ~masks.full(),
    "few": masks.prefix(10) & masks.chunked(30),
    "per_head": masks.per_head([masks.causal(), masks.full(), masks.prefix(40)] * 2),
}


@pytest.mark.parametrize("segment", [1, 2, 4])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("t", "s"), [(97, 130), (96, 128)])
def test_the_steps_are_the_plan(name, segment, t, s):
    """Each live block occurs once; sums start and end at the right steps."""
    mask, size, group = PLANS[name], 32, 2
    plan = fit(mask.plan(t, s, block_size=size), (size, size))
    assert plan.cols is not None
    heads = plan.rows.full.lo.shape[1]
    for steps, live, outers, group_ in (
        (by_query(plan), plan.rows, -(-t // size), 1),
        (by_key(plan, group, segment), plan.cols, -(-s // size), group),
    ):
        assert steps.bytes == sum(4 * x.size for x in steps.words)
        lists = max(heads // group_, 1)
        seen, open_sums = [], None
        for _, head, step in walk(steps, (1, lists)):
            if step.first:
                assert open_sums is None
                open_sums = (head, int(step.segment), int(step.outer))
            if open_sums is None:  # padding, as the list of another head is longer
                assert not step.active
                continue
            assert open_sums == (head, int(step.segment), int(step.outer))
            if step.active:
                masked = bool(step.masked)
                place = head * group_ + int(step.member) if heads > 1 else 0
                seen.append((place, int(step.outer), int(step.inner), masked))
                if group_ > 1:
                    assert int(step.inner) // segment == int(step.segment)
            if step.last:
                open_sums = None
        assert open_sums is None
        wanted = []
        for masked, found in enumerate(live):
            for n in range(heads):
                for o in range(outers):
                    bounds = zip(found.lo[0, n, o], found.hi[0, n, o], strict=True)
                    for lo, hi in bounds:
                        wanted += [(n, o, i, bool(masked)) for i in range(lo, hi)]
        times = group_ if heads == 1 else 1
        assert sorted(seen) == sorted(wanted * times)


@pytest.mark.parametrize("mask", [~masks.full(), masks.prefix(0)], ids=str)
def test_whole_blocks_that_see_nothing(mask):
    q, k, v = random(1, 128, 2, 8), random(1, 64, 1, 8), random(1, 64, 1, 8)

    def loss(q, k, v, name):
        return (attention(q, k, v, mask=mask, implementation=name) ** 2).sum()

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
    found = run(q, k, v, NAME)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(found))
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    assert explain(x, x, x, mask=mask, platform="tpu").implementation == "pallas_tpu"


@pytest.mark.slow
def test_a_traced_layout_with_more_blocks_of_keys_than_of_queries():
    q, k, v = random(1, 64, 1, 8), *(random(1, 256, 1, 8, seed=n) for n in (1, 2))

    def loss(layout, q, k, v, name):
        mask = masks.blocks(layout, 64)
        return (attention(q, k, v, mask=mask, implementation=name) ** 2).sum()

    layout = jnp.array([[0, 3]])
    found, wanted = (
        jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=4)(layout, q, k, v, name)
        for name in (NAME, "reference")
    )
    equal(found, wanted)
    assert np.asarray(found[2])[:, 192:].any()


@pytest.mark.slow
def test_key_blocks_beyond_a_traced_layout_may_be_seen():
    """Key positions may exceed the number of keys, also in the backward pass."""
    q, k, v = (random(1, 64, 1, 8, seed=n) for n in range(3))

    def loss(layout, q, k, v, name):
        mask, at = masks.blocks(layout, 64), np.arange(192, 256)
        given = dict(mask=mask, key_positions=at, implementation=name)
        return (attention(q, k, v, **given) ** 2).sum()

    found, wanted = (
        jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=4)(
            jnp.array([[3]]), q, k, v, name
        )
        for name in (NAME, "reference")
    )
    equal(found, wanted)
    assert np.asarray(found[2]).any()


def test_blocks_that_are_dead_are_not_fetched():
    plan = masks.sliding_window(64, 0).plan(4096, block_size=128)
    steps = by_query(fit(plan, (128, 128)))
    assert steps.grid == (32 + 31,)
    assert by_key(fit(plan, (128, 128)), 1, 32).grid == (32 + 31,)


@pytest.mark.slow
def test_new_documents_do_not_compile_again():
    q = random(1, 97, 2, 16)
    traces = []

    @jax.jit
    def run(q, ids):
        traces.append(1)
        return attention(q, q, q, mask=masks.documents(ids), implementation=NAME)

    for cut in (10, 50, 90):
        ids = (np.arange(97) >= cut).astype(np.int32)[None]
        wanted = attention(
            q, q, q, mask=masks.documents(ids), implementation="reference"
        )
        np.testing.assert_allclose(run(q, ids), wanted, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def sizes(t, s, head_size=64, of="forward"):
    class Sized(interpreted.PallasTpu):
        table = (Entry(Blocks(1024, 1024, 512)),)

    q = jax.ShapeDtypeStruct((1, t, 1, head_size), jnp.float32)
    k = jax.ShapeDtypeStruct((1, s, 1, head_size), jnp.float32)
    *_, inputs = canonical(q, k, k, {})
    return Sized().sizes(inputs, of), Sized().unsupported(inputs)


def test_blocks_fit_the_lengths():
    with on("TPU v5 lite"):
        assert sizes(4096, 8192) == ((1024, 1024, 512), ())
        assert sizes(100, 300) == ((128, 384, 384), ())
        assert sizes(1, 700) == ((128, 768, 128), ())


def on(kind):
    device = jax.sharding.AbstractDevice(kind, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_blocks_fit_the_memory():
    with on("TPU v5 lite"):
        assert sizes(8192, 8192, 256, "backward")[0] == (1024, 1024, 512)
    with on("TPU v4"):  # 16 MiB
        smaller, reasons = sizes(8192, 8192, 256, "backward")
        assert smaller.q * smaller.k < 2**20
        assert reasons == ()
        _, reasons = sizes(8192, 8192, 2**14)
        assert "needs" in reasons[0]
        assert "MiB of vector memory" in reasons[0]


@pytest.mark.slow
def test_what_the_kernels_declare_is_within_the_estimate(monkeypatch):
    """Vector memory: each block twice (double buffering), and scratch arrays."""
    declared = {}

    def tile(shape, dtype):
        sizes = [n for n in shape if n is not None]
        *lead, rows, lanes = [getattr(n, "block_size", n) for n in sizes]
        item = jnp.dtype(dtype).itemsize
        rows = -(-rows // (32 // item)) * (32 // item)
        return math.prod(lead) * rows * -(-lanes // 128) * 128 * item

    def call(kernel, steps, lead, arrays, in_specs, out_shape, out_specs, kept, **more):
        blocks = [*zip(arrays, in_specs, strict=True)]
        blocks += zip(out_shape, out_specs, strict=True)
        declared[more["name"].split("_")[1]] = sum(
            2 * tile(spec.block_shape, x.dtype)
            for x, spec in blocks
            if spec.block_shape is not None
        ) + sum(tile(x.shape, x.dtype) for x in kept)
        return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    module = "attnlab._src.implementations.pallas_tpu."
    for name in ("forward", "backward"):
        monkeypatch.setattr(sys.modules[module + name], "call", call)
    ours, rng = IMPLEMENTATIONS["pallas_tpu"], jax.random.key(0)
    assert isinstance(ours, pallas_tpu.PallasTpu)

    class Frugal(Backward):
        """A backward pass that uses no spare memory."""

        def __init__(self, *args):
            super().__init__(*args)
            self.spare = 0

    def array(heads, size=128, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, 4096, heads, size), dtype)

    additive = dict(score=scores.additive.init(rng, 128, hidden_size=256, num_heads=8))
    mlp = dict(score=scores.mlp.init(rng, 128, hidden_sizes=(192, 192), num_heads=8))
    problems: list[tuple[Any, Any, Any]] = [
        (array(8), array(8), {}),
        (array(8), array(8), dict(mask=masks.lengths(key=np.array([7])))),
        (array(8, 256, jnp.float32), array(1, 256, jnp.float32), {}),
        (array(8), array(8), additive),
        (array(8), array(8), mlp),
        *(
            (array(32, 64), array(1, 64), dict(modifiers=[modifiers.bias(shape)]))
            for shape in map(np.zeros, [(32, 1, 4096), (32, 4096, 1), (32, 1, 1)])
        ),
    ]
    for kind, (query, key, options) in itertools.product(
        ("TPU v4", "TPU v5 lite"), problems
    ):
        with on(kind):
            *_, inputs = canonical(query, key, key, options)

            def both(inputs):
                s = inputs.sizes
                output = jnp.zeros((s.B, s.T, s.N, s.D))
                lse = output[..., 0]
                ours.forward(inputs)
                wanted = jax.tree.map(
                    lambda x: jnp.issubdtype(x.dtype, jnp.floating), inputs
                )
                wanted = jax.tree.leaves(wanted)
                ours.backward(inputs, output, lse, output, lse, wanted)

            jax.eval_shape(both, inputs)
            assert declared["backward"] <= limit()
            with monkeypatch.context() as patch:
                patch.setattr(pallas_tpu, "Backward", Frugal)
                jax.eval_shape(functools.partial(both), inputs)  # traced again
            assert ours.unsupported(inputs) == ()
            for of in ("forward", "backward"):
                blocks = ours.sizes(inputs, of)
                needed = memory.bytes_needed(inputs, blocks, of, limit())
                assert declared[of] <= needed <= limit()


def test_too_many_heads_of_one_key_head_are_refused():
    """The words of a step have 8 bits for the query head."""
    q, k, v = random(1, 40, 256, 4), *(random(1, 40, 1, 4, seed=n) for n in (1, 2))

    def loss(q, k, v, name):
        given = dict(mask=masks.causal(), implementation=name)
        return (attention(q, k, v, **given) ** 2).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    found, wanted = (gradients(q, k, v, name) for name in (NAME, "reference"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        found,
        wanted,
    )
    more = np.concatenate([q, q[:, :, :1]], 2)
    with pytest.raises(NotImplementedError, match="257 query heads share a key head"):
        loss(more, k, v, NAME)


@pytest.mark.parametrize("name", grid.few(["dot", "additive", "mlp"], "dot"))
def test_products_may_round_as_jax_says(name):
    """With default precision bfloat16 inputs are multiplied as bfloat16."""
    made = {
        "dot": scores.scaled_dot(),
        "additive": scores.additive.init(jax.random.key(0), 16, hidden_size=8),
        "mlp": scores.mlp.init(jax.random.key(0), 16, hidden_sizes=[8]),
    }[name]
    q, k, v = (random(1, 97, 1, 16, seed=n, dtype=jnp.bfloat16) for n in range(3))

    def loss(q, k, v, implementation):
        given = dict(score=made, mask=masks.causal(), implementation=implementation)
        return jnp.square(attention(q, k, v, **given).astype(jnp.float32)).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    wanted = gradients(q, k, v, "reference")
    with jax.default_matmul_precision("default"):
        found = gradients(q, k, v, NAME)
        assert Products.of(record(q, k, v)) == (jnp.bfloat16, None)
    for pair in zip(found, wanted, strict=True):
        a, b = (np.asarray(x, np.float32) for x in pair)
        assert np.abs(a - b).max() < 0.04 * np.abs(b).max()


def test_what_needs_too_much_is_refused():
    x = jax.ShapeDtypeStruct((4, 8192, 8, 64), jnp.bfloat16)
    shared = modifiers.bias(jnp.zeros((8192, 8192), jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="gradient of Bias, which all share"):
        explain(
            x, x, x, modifiers=[shared], implementation="pallas_tpu", platform="tpu"
        )
    unknown = masks.random_blocks(0, 3, 64, 128)
    assert explain(x, x, x, mask=unknown, platform="tpu").implementation == "pallas_tpu"
    x = jax.ShapeDtypeStruct((32, 8192, 8, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="bits of the mask"):
        explain(x, x, x, mask=unknown, implementation="pallas_tpu", platform="tpu")


def test_lists_that_scalar_memory_cannot_hold_are_refused():
    ours = {"implementation": "pallas_tpu", "platform": "tpu"}
    x = jax.ShapeDtypeStruct((64, 32768, 1, 64), jnp.bfloat16)
    packed = masks.documents(np.zeros((64, 32768), np.int32))
    with pytest.raises(NotImplementedError, match="KiB of scalar memory"):
        explain(x, x, x, mask=packed, **ours)
    # A structural mask has one list for all examples, and full attention has none.
    explain(x, x, x, mask=masks.causal(), **ours)


def test_the_table_is_read_and_may_be_replaced(tmp_path, monkeypatch):
    with on("TPU v5 lite"):
        assert len(blocks.entries(128, "forward")) > 1
        path = tmp_path / "table.json"
        path.write_text('{"v5e": {"64": {"forward": [[256, 128, 128, 3, 2.5, 4]]}}}')
        monkeypatch.setenv(blocks.VARIABLE, str(path))
        found = Entry(Blocks(256, 128, 128), 3, 2.5, 4)
        assert blocks.entries(200, "forward") == (found,)
        assert blocks.entries(200, "backward") == (Entry(blocks.CAUTIOUS),)
        broken = tmp_path / "broken.json"
        monkeypatch.setenv(blocks.VARIABLE, str(broken))
        for text in (
            "[1]",
            '{"v5e": {"64": {"forward": [256, 128, 128]}}}',
            '{"v5e": {"64": {"forward": []}}}',
        ):
            broken.write_text(text)
            blocks.read.cache_clear()
            with pytest.raises(ValueError, match="no table of blocks"):
                blocks.entries(64, "forward")
    assert blocks.device().kind is None


SHAPE = jax.ShapeDtypeStruct((1, 8192, 1, 128), jnp.bfloat16)


def chosen(mask, of="forward", made=None, **options):
    *_, inputs = canonical(SHAPE, SHAPE, SHAPE, Options(mask=mask, **options))
    return (made or interpreted.PallasTpu()).sizes(inputs, of)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("of", ["forward", "backward"])
def test_blocks_follow_the_plan(kind, of):
    """Smaller ones for a window; no others that fit cost less, by the table."""
    with on(kind):
        *_, inputs = canonical(SHAPE, SHAPE, SHAPE, {})
        found = {}
        for name, mask in {
            "full": masks.full(),
            "causal": masks.causal(),
            "window": masks.sliding_window(256, 256),
        }.items():
            found[name] = chosen(mask, of)
            costs = {}
            for sizes, outer, full, partial in blocks.entries(128, of):
                if memory.bytes_needed(inputs, sizes, of, limit()) > limit():
                    continue
                plan = mask.plan(8192, block_size=sizes[:2])
                live = [float(x.per_row().sum()) for x in plan.rows]
                owners = 8192 // (sizes.q if of == "forward" else sizes.k)
                costs[sizes] = owners * outer + live[0] * full + live[1] * partial
            assert costs[found[name]] == min(costs.values())
        sizes = [math.prod(found[name][:2]) for name in ("window", "causal", "full")]
        assert sizes == sorted(sizes)
        assert sizes[0] < sizes[2]


def test_blocks_where_the_plan_is_known_only_at_run_time():
    """As if each block of queries saw a quarter of the keys; no new blocks by data."""

    class Two(interpreted.PallasTpu):
        table = (
            Entry(Blocks(1024, 1024, 256), 0.0, 4.0, 4.0),
            Entry(Blocks(256, 256, 256), 0.0, 0.5, 0.5),
        )

    made = Two()
    # A run of 2,048 keys touches 4 of the large blocks, or 10 of the small ones.
    assert 8 * 4 * 4.0 < 32 * 10 * 0.5
    ids = jnp.zeros((1, 8192), jnp.int32)
    assert chosen(masks.documents(ids), made=made) == (1024, 1024, 256)
    Two.table = (Two.table[0], Two.table[1]._replace(full=0.3, partial=0.3))
    assert 8 * 4 * 4.0 > 32 * 10 * 0.3
    for given in (
        {"mask": masks.documents(ids)},
        {"mask": masks.causal(), "query_offset": 3},
    ):
        assert chosen(made=made, **given) == (256, 256, 256)


def test_small_blocks_are_left_where_their_list_is_too_long():
    """A list for documents has room for all blocks: it must fit the scalar memory."""

    class Two(interpreted.PallasTpu):
        table = (
            Entry(Blocks(1024, 1024, 256), full=16.0, partial=16.0),
            Entry(Blocks(512, 512, 256), full=1.0, partial=1.0),
        )

    def found(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
        mask = masks.documents(np.zeros((1, length), np.int32))
        with on("TPU v5 lite"):
            *_, inputs = canonical(x, x, x, Options(mask=mask))
            sizes = Two().sizes(inputs, "forward")
            return sizes, Two()._bytes_of_words(inputs, "forward", sizes)

    assert found(2**17) == ((512, 512, 256), MOST_BYTES)
    assert found(2**18) == ((1024, 1024, 256), MOST_BYTES)


def test_sums_of_every_segment_of_queries_have_a_cost():
    """Among very many queries, fewer and longer blocks of keys are cheaper."""
    mask, found = masks.longformer(window=192, anchors=64), []
    with on("TPU v5 lite"):
        for length in (2**13, 2**19):
            x = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
            *_, inputs = canonical(x, x, x, Options(mask=mask))
            found.append(interpreted.PallasTpu().sizes(inputs, "backward").k)
    assert found[0] < found[1]


def test_short_inputs_are_charged_for_what_they_compute():
    """One query is a block of 128: then long blocks of keys are best."""
    with on("TPU v5 lite"):
        one = jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.bfloat16)
        *_, inputs = canonical(one, SHAPE, SHAPE, {})
        found = interpreted.PallasTpu().sizes(inputs, "forward")
    assert found[:2] == (128, 1024)


def test_explain_shows_what_blocks_would_cost():
    mask = masks.sliding_window(256, 256)
    with on("TPU v5 lite"):
        found = explain(SHAPE, SHAPE, SHAPE, mask=mask, platform="tpu")
    assert min(found.candidates, key=lambda x: found.candidates[x]) == found.block_sizes
    assert len(found.candidates) > 3
    assert "costs of other blocks: " in str(found)
    assert explain(SHAPE, SHAPE, SHAPE, platform="cpu").candidates == {}
    # Where nothing is visible, nothing costs anything.
    hidden = {"mask": ~masks.full(), "implementation": "tiled"}
    assert "costs of other" not in str(explain(SHAPE, SHAPE, SHAPE, **hidden))


def test_the_table_has_every_tpu():
    """And some sizes fit the memory of each; costs of v4 and 7x are those of others."""
    names = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5"}
    names |= {"v6e": "TPU v6 lite", "7x": "TPU7x"}
    table = blocks.read(blocks._TABLE)
    assert set(table) == set(names)
    for kind, sizes in table.items():
        for size, passes in sizes.items():
            assert set(passes) == {"forward", "backward"}
            x = jax.ShapeDtypeStruct((1, 8192, 1, size), jnp.bfloat16)
            with on(names[kind]):
                for of, mask in itertools.product(
                    passes, (masks.full(), masks.sliding_window(256, 256))
                ):
                    *_, inputs = canonical(x, x, x, Options(mask=mask))
                    found = interpreted.PallasTpu().sizes(inputs, of)
                    assert found in [entry.blocks for entry in passes[of]]
