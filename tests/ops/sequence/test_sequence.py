"""Sharded sequences: every strategy computes what one device does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnlab import (
    attention,
    attention_with_stats,
    masks,
    modifiers,
    nn,
    sharding,
)
from attnlab._src.placement import STRATEGIES
from tests.devices import collectives, mesh_of, received
from tests.grid import NATIVE, few
from tests.ops.test_partition import CASES, H, N, T, arrays, random

B = 4
SEQUENCE = ("x", "y")
MORE: dict[str, Any] = {
    "per head": lambda: (
        N,
        dict(mask=masks.per_head([masks.causal(), *[masks.sliding_window(3, 3)] * 3])),
    ),
    "dense": lambda: (2, dict(mask=np.asarray(random(B, 1, T, T) > -0.5))),
    "window of documents": lambda: (
        N,
        dict(
            mask=masks.documents(np.arange(T) // 7) & masks.sliding_window(6, 6),
            sinks=jnp.arange(4.0),
        ),
    ),
    "chunks": lambda: (2, dict(mask=masks.chunked(11))),
    "longformer": lambda: (
        2,
        dict(
            mask=masks.sliding_window(3, 3) | masks.anchor([0, 20]),
            modifiers=[modifiers.alibi(N)],
            dropout_rate=0.2,
            dropout_rng=jax.random.key(1),
        ),
    ),
    "anchors": lambda: (
        N,
        dict(
            mask=masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(3)),
            dropout_rate=0.2,
            dropout_rng=jax.random.key(1),
        ),
    ),
}
ALL = CASES | MORE
#: In the short suite.
SHORT = (
    ("longformer", "exchange"),
    ("dense", "ring"),
    ("big bird", "all_to_all"),
    ("positions", "all_gather"),
)
#: Each case with an exchange and with one of the other strategies in turn.
COMBINED = [
    (name, strategy, [NATIVE, "tiled"][(i // 3 + j) % 2])
    for i, name in enumerate(ALL)
    for j, strategy in enumerate(("exchange", "ring", "all_to_all", "all_gather"))
    if j in {0, 1 + i % 3} or (name, strategy) in SHORT
]


def both_passes(options, **where):
    def run(q, k, v):
        def attend(q, k, v):
            if where:
                found = sharding.attention_with_stats(q, k, v, **options, **where)
            else:
                found = attention_with_stats(q, k, v, **options)
            return found.output, jnp.where(jnp.isneginf(found.lse), 0, found.lse)

        results, pull = jax.vjp(attend, q, k, v)
        return *results, *pull(jax.tree.map(jnp.sin, results))

    return jax.jit(run)


def close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=3e-5)


@functools.cache
def on_one_device(name):
    """A case's arrays and results."""
    key_heads, options = ALL[name]()
    given = arrays(key_heads)
    return given, both_passes(options | {"implementation": "tiled"})(*given)


@pytest.mark.parametrize(
    ("name", "strategy", "implementation"),
    few(COMBINED, *(each for each in COMBINED if each[:2] in SHORT)),
)
def test_strategies_compute_what_one_device_does(name, strategy, implementation):
    key_heads, options = ALL[name]()
    options = options | {"implementation": implementation}
    given, wanted = on_one_device(name)
    where = dict(mesh=mesh_of(), sequence=SEQUENCE, strategy=strategy)
    run = both_passes(options, **where)
    if strategy == "all_to_all" and (key_heads < 4 or name == "per head"):
        with pytest.raises(NotImplementedError, match=r"strategy='all_to_all'.*head"):
            run(*given)
        return
    close(run(*given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("longformer", "exchange"),
        ("big bird", "exchange"),
        ("window of documents", "exchange"),
        ("dropout", "ring"),
    ],
)
def test_eight_devices(name, strategy):
    given, wanted = on_one_device(name)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    run = both_passes(ALL[name]()[1], mesh=mesh, sequence="x", strategy=strategy)
    close(run(*given), wanted)


