"""Sharded inputs stay sharded: what a device computes, and what devices send."""

import dataclasses
import functools
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnlab import attention, masks, modifiers, nn, scores, sharding
from attnlab._src.ops import partition, primitive
from attnlab._src.types import Modifier, Sizes, pytree
from tests.devices import collectives, mesh_of
from tests.grid import NATIVE, few

B, T, N, H = 4, 32, 4, 8
RNG = jax.random.key(7)


def arrays(key_heads=N):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, N, H), (B, T, key_heads, H), (B, T, key_heads, H)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def ids():
    return np.sort(np.random.default_rng(0).integers(0, 3, (B, T)))


#: By name, key heads and what else attention is given.
CASES: dict[str, Any] = {
    "plain": lambda: (N, {}),
    "grouped": lambda: (2, dict(mask=masks.causal() & masks.sliding_window(9, 0))),
    "one key head": lambda: (1, dict(mask=masks.causal())),
    "bias": lambda: (N, dict(modifiers=[modifiers.bias(random(N, T, T))])),
    "bias of examples": lambda: (
        2,
        dict(modifiers=[modifiers.bias(random(B, 1, T, T))]),
    ),
    "alibi": lambda: (N, dict(modifiers=[modifiers.alibi(N)])),
    "soft cap": lambda: (2, dict(modifiers=[modifiers.soft_cap(5.0)])),
    "dropout": lambda: (N, dict(dropout_rate=0.3, dropout_rng=RNG)),
    "additive": lambda: (N, dict(score=additive())),
    "mlp": lambda: (2, dict(score=scores.mlp.init(RNG, H, hidden_sizes=(6,)))),
    "cosine": lambda: (N, dict(score=scores.cosine(2.0))),
    "sinks": lambda: (N, dict(sinks=jnp.arange(4.0))),
    "big bird": lambda: (
        N,
        dict(
            mask=masks.big_bird(
                window=4, anchors=2, random_blocks=1, rng=RNG, block_size=8
            )
        ),
    ),
    "documents": lambda: (2, dict(mask=masks.documents(ids()[:1]))),
    "documents of examples": lambda: (N, dict(mask=masks.documents(ids()))),
    "lengths": lambda: (N, dict(mask=masks.lengths(key=np.arange(B) * 7 + 5))),
    "offset": lambda: (2, dict(mask=masks.causal(), query_offset=3)),
    "offsets": lambda: (N, dict(mask=masks.causal(), query_offset=np.arange(B))),
    "positions": lambda: (
        N,
        dict(
            mask=masks.causal(),
            query_positions=np.arange(T) * 2,
            key_positions=np.arange(T) * 2,
        ),
    ),
}
#: Of queries and of keys; two axes of a mesh of four devices.
PLACES = {
    "batch": (Spec(("x", "y")),) * 2,
    "heads": (Spec(None, None, ("x", "y")),) * 2,
    "queries": (Spec(None, ("y", "x")), Spec()),
    "both": (Spec("y", None, "x"),) * 2,
}


def random(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def additive():
    return scores.additive.init(RNG, H, hidden_size=5, num_heads=N)


def placed(mesh, values, specs):
    return [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(values, specs, strict=True)
    ]


def both_passes(implementation, options):
    def run(q, k, v):
        def attend(q, k, v):
            return attention(q, k, v, implementation=implementation, **options)

        output, pull = jax.vjp(attend, q, k, v)
        return output, *pull(jnp.sin(output))

    return jax.jit(run)


def fits(spec, heads):
    """Key heads that do not divide among the devices lie whole on each."""
    axes = spec[2] if len(spec) > 2 else None
    count = 2 ** len(axes) if axes else 1
    return spec if heads % count == 0 else Spec(*spec[:2])


#: Each case in each place, with one implementation after the other.
COMBINED = [
    (name, place, (NATIVE, "tiled")[(i + j) % 2])
    for i, name in enumerate(CASES)
    for j, place in enumerate(PLACES)
]


@functools.cache
def on_one_device(name):
    """A case's arrays and results, of which no mesh knows."""
    key_heads, options = CASES[name]()
    given = arrays(key_heads)
    return given, both_passes("tiled", options)(*given)


@pytest.mark.parametrize(
    ("name", "place", "implementation"),
    few(
        COMBINED,
        ("grouped", "batch", "tiled"),
        ("grouped", "queries", "tiled"),
        ("grouped", "heads", NATIVE),
        ("one key head", "both", "tiled"),
    ),
)
def test_sharded_inputs_stay_sharded(name, place, implementation):
    key_heads, options = CASES[name]()
    (q, k, v), wanted = on_one_device(name)
    run = both_passes(implementation, options)
    query, key = PLACES[place]
    key = fits(key, key_heads)
    mesh = mesh_of()
    given = placed(mesh, (q, k, v), (query, key, key))
    compiled = run.lower(*given).compile()
    found = compiled(*given)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    for x in found[:2]:
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, query), 4)
    sent = collectives(compiled)
    if key == query:
        assert sent == {}
        return
    # Gradients of what several devices read are summed. Which keys are seen at all is
    # asked of all queries, a flag for each.
    flags = 8 * B * T if place == "queries" else 0
    assert 0 < sent.pop("all-reduce") <= k.nbytes + v.nbytes + flags
    assert sent.pop("all-gather", 0) <= k.nbytes + v.nbytes
    assert sent == {}

    @jax.jit
    def forward(q, k, v):
        return attention(q, k, v, implementation=implementation, **options)

    sent = collectives(forward.lower(*given).compile())
    assert sum(sent.values()) <= flags


