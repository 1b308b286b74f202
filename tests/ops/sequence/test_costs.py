"""What devices send is what was predicted, to the byte; and it follows the plan."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from attnlab import explain, masks, sharding
from attnlab._src.masks.bound import known_bound
from attnlab._src.ops.sequence.needs import Lengths, needs_of
from attnlab._src.ops.sequence.schedule import ring_hops, schedule_of
from attnlab._src.placement import STRATEGIES
from tests.devices import mesh_of, received
from tests.grid import few

COUNT, T = 4, 64
PATTERNS = {
    "full": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(5, 0),
    "two sides": masks.sliding_window(3, 20),
    "anchors": masks.causal() & (masks.sliding_window(5, 0) | masks.prefix(2)),
    "two anchors": masks.sliding_window(2, 2) | masks.anchor((0, 40), see_all=False),
    "anchors that see all": masks.sliding_window(3, 3) | masks.anchor(2),
    "chunks": masks.chunked(24),
    "dilated": masks.dilated_window(12, 12, 4),
    # Constants of the program.
    "documents": masks.documents(np.arange(T) // 13),
    "random": masks.random_blocks(3, blocks_per_row=1, block_size=4, num_blocks=16)
    | masks.sliding_window(3, 3),
}
EVERYTHING = ("full", "all_to_all"), ("full", "all_gather")


def arrays(length=T, heads=4):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, length, heads, 8)) for k in keys]


def compiled(mask, strategy, length=T, backward=False, **options):
    mesh = mesh_of()
    place = NamedSharding(mesh, Spec(None, ("x", "y")))

    def attend(q, k, v):
        return sharding.attention(
            q,
            k,
            v,
            mask=mask,
            mesh=mesh,
            sequence=("x", "y"),
            strategy=strategy,
            implementation="tiled",
            **options,
        )

    def back(q, k, v):
        output, pull = jax.vjp(attend, q, k, v)
        return pull(output)

    given = [jax.device_put(x, place) for x in arrays(length)]
    return jax.jit(back if backward else attend).lower(*given).compile()


def predicted(mask, length=T):
    shape = jax.ShapeDtypeStruct((2, length, 4, 8), jnp.float32)
    mesh = AbstractMesh((COUNT,), ("x",))
    return sharding.cost(shape, shape, shape, mask=mask, mesh=mesh, sequence="x")


@pytest.mark.parametrize(
    ("pattern", "strategy"),
    few(
        # Where all keys are sent, no pattern changes how many.
        [*itertools.product(PATTERNS, ("exchange", "ring")), *EVERYTHING],
        ("anchors that see all", "exchange"),
        ("causal", "ring"),
        ("random", "exchange"),
        *EVERYTHING,
    ),
)
def test_bytes_are_those_predicted(pattern, strategy):
    mask = PATTERNS[pattern]
    cost = predicted(mask).strategies[strategy]
    assert received(compiled(mask, strategy), COUNT) == cost.bytes_forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "strategy"),
    [*zip(PATTERNS, itertools.cycle(STRATEGIES))]
    + [("causal", "ring"), ("full", "ring"), ("anchors", "exchange")],
)
def test_bytes_of_both_passes(pattern, strategy):
    mask = PATTERNS[pattern]
    cost = predicted(mask).strategies[strategy]
    found = received(compiled(mask, strategy, backward=True), COUNT)
    both = cost.bytes_forward + cost.bytes_backward
    if strategy == "ring":
        # XLA sees that both passes send the same keys at first, and sends them once.
        both -= min(ring_hops(mask, Lengths(COUNT, T, T)), 1) * 2 * T // COUNT * 256
    assert found == both


def test_a_window_costs_the_same_whatever_the_length():
    mask = PATTERNS["anchors"]
    costs = {
        (length, count): sharding.cost(
            *[jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)] * 3,
            mask=mask,
            mesh=AbstractMesh((count,), ("x",)),
            sequence="x",
        )
        for length in (1024, 65536)
        for count in (4, 16)
    }
    assert {cost.strategy for cost in costs.values()} == {"exchange"}
    row = 2 * 4 * 8 * 4
    for (_, count), cost in costs.items():
        anchors = 2 * 2 * (count - 1) / count
        found = cost.strategies["exchange"].bytes_forward
        assert found == int((5 + anchors) * row)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [T, 61])
def test_each_device_gets_the_keys_that_it_needs(pattern, length):
    mask = PATTERNS[pattern]
    if pattern == "documents":
        mask = masks.documents(np.arange(length) // 13)
    mask = None if mask is None else known_bound(mask)
    lengths = Lengths(COUNT, length, length)
    dense = (masks.full() if mask is None else mask).to_dense(length)
    dense = np.asarray(dense).reshape(length, length)
    needs, schedule = needs_of(mask, lengths), schedule_of(mask, lengths)
    for shard in range(COUNT):
        first = shard * lengths.keys
        queries = slice(first, first + lengths.queries)
        wanted = {int(s) for s in np.flatnonzero(dense[queries].any(0))}
        needed = {
            int(slot)
            for e in np.flatnonzero(needs.by[shard])
            for slot in needs.starts[e] + np.arange(needs.sizes[e])
        }
        assert wanted <= needed
        if pattern != "dilated":
            assert wanted == needed
        lists = [schedule.everyone, *(table for _, table in schedule.hops)]
        listed = [int(s) for table in lists for s in table.slots[shard] if s >= 0]
        near = range(first - schedule.left, first + lengths.keys + schedule.right)
        assert needed <= {*listed, *near}
        # A key that came twice would count twice.
        assert len({*listed}) == len(listed)
        assert not {*listed} & {*near}


def test_queries_that_see_all_go_to_the_keys():
    """Anchors of Longformer cost O(anchors), whatever the length."""
    mask = masks.sliding_window(8, 8) | masks.anchor(4)
    found = {
        length: sharding.cost(
            *[jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)] * 3,
            mask=mask,
            mesh=AbstractMesh((8,), ("x",)),
            sequence="x",
        )
        for length in (1024, 65536, 65539)
    }
    assert {cost.strategy for cost in found.values()} == {"exchange"}
    sent = {cost.strategies["exchange"].bytes_forward for cost in found.values()}
    assert len(sent) == 1
    # Shards behind the end hold no key.
    assert ring_hops(mask, Lengths(8, 9, 9)) == 7
    assert schedule_of(mask, Lengths(8, 9, 9)).received > 0


def test_data_that_are_arguments_are_unknown():
    """New ids must not compile anew, so everything that may be seen is sent."""
    ids = np.arange(T) // 13
    shape = jax.ShapeDtypeStruct((T,), jnp.int32)
    known = predicted(masks.documents(ids))
    unknown = predicted(jax.eval_shape(masks.documents, shape))
    everything = predicted(masks.full()).strategies["ring"].bytes_forward
    assert known.strategy == "exchange"
    assert known.strategies["exchange"].bytes_forward < everything / 2
    # Of each key its id, and whether any query sees it.
    data = (4 + 1) * (COUNT - 1) * T // COUNT
    assert unknown.strategies["ring"].bytes_forward == everything + data


def test_work_is_counted_for_each_shard():
    cost = predicted(masks.causal(), 1024)
    ring, turned = cost.strategies["ring"], cost.strategies["all_to_all"]
    assert ring.pairs == tuple(128 * 128 * n for n in (3, 7, 11, 15))
    assert round(ring.imbalance, 3) == 1.667
    assert turned.imbalance == 1.0
    assert "1.67 x mean" in str(cost)


def test_the_choice_takes_the_fewest_bytes():
    assert predicted(masks.sliding_window(5, 0)).strategy == "exchange"
    assert predicted(masks.causal(), 1024).strategy == "all_to_all"
    heads = [jax.ShapeDtypeStruct((2, 1024, n, 8), jnp.float32) for n in (4, 1, 1)]
    mesh = AbstractMesh((COUNT,), ("x",))
    cost = sharding.cost(*heads, mask=masks.causal(), mesh=mesh, sequence="x")
    assert cost.strategy == "ring"
    assert "1 key heads do not divide" in str(cost)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        (masks.causal(), 2 * COUNT - 1),
        (masks.full(), 1),
        (masks.sliding_window(100, 0), 1),
        (masks.documents(np.repeat([0, 1, 2], [640, 256, 128])) & masks.causal(), None),
    ],
)
def test_a_balanced_order_is_even(mask, runs):
    length = 1024
    order = sharding.balanced_order(mask, length, COUNT)
    assert sorted(order) == [*range(length)]
    assert runs is None or 1 + (np.diff(order) != 1).sum() == runs
    visible = np.asarray(mask.to_dense(length)).reshape(length, length)
    work = visible.sum(1)[order].reshape(COUNT, -1).sum(1)
    assert work.max() <= 1.1 * work.mean()
    # Dealt evenly, the ring is as even as all-to-all.
    if mask is not None and not jax.tree.leaves(mask):
        shape = jax.ShapeDtypeStruct((1, length, 4, 8), jnp.float32)
        cost = sharding.cost(
            *[shape] * 3,
            mask=mask,
            query_positions=order,
            key_positions=order,
            mesh=AbstractMesh((COUNT,), ("x",)),
            sequence="x",
        )
        assert cost.strategies["ring"].imbalance <= 1.1


def test_explain_tells_what_a_mesh_costs():
    shape = [jax.ShapeDtypeStruct((6, 1024, n, 8), jnp.float32) for n in (8, 2, 2)]
    mesh = AbstractMesh((4, 2, 2), ("data", "model", "sequence"))
    assert explain(*shape).mesh is None
    with sharding.use(mesh, batch="data", heads="model", sequence="sequence"):
        said = explain(*shape, mask=masks.sliding_window(16, 0))
    assert said.mesh is not None
    assert said.mesh.parts == {"B": 1, "T": 2, "N": 2, "K": 2}
    assert "B=6 is not divided by data: each device computes all of it" in str(said)
    assert "keys reach queries by exchange" in str(said)
    # A step of decoding is computed as if the sequence were not sharded.
    one = jax.ShapeDtypeStruct((8, 1, 8, 8), jnp.float32)
    memory = [jax.ShapeDtypeStruct((8, 1024, 2, 8), jnp.float32)] * 2
    with sharding.use(mesh, sequence="sequence"):
        decoding = explain(one, *memory).mesh
    assert decoding is not None
    assert not decoding.strategies
    assert "T=1 is not divided by sequence" in str(decoding)
    few = sharding.cost(*shape, mesh=mesh, heads=("data", "model"))
    assert few.parts["K"] == 1
    # Each of 8 devices has a head of its own, and all keys: gradients are summed.
    assert few.bytes_summed == round(2 * 2 * 6 * 1024 * 2 * 8 * 4 * 7 / 8)
    assert few.strategy is None