@pytest.mark.parametrize(
    ("all_see", "passes"), [(masks.prefix(2), 1), (~masks.prefix(T - 2), 2)]
)
def test_keys_that_come_first_are_of_one_pass(all_see, passes):
    """Keys of both sides in one block would be near to every window."""
    mask = masks.sliding_window(5, 0) | all_see
    options = dict(mask=mask, implementation="tiled")
    where = dict(mesh=mesh_of(), sequence=SEQUENCE, strategy="exchange")
    traced = both_passes(options, **where).trace(*arrays())
    assert str(traced.jaxpr).count(" attention[") == 2 * passes  # and backward


@pytest.mark.parametrize(
    ("strategy", "lengths"),
    few(
        [
            *zip(STRATEGIES, [(30, 30), (5, 32), (30, 41), (32, 4)], strict=True),
            ("exchange", (30, 41)),
            ("exchange", (5, 32)),
            ("exchange", (32, 4)),
        ],
        ("exchange", (30, 41)),
    ),
)
def test_lengths_that_devices_do_not_divide(strategy, lengths):
    t, s = lengths
    q, k, v = arrays()
    given = q[:, :t], jnp.tile(k, (1, 2, 1, 1))[:, :s], jnp.tile(v, (1, 2, 1, 1))[:, :s]
    options = dict(mask=masks.sliding_window(6, 9), implementation="tiled")
    run = both_passes(options, mesh=mesh_of(), sequence=SEQUENCE, strategy=strategy)
    close(run(*given), both_passes(options)(*given))


@pytest.mark.parametrize(
    "kind", few([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_batch_and_sequence_are_sharded_together(kind):
    mesh, options = (
        mesh_of(kind),
        dict(mask=masks.causal() & masks.sliding_window(5, 0)),
    )
    place = NamedSharding(mesh, Spec("x", "y"))
    given = [jax.device_put(x, place) for x in arrays()]
    with jax.set_mesh(mesh):
        run = both_passes(options, sequence="y", batch="x")
        compiled = run.lower(*given).compile()
    found = compiled(*given)
    close(found, both_passes(options)(*arrays()))
    for x in found:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, Spec("x", "y")), x.ndim)
    # Keys and values of the window, 2 examples a device; their gradients.
    row = 2 * 2 * N * H * 4
    assert collectives(compiled) == {"collective-permute": 2 * 5 * row}


def test_explicit_axes_are_enough():
    mesh, mask = mesh_of(AxisType.Explicit), masks.sliding_window(5, 0)
    place = NamedSharding(mesh, Spec(None, SEQUENCE))
    given = [jax.device_put(x, place) for x in arrays()]
    attend = jax.jit(lambda q, k, v: attention(q, k, v, mask=mask))
    compiled = attend.lower(*given).compile()
    assert received(compiled, 4) == 5 * 2 * B * N * H * 4
    close([compiled(*given)], [attend(*arrays())])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_balanced_order(strategy):
    mask = masks.causal()
    order = sharding.balanced_order(mask, T, 4)
    where = dict(mesh=mesh_of(), sequence=SEQUENCE, strategy=strategy)
    options = dict(mask=mask, implementation="tiled")
    dealt = options | dict(query_positions=order, key_positions=order)
    found = both_passes(dealt, **where)(*(x[:, order] for x in arrays()))
    close([x[:, np.argsort(order)] for x in found], both_passes(options)(*arrays()))


@pytest.mark.parametrize("strategy", few(STRATEGIES, "exchange"))
def test_hidden_keys_do_not_exist(strategy):
    q, k, v = arrays()
    bad = jnp.arange(T)[None, :, None, None] >= 27
    k, v = (jnp.where(bad, jnp.nan, x) for x in (k, v))
    options = dict(mask=masks.lengths(key=jnp.full(B, 27)), implementation="tiled")
    run = both_passes(options, mesh=mesh_of(), sequence=SEQUENCE, strategy=strategy)
    found = run(q, k, v)
    assert all(np.isfinite(x).all() for x in found)
    close(found, both_passes(options)(q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_partial_results_of_16_bits_are_merged_in_32(strategy):
    given = [x.astype(jnp.bfloat16) for x in arrays()]
    options = dict(mask=masks.causal(), implementation="tiled")
    where = dict(mesh=mesh_of(), sequence=SEQUENCE, strategy=strategy)
    exact = attention(*(x.astype(jnp.float32) for x in given), mask=masks.causal())
    error, alone = (
        float(jnp.abs(run(*given)[0].astype(jnp.float32) - exact).max())
        for run in (both_passes(options, **where), both_passes(options))
    )
    assert error <= 1.01 * alone


@pytest.mark.slow
def test_a_ring_holds_few_keys():
    """The backward pass needs no partial result."""
    shape = [jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)] * 3
    mesh = mesh_of()
    place = NamedSharding(mesh, Spec(None, SEQUENCE))

    def temporaries(strategy):
        run = both_passes(
            dict(implementation="tiled"),
            mesh=mesh,
            sequence=SEQUENCE,
            strategy=strategy,
        )
        shardings = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shape
        ]
        analysis: Any = run.lower(*shardings).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temporaries("ring") < temporaries("all_gather")


def test_modules_take_the_mesh_from_the_context():
    model = nn.Decoder.standard(
        48,
        features=16,
        num_heads=4,
        num_layers=1,
        mask=masks.sliding_window(5, 0),
        position=nn.Rotary,
        dropout_rate=0.1,
        rngs=nnx.Rngs(0),
    )
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 48)
    mesh = mesh_of()

    def step(params, tokens, **where):
        def loss(params):
            model = nnx.merge(structure, params, rest, copy=True)
            return (model(tokens) ** 2).mean()

        with sharding.use(mesh, **where):
            return jax.value_and_grad(loss)(params)

    wanted = jax.jit(step)(params, tokens)
    place = NamedSharding(mesh, Spec(None, SEQUENCE))
    run = jax.jit(lambda p, t: step(p, t, sequence=SEQUENCE))
    compiled = run.lower(params, jax.device_put(tokens, place)).compile()
    found = compiled(params, jax.device_put(tokens, place))
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    # No keys are gathered.
    assert "all-gather" not in collectives(compiled)


