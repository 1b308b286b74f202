"""The implementation is chosen for the platform, when a program is lowered."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from attnlab import attention, cost, explain, extend, masks, modifiers, scores
from attnlab._src.implementations import PRIORITIES
from attnlab._src.implementations.tiled import Tiled
from attnlab._src.masks import planning
from attnlab._src.ops.prepare import prepare
from attnlab._src.ops.validate import check
from attnlab._src.varying import varying
from tests.conftest import forget

B, T, S, N, H = 2, 13, 11, 2, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, N, H)).astype("f")


class Sevens(extend.Implementation):
    """Returns 7 everywhere, and records its inputs."""

    name = "sevens"
    platforms = ("cpu",)

    def __init__(self):
        self.seen = []

    def block_sizes(self, inputs):
        return 4, 4

    def forward(self, inputs):
        self.seen.append(inputs)
        s, dtype = inputs.sizes, inputs.accumulation_dtype
        return jnp.full((s.B, s.T, s.N, s.D), 7, dtype), jnp.zeros((s.B, s.T, s.N))

    def backward(self, inputs, output, lse, d_output, d_lse, wanted):
        self.seen.append(inputs)
        leaves = jax.tree.leaves(inputs)
        pairs = zip(leaves, wanted, strict=True)
        return [jnp.full_like(x, 5) if on else None for x, on in pairs]


@pytest.fixture
def sevens(monkeypatch):
    """``Sevens``, registered as the first of the automatic choice on CPUs."""
    made = Sevens()
    for name in ("native", "pallas_tpu", "batched"):
        monkeypatch.delitem(PRIORITIES, name)
    extend.register(made, priority=1)
    yield made
    extend.unregister("sevens")


@pytest.fixture
def tiled_passes(monkeypatch):
    """A list that gets "forward" or "backward" whenever ``tiled`` is traced."""
    found = []
    for name in ("forward", "backward"):
        own = getattr(Tiled, name)

        def spy(self, *args, name=name, own=own, **kwargs):
            found.append(name)
            return own(self, *args, **kwargs)

        monkeypatch.setattr(Tiled, name, spy)
    forget()
    yield found
    forget()


def self_attention(x, **options):
    return attention(x, x, x, mask=masks.causal(), **options)


def lowered(function, platform, x=X):
    return jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_decides(sevens, tiled_passes):
    np.testing.assert_array_equal(self_attention(X), np.full_like(X, 7))
    gradient = jax.grad(lambda x: self_attention(x).sum())(X)
    np.testing.assert_array_equal(gradient, np.full_like(X, 5 + 5 + 5))
    assert len(sevens.seen) == 2
    assert not tiled_passes
    lowered(jax.grad(lambda x: self_attention(x).sum()), "tpu")
    assert tiled_passes == ["forward", "backward"]
    assert len(sevens.seen) == 2


def test_what_is_not_chosen_is_never_traced(sevens, tiled_passes):
    def fail(*_):
        raise AssertionError

    sevens.forward, sevens.platforms = fail, ("tpu", "rocm")
    found = self_attention(X)
    assert tiled_passes == ["forward"]
    assert not np.isnan(found).any()
    lowered(self_attention, "cuda")
    for platform in sevens.platforms:
        with pytest.raises(AssertionError):
            lowered(self_attention, platform)


def test_reasons_tell_the_platform(sevens):
    sevens.platforms = ("tpu", "rocm")
    assert explain(X, X, X, platform="rocm").implementation == "sevens"
    assert cost(X, X, X, platform="rocm").implementation == "sevens"
    answer = explain(X, X, X)
    assert (answer.platform, answer.implementation) == ("cpu", "tiled")
    assert answer.passed_over["sevens"] == ("it runs on tpu and rocm, not on cpu",)
    assert cost(X, X, X).implementation == "tiled"


def test_a_name_never_falls_back(sevens):
    sevens.platforms = ("tpu",)
    named = functools.partial(self_attention, implementation="sevens")
    traced = jax.jit(named).trace(X)
    traced.lower(lowering_platforms=("tpu",))
    assert len(sevens.seen) == 1
    words = "implementation='sevens' cannot .*: it runs on tpu, not on cpu"
    for fails in (
        traced.lower,
        functools.partial(named, X),
        functools.partial(traced.lower, lowering_platforms=("cpu", "tpu")),
        functools.partial(explain, X, X, X, implementation="sevens"),
        functools.partial(cost, X, X, X, implementation="sevens"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            fails()
    sevens.unsupported = lambda inputs: ("it is tired",)
    forget()
    with pytest.raises(NotImplementedError, match="it is tired"):
        jax.jit(named).trace(X[:1])


def test_one_module_for_several_platforms(sevens, tiled_passes):
    exported = functools.partial(jax.export.export, jax.jit(self_attention))
    every = exported(platforms=("cpu", "tpu", "cuda"))(X)
    assert (len(sevens.seen), tiled_passes) == (1, ["forward"])
    np.testing.assert_array_equal(every.call(X), np.full_like(X, 7))
    alone = exported(platforms=("cuda",))(X)
    alike = exported(platforms=("tpu", "cuda"))(X)
    # A program for several platforms uses the same code on all, without TPU kernels.
    loops = {x.mlir_module().count("stablehlo.while") for x in (every, alone, alike)}
    assert len(loops) == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_exported_programs_equal_their_source(gradient):
    function = self_attention
    if gradient:
        function = jax.grad(lambda x: (self_attention(x) ** 2).sum())
    again = jax.export.export(jax.jit(function), platforms=("cpu", "tpu"))(X)
    np.testing.assert_allclose(again.call(X), function(X), atol=1e-5)


def test_elsewhere_nothing_of_the_cpu_remains():
    gradient = jax.grad(lambda x: self_attention(x).sum())
    program = lowered(gradient, "cuda")
    assert "stablehlo.while" in program
    assert "custom_call" not in program
    for platform in ("cuda", "rocm", "gpu"):
        told = explain(X, X, X, platform=platform)
        assert told.implementation == cost(X, X, X, platform=platform).implementation
        assert told.implementation == "batched"
    program = lowered(gradient, "tpu")
    # The loops are in branches for inputs that are not finite.
    assert program.count("stablehlo.while") == 3
    calls = re.findall(r"stablehlo.custom_call @(\w+)", program)
    assert set(calls) == {"tpu_custom_call"}
    assert explain(X, X, X, platform="tpu").implementation == "pallas_tpu"


def test_equal_calls_are_traced_once(tiled_passes):
    def layers(x):
        for _ in range(3):
            x = x + self_attention(x, implementation="tiled")
        return x.sum()

    jax.jit(layers).lower(X)
    assert tiled_passes == ["forward"]
    jax.jit(jax.grad(layers)).lower(X)
    jax.jit(jax.value_and_grad(lambda x: layers(2 * x))).lower(X)
    assert tiled_passes == ["forward", "backward"]


@pytest.mark.parametrize("jit", [False, True])
def test_implementations_see_no_manual_axes(sevens, jit):
    mesh = Mesh(np.array(jax.devices()[:2]), "x")
    local = jax.shard_map(
        lambda q, k: attention(q, k, k), mesh=mesh, in_specs=(Spec("x"), Spec()),
        out_specs=Spec("x"), check_vma=True,
    )  # fmt: skip
    loss = jax.value_and_grad(lambda q: local(q, X[:1]).sum())
    _, gradient = (jax.jit(loss) if jit else loss)(X)
    np.testing.assert_array_equal(gradient, np.full_like(X, 5))
    assert len(sevens.seen) == 2
    for leaf in jax.tree.leaves(sevens.seen):
        assert not varying(leaf)


def test_settings_outlive_their_context():
    with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct(X.shape, jnp.float64)
        traced = jax.jit(jax.grad(lambda x: self_attention(x).sum())).trace(wide)
        wanted = traced.lower().as_text()
    assert traced.lower().as_text() == wanted
    assert "xf64>" in wanted
    assert "xf32>" not in wanted


def test_without_jit():
    with jax.disable_jit():
        found = jax.value_and_grad(lambda x: self_attention(x).sum())(X)
    wanted = jax.value_and_grad(lambda x: self_attention(x).sum())(X)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, wanted
    )


# A plan depends only on the inputs and on the block sizes.

MASK = masks.causal() & masks.sliding_window(5, 5)
NO_DATA = MASK.operands(T, S)


def inputs_of(**options):
    key = RNG.normal(size=(B, S, N, H)).astype("f")
    return prepare(*check(X, key, key, mask=MASK, **options))


def test_index_positions_make_static_plans():
    plans = []

    @jax.jit
    def program():
        plans.append(planning.plan_of(inputs_of(), (4, 3), cols=True))
        return 0

    program()
    (plan,) = plans
    assert plan.is_static
    same_arrays(plan, MASK.plan(T, S, block_size=(4, 3)))
    assert planning.plan_of(inputs_of(), (4, 3), cols=True) is plan


def same_arrays(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("offset", [np.int32(3), np.array([-2, 6], np.int32)], ids=str)
def test_plans_under_traced_offsets(offset):
    @jax.jit
    def program(offset):
        inputs = inputs_of(query_offset=offset)
        assert inputs.position_kinds == ("offset", "index")
        return planning.plan_of(inputs, (4, 3), cols=True)

    query = planning.index_blocks("query", T, 4, jnp.asarray(offset))
    key = planning.index_blocks("key", S, 3)
    same_arrays(program(offset), planning.make_plan(MASK, NO_DATA, query, key))


@pytest.mark.parametrize(
    "sides", [("query",), ("key",), ("query", "key")], ids="+".join
)
def test_plans_of_given_positions(sides):
    given = dict(
        query=RNG.permutation(T).astype(np.int32),
        key=RNG.integers(-1, 9, (B, S), np.int32),
    )

    @jax.jit
    def program(given):
        options = {f"{side}_positions": given[side] for side in sides}
        inputs = inputs_of(**options)
        wanted = tuple("given" if x in sides else "index" for x in ("query", "key"))
        assert inputs.position_kinds == wanted
        assert not inputs.index_positions
        return planning.plan_of(inputs, (4, 3), cols=True)

    query, key = (
        planning.position_blocks(side, jnp.atleast_2d(given[side]), size)
        if side in sides
        else planning.index_blocks(side, length, size)
        for side, length, size in (("query", T, 4), ("key", S, 3))
    )
    same_arrays(program(given), planning.make_plan(MASK, NO_DATA, query, key))


@pytest.mark.parametrize("name", ["bilinear", "additive"])
def test_cost_of_scores_that_take_different_sizes(name):
    options = {"bilinear": {}, "additive": {"hidden_size": 4}}[name]
    score = getattr(scores, name).init(jax.random.key(0), 16, 8, **options)
    q, k = (jax.ShapeDtypeStruct((1, 32, 2, size), jnp.float32) for size in (16, 8))
    assert cost(q, k, k, score=score, mask=masks.causal()).pairs == 2 * 32 * 33 // 2


def test_operations_are_counted():
    q, k, v = (
        jax.ShapeDtypeStruct((2, 32, heads, size), jnp.float32)
        for heads, size in ((4, 16), (2, 16), (2, 8))
    )
    cap = modifiers.soft_cap(2.0)
    # For another platform nothing is compiled, so memory is not known.
    found = cost(q, k, v, mask=masks.causal(), modifiers=[cap], platform="cuda")
    pairs, scaled = 2 * 4 * 32 * 33 // 2, 2 * 32 * 4 * 16
    assert found.pairs == pairs
    # FLOPs of the logits, the cap, and weights times values.
    forward = 2 * 16 + cap.flops_per_pair + 2 * 8
    assert found.flops_forward == pairs * forward + scaled
    # Logits again and the gradients of query and key; the cap forward and backward;
    # gradients of weights and values.
    backward = 3 * 2 * 16 + 2 * cap.flops_per_pair + 2 * 2 * 8
    assert found.flops_backward == pairs * backward + 2 * scaled
