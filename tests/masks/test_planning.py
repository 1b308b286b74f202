"""Plans agree with the dense mask, are small, and are NumPy for structural masks."""

import functools
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlab import attention, masks
from attnlab._src.masks import liveness, planning
from attnlab._src.nn.anchors import Rows
from attnlab._src.ops import prepare
from tests.grid import in_turn

T, S = 37, 29
BLOCKS = [(4, 4), (8, 3), (37, 29), (5, 16), (1, 1), (64, 2)]


def third(t, s):
    return (t * s) % 3 == 0


def _all(t=T, s=S, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        full=masks.full(),
        causal=masks.causal(),
        window=masks.sliding_window(3, 5),
        one_sided=masks.sliding_window(2, None),
        dilated=masks.dilated_window(6, 4, 2),
        anchor=masks.anchor([0, 7, 8, 20]),
        anchor_seen=masks.anchor([3, 11], see_all=False),
        anchor_data=masks.anchor(np.array([3, -1, 30])),
        chunked=masks.chunked(5),
        prefix=masks.prefix(4),
        documents=masks.documents(
            np.sort(rng.integers(-1, 4, (2, t))), np.sort(rng.integers(-1, 4, (2, s)))
        ),
        unsorted=masks.documents(rng.integers(-1, 4, t), rng.integers(-1, 4, s)),
        lengths=masks.lengths(query=np.array([5, t]), key=np.array([s, 11])),
        dense=masks.dense(rng.random((t, s)) < 0.1),
        dense_keys=masks.dense(rng.random((2, 1, 1, s)) < 0.5),
        dense_queries=masks.dense(rng.random((3, t, 1)) < 0.5),
        drawn=masks.random_blocks(1, 2, 4, max(t, s) // 4 + 2),
        blocks=masks.blocks(rng.integers(-1, 5, (t // 4 + 1, 2)), 4),
        per_head=masks.per_head([
            masks.causal(),
            masks.sliding_window(2, 2) | masks.anchor(2),
            ~masks.full(),
        ]),
        predicate=masks.predicate(third),
    )


MASKS = _all()


def dense(mask, t, s):
    """The dense mask ``[B or 1, N or 1, T, S]``."""
    made = np.asarray(jax.jit(lambda mask: mask.to_dense(t, s))(mask))
    return made.reshape((1,) * (4 - made.ndim) + made.shape)


@functools.cache
def dense_of(name, t=T, s=S):
    return dense(MASKS[name], t, s)


def check(mask, wanted, block_q, block_k):
    """Dead blocks hide all, full blocks show all, no block is listed twice.

    Returns:
        The number of partial blocks that are in fact dead or full.
    """
    plan = mask.plan(*wanted.shape[2:], block_size=(block_q, block_k))
    assert (plan.block_q, plan.block_k) == (block_q, block_k)
    return check_plan(plan, wanted, block_q, block_k)


def check_plan(plan, wanted, block_q, block_k):
    """:func:`check` of a plan that was made."""
    assert plan.cols is not None
    loose = 0
    for live, visible, size, other in (
        (plan.rows, wanted, block_q, block_k),
        (plan.cols, wanted.swapaxes(2, 3), block_k, block_q),
    ):
        full, partial = ([np.asarray(x) for x in intervals] for intervals in live)
        lead = np.broadcast_shapes(visible.shape[:2], full[0].shape[:2])
        counts = -(-visible.shape[2] // size), -(-visible.shape[3] // other)
        for b, h in itertools.product(range(lead[0]), range(lead[1])):
            seen = visible[b % visible.shape[0], h % visible.shape[1]]
            for i in range(counts[0]):
                listed = []
                for lo, hi in (full, partial):
                    blocks = np.zeros(counts[1], int)
                    row = b % lo.shape[0], h % lo.shape[1], i
                    for first, stop in zip(lo[row], hi[row], strict=True):
                        assert first >= 0 or stop <= first
                        assert stop <= max(counts[1], first)
                        blocks[first:stop] += 1
                    listed.append(blocks)
                assert (listed[0] + listed[1] <= 1).all()
                for j in range(counts[1]):
                    block = seen[i * size : (i + 1) * size, j * other : (j + 1) * other]
                    if listed[0][j]:
                        assert block.all()
                        assert block.shape[1] == other
                    elif not listed[1][j]:
                        assert not block.any()
                    else:
                        loose += not block.any() or block.all()
    return loose


@pytest.mark.parametrize("name", MASKS)
def test_sound_and_the_complement_too(name):
    for block_q, block_k in BLOCKS:
        check(MASKS[name], dense_of(name), block_q, block_k)
        check(~MASKS[name], ~dense_of(name), block_q, block_k)


@pytest.mark.parametrize("name", MASKS)
def test_combinations_are_sound(name):
    for more, other in MASKS.items():
        check(MASKS[name] & other, dense_of(name) & dense_of(more), 8, 4)
        check(MASKS[name] | ~other, dense_of(name) | ~dense_of(more), 8, 4)


@pytest.mark.parametrize("sizes", BLOCKS)
@pytest.mark.parametrize("name", ["full", "causal", "window", "chunked", "prefix"])
def test_structural_plans_are_tight(name, sizes):
    """No block is partial that could be dead or full."""
    t, s = (sizes[0] * 5, sizes[1] * 6)
    t, s = (t, s) if t * s < 4000 else sizes
    assert check(MASKS[name], dense_of(name, t, s), *sizes) == 0


@pytest.mark.parametrize(
    "name", ["full", "causal", "window", "dilated", "anchor", "chunked", "prefix"]
)
def test_static_plans_are_numpy(name):
    plan = MASKS[name].plan(T, S, block_size=8)
    assert plan.is_static
    for leaf in jax.tree.leaves(plan):
        assert type(leaf) is np.ndarray
        assert leaf.dtype == np.int32
    inside = []

    @jax.jit
    def traced(x):
        inside.append(MASKS[name].plan(T, S, block_size=8).is_static)
        return x

    traced(jnp.zeros(()))
    assert inside == [True]


@pytest.mark.parametrize(
    "name", ["documents", "lengths", "drawn", "dense", "anchor_data"]
)
def test_traced_plans_equal_those_of_the_host(name):
    host = MASKS[name].plan(T, S, block_size=(8, 4))
    traced = jax.jit(lambda m: m.plan(T, S, block_size=(8, 4)))(MASKS[name])
    assert not traced.is_static
    for one, other in ((host.rows, traced.rows), (host.cols, traced.cols)):
        assert one is not None
        assert other is not None
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a.per_row(), b.per_row())


@functools.cache
def planned_at(name):
    """Jitted: ``plan(offset)`` of 13 queries."""

    @jax.jit
    def plan(offset):
        mask = MASKS[name]
        operands = planning.normalise_tree(mask.operands(13, S), (), "mask")
        queries = planning.index_blocks("query", 13, 4, offset)
        return planning.make_plan(
            mask, operands, queries, planning.index_blocks("key", S, 3)
        )

    return plan


@pytest.mark.parametrize("offset", [-9, -1, 0, 3, 11, 40])
@pytest.mark.parametrize(
    "name", ["full", "causal", "window", "anchor", "chunked", "drawn"]
)
def test_offsets_are_sound(name, offset):
    """Plans with an offset agree with rows of the dense mask; rows below 0 are dead."""
    mask, t, s, bq, bk = MASKS[name], 13, S, 4, 3
    large = np.asarray(mask.to_dense(40 if name == "drawn" else 64, s))
    large = large.reshape(large.shape[-2:])
    rows = np.arange(t) + offset
    if name == "drawn":
        rows = np.where(rows < 40, rows, -1)
    visible = np.where((rows >= 0)[:, None], large[np.maximum(rows, 0)], False)
    plan = jax.tree.map(np.asarray, planned_at(name)(np.int32(offset)))
    for live, wanted, size, other in (
        (plan.rows, visible, bq, bk),
        (plan.cols, visible.T, bk, bq),
    ):
        for i in range(-(-wanted.shape[0] // size)):
            for j in range(-(-wanted.shape[1] // other)):
                block = wanted[i * size : (i + 1) * size, j * other : (j + 1) * other]
                inside = [
                    bool(((lo[0, 0, i] <= j) & (j < hi[0, 0, i])).any())
                    for lo, hi in live
                ]
                assert not all(inside)
                assert block.all() or not inside[0]
                assert any(inside) or not block.any()


@functools.cache
def planned_for(name):
    """Jitted: ``plan(query positions, key positions)``."""

    @jax.jit
    def plan(queries, keys):
        return planning.make_plan(
            MASKS[name],
            planning.normalise_tree(MASKS[name].operands(36, 36), (), "mask"),
            planning.position_blocks("query", queries[None], 4),
            planning.position_blocks("key", keys[None], 3),
        )

    return plan


@pytest.mark.parametrize(
    "name",
    ["full", "causal", "window", "anchor", "chunked", "drawn", "blocks", "dilated"],
)
@pytest.mark.parametrize("order", ["far", "permuted", "empty"])
def test_given_positions_are_sound(name, order):
    """Query and key positions that are far apart, permuted, or empty."""
    rng = np.random.default_rng(0)
    full = np.asarray(MASKS[name].to_dense(36, 36)).reshape(36, 36)
    positions = np.arange(0, 36, 3)
    if order == "permuted":
        positions = rng.permutation(36)
    if order == "empty":
        positions = np.where(rng.random(36) < 0.5, -1, np.arange(36))
    other = rng.permutation(positions)
    visible = full[positions[:, None], other[None, :]]
    visible &= (positions >= 0)[:, None] & (other >= 0)[None, :]
    plan = jax.tree.map(np.asarray, planned_for(name)(positions, other))
    for live, wanted, size, across in (
        (plan.rows, visible, 4, 3),
        (plan.cols, visible.T, 3, 4),
    ):
        for i in range(-(-wanted.shape[0] // size)):
            for j in range(-(-wanted.shape[1] // across)):
                block = wanted[i * size : (i + 1) * size, j * across : (j + 1) * across]
                inside = [
                    bool(((lo[0, 0, i] <= j) & (j < hi[0, 0, i])).any())
                    for lo, hi in live
                ]
                assert block.all() or not inside[0]
                assert any(inside) or not block.any()


def test_given_positions_have_full_blocks():
    """Those of a zig-zag order, too; but no block with an empty slot is full."""
    slots = np.arange(64, dtype=np.int32)
    known = masks.causal().plan(64, block_size=4)

    def given(positions):
        query, key = (
            planning.position_blocks(side, positions[None], 4)
            for side in ("query", "key")
        )
        return planning.make_plan(masks.causal(), (), query, key)

    for live in (lambda p: p.rows, lambda p: p.cols):
        for one, other in zip(live(given(slots)), live(known), strict=True):
            np.testing.assert_array_equal(one.per_row(), other.per_row())
    dealt = given(np.r_[slots[:16], slots[48:]])
    assert dealt.rows.full.per_row().sum() == 28
    emptied = given(np.where(slots == 21, -1, slots))
    full = emptied.rows.full
    assert full.per_row()[0, 0, 5] == 0
    assert not ((full.lo <= 5) & (full.hi > 5)).any()


#: The greatest position.
FAR = 2**31 - 1
#: Masks, and their rules for 64-bit positions, which do not overflow.
RULES = (
    (masks.causal(), lambda t, s: s <= t),
    (masks.sliding_window(5, None), lambda t, s: s >= t - 5),
    (masks.sliding_window(2**29, 0), lambda t, s: (t - 2**29 <= s) & (s <= t)),
    (masks.sliding_window(3, FAR - 1), lambda t, s: t - 3 <= s),
    (
        masks.dilated_window(9, 9, 3),
        lambda t, s: (abs(s - t) <= 9) & ((s - t) % 3 == 0),
    ),
    (masks.chunked(5), lambda t, s: t // 5 == s // 5),
    (masks.chunked(2**30), lambda t, s: t // 2**30 == s // 2**30),
    (
        masks.anchor([0, 1_700_000_003, FAR - 2, FAR - 1]),
        lambda t, s: np.isin([t, s], [0, 1_700_000_003, FAR - 2, FAR - 1]).any(0),
    ),
    (
        masks.anchor(np.array([0, 1_700_000_003, -1, FAR])),
        lambda t, s: np.isin([t, s], [0, 1_700_000_003, FAR]).any(0),
    ),
    (
        masks.blocks(np.array([[0, 1], [1, 1]]), 2**30),
        lambda t, s: (t < 2**30) | (s >= 2**30),
    ),
)


def test_plans_of_far_positions_are_sound():
    """Positions up to the greatest one; some keys are near 0, some slots empty."""
    mask = masks.per_head([mask for mask, _ in RULES])

    operands = planning.normalise_tree(mask.operands(12, 12), (), "mask")
    see = jax.jit(
        lambda *places: planning.dense_visible(
            mask, jax.tree.map(jnp.asarray, operands), *places
        )
    )
    for first in (2**30 - 6, 1_700_000_000, FAR - 11):
        own = first + np.arange(12)
        other = np.concatenate([own[::-1][:6], [-1, 0, 3, -1], own[:2]])
        of_other, of_own = (
            np.stack([rule(*np.meshgrid(own, k, indexing="ij")) for _, rule in RULES])
            & (k >= 0)
            for k in (other, own)
        )
        own, other = own.astype(np.int32), other.astype(np.int32)
        seen = see(own[None, None, :, None], other[None, None, None])
        np.testing.assert_array_equal(seen[0], of_other)
        slots = planning.index_blocks("query", 12, 4, np.int32(first))
        keys = planning.position_blocks("key", other[None], 3)
        check_plan(
            planning.make_plan(mask, operands, slots, keys), of_other[None], 4, 3
        )
        queries = planning.position_blocks("query", own[None], 4)
        keys = planning.index_blocks("key", 12, 3, np.int32(first))
        check_plan(
            planning.make_plan(mask, operands, queries, keys), of_own[None], 4, 3
        )


@st.composite
def problems(draw):
    t, s = draw(st.integers(1, 23)), draw(st.integers(1, 23))
    leaves = _all(t, s, draw(st.integers(0, 5)))
    names = st.sampled_from(sorted(leaves))

    def tree(depth):
        if depth == 0:
            return leaves[draw(names)]
        kind = draw(st.sampled_from(["leaf", "not", "and", "or"]))
        if kind == "leaf":
            return leaves[draw(names)]
        if kind == "not":
            return ~tree(depth - 1)
        one, other = tree(depth - 1), tree(depth - 1)
        return one & other if kind == "and" else one | other

    sizes = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return tree(draw(st.integers(1, 3))), sizes, t, s


@given(problems())
def test_trees_of_masks_are_sound(problem):
    mask, (block_q, block_k), t, s = problem
    check(mask, dense(mask, t, s), block_q, block_k)


@pytest.mark.parametrize(
    ("mask", "most"),
    [
        (masks.sliding_window(256, 256), 2),
        (masks.causal(), 1),
        (masks.longformer(window=256, anchors=[0, 5, 70_000]), 5),
        (masks.streaming(anchors=4, window=1024), 3),
        (masks.chunked(4096) & masks.causal(), 2),
    ],
)
def test_planning_a_million_positions(mask, most):
    """Planning takes O(T/b + S/b + intervals) memory, in both orientations."""
    planning._static_plan.cache_clear()
    tracemalloc.start()
    plan = mask.plan(2**20, block_size=512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.is_static
    for live in (plan.rows, plan.cols):
        for intervals in live:
            assert intervals.lo.shape[:3] == (1, 1, 2048)
            assert intervals.lo.shape[3] <= most
    # Booleans [T/b, S/b] alone would take four million bytes.
    assert peak < 2**21


def test_bigbird_at_a_million_positions():
    mask = masks.big_bird(
        window=256, anchors=128, random_blocks=3, rng=0, num_blocks=2**14
    )
    plan = mask.plan(2**20, block_size=512)
    for live in (plan.rows, plan.cols):
        assert live is not None
        assert live.full.lo.size + live.partial.lo.size < 2048 * 64


def test_the_cache_of_plans_is_bounded():
    info = planning._static_plan.cache_info()
    assert info.maxsize is not None


def test_block_sizes_are_checked():
    with pytest.raises(ValueError, match=r"block_size: expected at least 1, got 0"):
        masks.causal().plan(8, block_size=0)


def test_layouts_of_one_shape_are_one_structure():
    """Layouts that list different blocks can be stacked, and mapped by ``vmap``."""
    rng = np.random.default_rng(0)
    layouts = [rng.integers(-1, most, (6, 2)) for most in (1, 3, 6)]
    several = [masks.blocks(layout, 3) for layout in layouts]
    stacked = jax.tree.map(lambda *x: np.stack(x), *several)
    found = np.asarray(jax.jit(jax.vmap(lambda mask: mask.to_dense(18)))(stacked))
    mapped = jax.jit(jax.vmap(lambda mask: mask.plan(18, block_size=4)))(stacked)
    for b, mask in enumerate(several):
        np.testing.assert_array_equal(found[b], mask.to_dense(18))
        check_plan(jax.tree.map(lambda x, b=b: x[b], mapped), found[b], 4, 4)


def test_a_long_layout_is_built_and_planned_in_linear_memory():
    n, each = 2**13, 8
    layout = np.random.default_rng(0).integers(0, n, (n, each))
    tracemalloc.start()
    plan = masks.blocks(layout, 4).plan(4 * n, block_size=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Booleans for all pairs of blocks alone would take 2**26 bytes.
    assert peak < 2**26
    assert plan.rows.partial.per_row().sum() == 0
    distinct = sum(len(set(row)) for row in layout.tolist())
    assert plan.rows.full.per_row().sum() == distinct
    assert plan.cols is not None
    assert plan.cols.full.per_row().sum() == distinct


@pytest.mark.parametrize("layout", ["same", "far", "none", "twice"])
@pytest.mark.parametrize("sizes", [(8, 6), (1, 2), (3, 5)])
@pytest.mark.parametrize(("traced", "slots"), [(False, True), (True, False)])
def test_plans_of_lists_that_are_finer_than_they(layout, sizes, traced, slots):
    """Lists that are longer than a row of the plan become flags of its cells."""
    rows = dict(
        same=np.full((20, 4), 3),
        far=np.arange(80).reshape(20, 4) * 7 % 24,
        none=np.full((20, 4), -1),
        twice=np.repeat(np.arange(40).reshape(20, 2) % 23, 2, axis=1),
    )[layout]

    def make(rows):
        make = masks.selected if slots else masks.blocks
        return make(rows, query_block=2, key_block=2) & masks.causal()

    planned = lambda rows: make(rows).plan(40, 48, block_size=sizes)
    plan = (jax.jit(planned) if traced else planned)(rows)
    check_plan(plan, dense(make(rows), 40, 48), *sizes)


@pytest.mark.parametrize("sizes", [(4, 4), (8, 2), (2, 4)])
def test_some_rows_of_lists_that_queries_share(sizes):
    """Among the anchors' rows, equal lists do not follow one another."""
    lists = np.random.default_rng(0).integers(0, 6, (6, 1))
    slots = (0, 5, 9, 14, 18, 19, 21, 23)
    mask = masks.selected(lists, query_block=4, key_block=4)
    rows = Rows(mask, slots, 24)
    plan = jax.jit(lambda: rows.plan(8, 24, block_size=sizes))()
    wanted = dense(mask, 24, 24)[:, :, np.asarray(slots)]
    check_plan(plan, wanted, *sizes)


def test_a_key_block_that_many_see_joins_runs():
    """Runs beyond the capacity are joined; the blocks between them become partial."""
    layout = np.full((24, 1), 1)
    layout[::2] = 0
    mask = masks.blocks(layout, 2)
    assert check(mask, dense(mask, 48, 4), 2, 2) == 2 * 9


@pytest.mark.parametrize(("hidden", "size"), in_turn([False, True], [4, 8, 3]))
def test_a_traced_layout_has_the_plan_of_a_known_one(hidden, size):
    """Also with more blocks of keys than of queries."""
    layout = np.array([[0, 3], [-1, 7]])

    def plan(layout):
        mask = masks.blocks(layout, 4)
        return (~mask if hidden else mask).plan(8, 32, block_size=size)

    found, wanted = jax.jit(plan)(layout), plan(layout)
    for side in ("rows", "cols"):
        for kind in ("full", "partial"):
            one, other = (
                np.asarray(getattr(getattr(x, side), kind).per_row())
                for x in (found, wanted)
            )
            np.testing.assert_array_equal(one, other)


def test_grain_is_what_blocks_must_divide():
    one = masks.random_blocks(0, blocks_per_row=2, block_size=24, num_blocks=7)
    other = masks.blocks(np.array([[1], [0]]), block_size=36)
    tall = masks.blocks(np.array([[1], [0]]), query_block=1, key_block=16)
    window = masks.sliding_window(5, 5)
    assert window.block_multiples is None
    assert (window | masks.causal()).block_multiples is None
    assert (tall & other).block_multiples == (1, 4)
    assert (
        one.block_multiples
        == (~one).block_multiples
        == (one & window).block_multiples
        == (24, 24)
    )
    assert (
        (one | other).block_multiples
        == masks.per_head([one, other]).block_multiples
        == (12, 12)
    )


@pytest.mark.parametrize("block_size", [24, 12, 8])
def test_plans_in_the_grain_have_no_partial_blocks(block_size):
    mask = masks.random_blocks(0, blocks_per_row=2, block_size=24, num_blocks=7)
    plan = mask.plan(168, block_size=block_size)
    for side in (plan.rows, plan.cols):
        assert side is not None
        assert not np.asarray(side.partial.per_row()).any()
        assert np.asarray(side.full.per_row()).sum() == 14 * (24 // block_size) ** 2
    coarse = mask.plan(168, block_size=48)
    assert np.asarray(coarse.rows.partial.per_row()).any()


@pytest.mark.parametrize(
    ("block_size", "expected"), [(64, 64), (96, 32), (48, 512), (65, 512), (None, 512)]
)
def test_liveness_is_decided_in_the_grain_but_never_in_tiny_blocks(
    block_size, expected, monkeypatch
):
    seen = []

    def spy(mask, operands, q, k, query, key):
        seen.append((query.size, key.size))
        return None, None

    monkeypatch.setattr(prepare, "alive", spy)
    mask = masks.causal()
    if block_size:
        mask &= masks.random_blocks(0, 2, block_size, 1024 // block_size + 1)
    x = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)
    jax.eval_shape(
        lambda x: attention(x, x, x, mask=mask, implementation="reference"), x
    )
    assert {*seen} == {(expected, expected)}


def test_a_block_that_holds_more_than_the_keys_is_partial_from_both_sides():
    """Kernels must hide padded keys, in both orientations of the plan."""
    plan = masks.full().plan(96, 130, block_size=32)
    assert plan.cols is not None
    rows, cols = plan.rows.full, plan.cols.full
    assert (rows.lo == 0).all()
    assert (rows.hi == 4).all()  # 130 = 4 * 32 + 2
    assert (cols.hi - cols.lo)[0, 0, :, 0].tolist() == [3, 3, 3, 3, 0]
    assert (plan.cols.partial.per_row()[0, 0] == [0, 0, 0, 0, 3]).all()


@pytest.mark.parametrize(
    "mask",
    [masks.chunked(8), ~masks.sliding_window(20, 20) & masks.causal()],
    ids=["in full blocks", "in some of each"],
)
def test_what_is_alive_is_what_somebody_sees(mask):
    t, s = 24, 40
    blocks = [planning.index_blocks(*side, 4) for side in (("query", t), ("key", s))]
    slots = planning.slot_operand(t, 2), planning.slot_operand(s, 3)
    found = liveness.alive(mask, mask.operands(t, s), *slots, *blocks)
    visible = np.asarray(mask.to_dense(t, s))
    for alive, axis in zip(found, (1, 0), strict=True):
        assert alive is not None
        np.testing.assert_array_equal(alive[0, 0], visible.any(axis))
    assert found[1] is not None
    assert not found[1].all()


@pytest.mark.parametrize(
    "mask",
    [
        masks.blocks(np.zeros((0, 1, 2, 1), int), 2),
        masks.lengths(key=np.zeros(0, int)),
        masks.dense(np.zeros((0, 1, 4, 4), bool)),
    ],
    ids=str,
)
def test_a_mask_of_no_example(mask):
    plan = mask.plan(4, block_size=2)
    assert {x.shape[0] for x in jax.tree.leaves(plan)} == {0}
    assert mask.to_dense(4).shape == (0, 1, 4, 4)
    assert mask.density(4) == 0