def test_a_step_of_decoding_is_computed_as_without():
    q, k, v = arrays()
    with sharding.use(mesh_of(), sequence=SEQUENCE):
        one = attention(q[:, :1], k, v)
    close([one], [attention(q[:, :1], k, v)])


@pytest.mark.slow
def test_inside_shard_map_arrays_are_one_devices():
    mesh = mesh_of()
    spec = Spec(("x", "y"))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    def attend(q, k, v):
        with sharding.use(mesh, sequence="y"):
            return attention(q, k, v)

    close([attend(*arrays())], [attention(*arrays())])


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        (dict(sequence="z"), ValueError, "sequence: expected axes of the mesh"),
        (dict(sequence=None), ValueError, "sequence: expected an axis of the mesh"),
        (dict(sequence="x", batch="x"), ValueError, "'x' is named twice"),
        (dict(sequence="x", strategy="star"), ValueError, "strategy: expected one of"),
        (dict(sequence="x", mesh=None), ValueError, "mesh: expected a mesh"),
        (dict(sequence="x", mesh=3), TypeError, "mesh: expected a jax.sharding.Mesh"),
        (
            dict(sequence="x", window=3),
            TypeError,
            r"sharding.attention\(\) got an unexp",
        ),
    ],
)
def test_clear_errors(where, error, said):
    options: dict[str, Any] = {"mesh": mesh_of(), **where}
    with pytest.raises(error, match=said):
        sharding.attention(*arrays(), **options)


def test_a_sequence_shorter_than_the_devices():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="query: length T=3 is less than the 4 shards"):
        sharding.attention(q[:, :3], k, v, mesh=mesh_of(), sequence=SEQUENCE)


def test_a_mask_of_another_length():
    mask = masks.documents(np.zeros(T + 1, int))
    with pytest.raises(ValueError, match="built for length 33"):
        sharding.attention(*arrays(), mask=mask, mesh=mesh_of(), sequence=SEQUENCE)