@pytest.mark.parametrize("place", few(PLACES, "both"))
def test_explicit_axes(place):
    q, k, v = arrays(2)
    run = both_passes("tiled", dict(mask=masks.causal()))
    wanted = run(q, k, v)
    query, key = PLACES[place]
    key = fits(key, 2)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        given = placed(mesh, (q, k, v), (query, key, key))
        compiled = run.lower(*given).compile()
        found = compiled(*given)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, query), 4)
    if key == query:
        assert collectives(compiled) == {}


@pytest.mark.parametrize("told", [False, True])
def test_a_partly_manual_mesh(told):
    """Within a ``shard_map`` over one axis, the other is known if somebody tells it."""
    q, k, v = arrays()
    mesh = mesh_of()
    run = both_passes("tiled", dict(mask=masks.causal()))

    def local(q, k, v):
        if told:
            with sharding.use(mesh, batch="x", heads="y"):
                return run(q, k, v)
        return run(q, k, v)

    example, heads = Spec("x"), Spec("x", None, "y")
    mapped = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=example, out_specs=example, axis_names={"x"}
        )
    )
    given = placed(mesh, (q, k, v), (heads,) * 3)
    compiled = mapped.lower(*given).compile()
    for one, other in zip(compiled(*given), run(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    # Where nobody tells it, what the other axis shards is gathered.
    assert bool(collectives(compiled)) is not told


def test_key_heads_that_do_not_divide():
    """Three key heads of two query heads each, on two devices: heads are gathered."""
    q = jnp.concatenate(arrays()[:2], 2)[:, :, :6]
    k = q[:, :, 1:4] + 1
    run = both_passes("tiled", dict(mask=masks.causal()))
    given = placed(mesh_of(), (q, k, k), (Spec(None, None, "x"), Spec(), Spec()))
    for one, other in zip(run(*given), run(q, k, k), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", few([NATIVE, "tiled"], "tiled"))
def test_devices_that_share_a_key_head_have_all(implementation, monkeypatch):
    """Four devices along one axis, two key heads: each picks the one that it needs."""
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, Spec(None, None, "heads"))

    # As for several TPUs, whose compiler knows no rules.
    def as_placed(run: Any, structure: Any, avals: Any, wanted: Any) -> Any:
        return partition.divided_as_placed(run, structure, avals, wanted, place)

    monkeypatch.setattr(primitive, "divided", as_placed)
    q, k, v = arrays(2)
    run = both_passes(implementation, dict(mask=masks.causal()))
    given = placed(mesh, (q, k, v), (place.spec, Spec(), Spec()))
    compiled = run.lower(*given).compile()
    found = compiled(*given)
    for one, other in zip(found, run(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
    assert found[0].sharding.is_equivalent_to(place, 4)
    # Gradients of keys and values are summed; nothing else is sent.
    assert collectives(compiled) == {"all-reduce": k.nbytes + v.nbytes}


@pytree
class ByHead(Modifier):
    """Adds the number of the head times the distance."""

    def apply(self, logits, tile, *operands):
        distance = tile.query_positions - tile.key_positions
        return logits + 0.1 * (tile.head * distance).astype(logits.dtype)


@pytest.mark.parametrize(
    "options",
    [
        dict(mask=masks.per_head([masks.causal()] * 2 + [masks.full()] * 2)),
        dict(modifiers=[ByHead()]),
    ],
    ids=["mask", "modifier"],
)
def test_heads_that_are_counted_are_gathered(options):
    """A shard of the heads does not know which ones they are."""
    q, k, v = arrays()
    run = both_passes("tiled", options)
    given = placed(mesh_of(), (q, k, v), (Spec(None, None, "x"),) * 3)
    for one, other in zip(run(*given), run(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("check", few([True, False], True))
def test_dropout_inside_shard_map_is_that_of_one_device(check):
    q, k, v = arrays()
    mesh = mesh_of()

    def attend(q, k, v):
        drops = dict(dropout_rate=0.4, dropout_rng=RNG)
        return attention(q, k, v, implementation="tiled", **drops)

    def local(q, k, v):
        with sharding.use(mesh, batch="x", heads="y"):
            return attend(q, k, v)

    spec = Spec("x", None, "y")
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check
    )
    wanted = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(jax.jit(run)(q, k, v), wanted, atol=2e-5)


def test_data_of_all_heads_inside_shard_map():
    """A device takes those of its own heads."""
    q, k, v = arrays()
    mesh, spec = mesh_of(), Spec("x", None, "y")
    score = scores.additive.init(RNG, H, hidden_size=5, num_heads=1)
    seen = np.asarray(random(N, T, T) > -1)

    def attend(q, k, v):
        return attention(
            q,
            k,
            v,
            score=dataclasses.replace(score, weight=random(N, 5)),
            mask=seen,
            modifiers=[modifiers.alibi(N), modifiers.bias(random(N, 1, T))],
            sinks=jnp.arange(4.0),
            implementation="tiled",
        )

    def local(q, k, v):
        with sharding.use(mesh, batch="x", heads="y"):
            return attend(q, k, v)

    run = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    wanted = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(jax.jit(run)(q, k, v), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", few(["tiled", "native", "reference"], "tiled"))
def test_a_mask_for_all_heads_inside_shard_map(name, tile):
    """A device takes the masks of its own heads, whose hidden blocks it skips."""
    tile(8, 8)
    q, k, v = arrays()
    mesh, spec = mesh_of(), Spec("x", None, "y")
    kinds = masks.causal(), masks.sliding_window(2, 2), masks.full(), masks.chunked(5)
    mask = masks.per_head(kinds) & ~masks.anchor(1)

    def local(q, k, v):
        with sharding.use(mesh, batch="x", heads="y"):
            return attention(q, k, v, mask=mask, implementation=name)

    run = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)

    def own(q, k, v):
        return (run(q, k, v) ** 2).sum()

    def whole(q, k, v):
        return (attention(q, k, v, mask=mask, implementation=name) ** 2).sum()

    each = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (own, whole)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), *each
    )


def test_a_context_says_how_queries_are_sharded():
    """It decides how programs for several TPUs are made; elsewhere nothing changes."""
    q, k, v = arrays()
    mesh = mesh_of()

    def attend(q, k, v):
        return attention(q, k, v, mask=masks.causal(), implementation="tiled")

    @jax.jit
    def told(q, k, v):
        with sharding.use(mesh, batch="x", heads="y", sequence=()):
            return attend(q, k, v)

    given = placed(mesh, (q, k, v), (Spec("x", None, "y"),) * 3)
    np.testing.assert_allclose(told(*given), jax.jit(attend)(q, k, v), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch="z"), r"batch: expected axes of the mesh \(x, y\), got 'z'"),
        (dict(batch="x", heads=("y", "x")), "heads: axis 'x' is named twice"),
    ],
)
def test_axes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message), sharding.use(mesh_of(), **options):
        pass


def test_a_mesh_that_is_none():
    wrong: Any = "x"
    with pytest.raises(TypeError, match=r"mesh: expected a jax.sharding.Mesh, got str"):
        sharding.use(wrong).__enter__()
    number: Any = 3
    with pytest.raises(TypeError, match="batch: expected the name of an axis .* 3"):
        sharding.use(mesh_of(), batch=number).__enter__()


#: Prints, by how queries are sharded, how many kernels a program for four TPUs has.
TPUS = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from attnlab import attention, masks, sharding

described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
devices = np.array(described.devices)
kinds = AxisType.Auto, AxisType.Explicit
auto, explicit = (Mesh(devices, ("x",), axis_types=(kind,)) for kind in kinds)

def attend(q, k, v):
    return attention(q, k, v, mask=masks.causal())

def told(q, k, v):
    with sharding.use(auto, batch="x"):
        return attend(q, k, v)

manual = jax.shard_map(attend, mesh=auto, in_specs=(P("x"),) * 3, out_specs=P("x"))
for name, mesh, call in (
    ("unknown", auto, attend),
    ("told", auto, told),
    ("manual", auto, manual),
    ("explicit", explicit, attend),
):
    def loss(*arrays):
        return call(*arrays).astype(jnp.float32).sum()

    place = NamedSharding(mesh, P("x"))
    x = jax.ShapeDtypeStruct((8, 512, 4, 128), jnp.bfloat16, sharding=place)
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x)
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    print("found", name, text.count("tpu_custom_call"), "all-gather" in text)
"""


def test_shards_of_unequal_sizes_are_gathered():
    """XLA may shard what is computed unevenly: here three examples on four devices."""

    def run(x):
        def loss(x):
            return (attention(x, x, x, implementation="tiled") ** 2).sum()

        return jax.grad(loss)(x[:3])

    x = arrays()[0]
    given = jax.device_put(x, NamedSharding(mesh_of(), Spec(("x", "y"))))
    np.testing.assert_allclose(jax.jit(run)(given), jax.jit(run)(x), atol=2e-5)


def test_no_program_is_taken_for_another():
    """Masks of one shape of data can be alike in the text of the program."""
    x = jax.device_put(arrays()[0], NamedSharding(mesh_of(), Spec("x")))

    def text(mask):
        def attend(x):
            return attention(x, x, x, mask=mask, implementation="tiled")

        lowered = jax.jit(attend).lower(x).as_text()
        return re.sub(r"backend_config = \S+", "", lowered)

    assert text(masks.sliding_window(3, 0)) != text(masks.sliding_window(4, 0))


@pytest.mark.slow
def test_programs_for_several_tpus():
    pytest.importorskip("libtpu")
    run = [sys.executable, "-c", TPUS]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [x.split()[1:] for x in done.stdout.splitlines() if x.startswith("found")]
    found = {name: (int(kernels) > 0, gathers) for name, kernels, gathers in lines}
    kernels_alone = (True, "False")
    assert found == {
        "unknown": (False, "True"),  # in pure XLA, which gathers
        "told": kernels_alone,
        "manual": kernels_alone,
        "explicit": kernels_alone,
    }


@pytest.mark.slow
def test_vmap_scan_and_remat():
    q, k, v = arrays()
    mesh = mesh_of()

    def run(q, k, v):
        def attend(q, k, v):
            return attention(q, k, v, mask=masks.causal(), implementation="tiled")

        def step(q, _):
            return jax.checkpoint(attend)(q, k, v), None

        def loss(q, k, v):
            many = jax.vmap(attend)(q, k, v)
            return (jax.lax.scan(step, q, None, length=2)[0] * many).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    given = placed(mesh, (q, k, v), (Spec(("x", "y")),) * 3)
    compiled = jax.jit(run).lower(*given).compile()
    assert collectives(compiled) == {}
    for one, other in zip(compiled(*given), jax.jit(run)(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_data_parallel_step():
    """Each device computes its part of the batch; gradients are summed once."""
    model = nn.Decoder.standard(
        20,
        features=16,
        num_heads=2,
        num_layers=2,
        residual=nn.PreNorm,
        rngs=nnx.Rngs(0),
    )
    structure, params = nnx.split(model)
    tokens = jax.random.randint(RNG, (8, 64), 0, 20)

    def loss(params, tokens):
        logits = nnx.merge(structure, params)(tokens)[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return each.mean()

    step = jax.jit(jax.value_and_grad(loss))
    alone = step.lower(params, tokens).compile()
    mesh = mesh_of()
    given = (
        jax.device_put(params, NamedSharding(mesh, Spec())),
        jax.device_put(tokens, NamedSharding(mesh, Spec(("x", "y")))),
    )
    shared = step.lower(*given).compile()
    assert set(collectives(shared)) == {"all-reduce"}
    parameters = sum(x.nbytes for x in jax.tree.leaves(params))
    assert collectives(shared)["all-reduce"] < 1.1 * parameters + 64
    costs = [compiled.cost_analysis() or {} for compiled in (shared, alone)]
    assert costs[0]["flops"] < 0.3 * costs[1]["flops"]
    results = shared(*given), alone(params, tokens)
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_many_devices_have_few_orders():
    """All permutations of the prime factors of 4,096 would be 479 million."""
    assert [*partition._factorings(4096)] == [(2,) * 12]
    assert sorted(partition._factorings(12)) == [(2, 2, 3), (2, 3, 2), (3, 2, 2)]


ORDERS = [
    (Spec("x", None, "y"), (2, 1, 2)),
    (Spec("y", None, "x"), (2, 1, 2)),
    (Spec(None, ("y", "x")), (1, 4, 1)),
    (Spec(("x", "y")), (4, 1, 1)),
    (Spec(None, None, "y"), (1, 1, 2)),
    (Spec(), (1, 1, 1)),
]


@pytest.mark.parametrize(("spec", "parts"), ORDERS)
def test_what_lies_where_is_read_from_the_devices(spec, parts):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    sharding = NamedSharding(mesh, spec)
    found, places = partition._places(sharding, Sizes(4, 8, 8, 4, 4, 2, 2))
    count = tuple(int(np.prod([found.shape[a] for a in axes])) for axes in places)
    assert count == parts
    same = NamedSharding(found, Spec(*(axes or None for axes in places)))
    assert same.is_equivalent_to(sharding, 4)
