"""The native kernel: threads, devices, reproducibility, rounding to 16 bits."""

import ctypes
import hashlib
import itertools
import mmap
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attnlab import attention, masks, modifiers, scores
from attnlab._src.implementations.native import load
from attnlab._src.masks.structural import Window
from attnlab._src.types import pytree, static
from tests import grid

pytestmark = pytest.mark.skipif("load.why_not()", reason="the library is not there")


def arrays(t=200, s=200, n=4, k=2, h=16, d=12, b=2, dtype=jnp.float32):
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, d), (b, t, n, d))
    rng = np.random.default_rng(0)
    made = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return [jnp.asarray(x.astype(dtype)) for x in made]


def both_ways(q, k, v, above, implementation="native", score=None, **options):
    """The output, and the gradients of query, key and value."""
    found = gradients(implementation, **options)(above, q, k, v, score)
    return found[:4]


def gradients(implementation, **options):
    """Jitted ``run(cotangent, q, k, v, score)``: output, and gradients."""

    @jax.jit
    def run(above, *data):
        def call(q, k, v, score):
            return attention(
                q, k, v, score=score, implementation=implementation, **options
            )

        output, pull = jax.vjp(call, *data)
        return [output, *jax.tree.leaves(pull(above))]

    return run


MASK = masks.big_bird(window=20, anchors=3, random_blocks=2, rng=0, block_size=16)
WINDOW = masks.sliding_window(30, 5)


def test_many_threads_at_once():
    x = arrays()
    call = jax.jit(lambda *x: both_ways(*x, mask=MASK))
    wanted = [call(*(a * i for a in x)) for i in range(1, 4)]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda i: call(*(a * (i % 3 + 1) for a in x)), range(24))
        for i, results in enumerate(found):
            jax.tree.map(np.testing.assert_array_equal, results, wanted[i % 3])


def test_several_devices():
    x = arrays(b=4)
    wanted = both_ways(*x, mask=MASK)
    mesh = Mesh(np.array(jax.devices()[:4]), "x")
    spec = PartitionSpec("x")

    def call(*x):
        return both_ways(*x, mask=MASK)

    sharded = jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec)
    for found in (
        jax.jit(sharded)(*x),
        jax.tree.map(lambda a: a[:, 0], jax.pmap(call)(*(a[:, None] for a in x))),
    ):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    "sizes",
    [
        {"t": 1501, "s": 70, "n": 32, "k": 1, "d": 64},
        {"t": 1501, "s": 70, "n": 32, "k": 1, "d": 60},
        {"t": 1, "s": 13_001, "n": 4, "k": 2, "h": 64, "d": 64},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_more_than_caches_hold(sizes):
    """The kernel accesses over 10 MB of results, or of keys and values, differently."""
    x = arrays(b=1, **sizes)
    assert max(4 * x[3].size, 4 * (x[1].size + x[2].size)) > 10 << 20
    # With many queries most see no key; a single query sees all keys.
    mask = masks.sliding_window(sizes["s"], 0)
    options = {"mask": mask, "query_offset": max(0, sizes["s"] - sizes["t"])}
    found, wanted = (
        both_ways(*x, implementation=name, **options) for name in ("native", "tiled")
    )
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-4)


def flags_at(address):
    """Linux's VmFlags of the mapping at an address, two letters each."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if first == "VmFlags:" and inside:
            return rest
        if not first.endswith(":"):  # the header of a mapping
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
    return []


def huge_pages_can_be_asked_for():
    """Whether the system accepts MADV_HUGEPAGE, and shows it in VmFlags."""
    with mmap.mmap(-1, 4 << 20) as memory:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except (AttributeError, OSError):
            return False
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return "hg" in flags_at(address)


@pytest.mark.skipif("not huge_pages_can_be_asked_for()", reason="the system has none")
def test_large_results_ask_for_huge_pages():
    """Otherwise newly mapped results cause a page fault for each 4 KiB.

    Whether the system provides huge pages is not tested.
    """
    x = arrays(b=1, t=1 << 15, s=1, n=8, k=8, h=16, d=64)  # a result of 64 MB
    call = jax.jit(lambda q, k, v: attention(q, k, v, implementation="native"))
    found = jax.block_until_ready(call(*x[:3]))
    middle = found.unsafe_buffer_pointer() + found.nbytes // 2
    assert "hg" in flags_at(middle)


#: Prints the digest from a process with one core.
PROGRAM = """
import os
cores = sorted(os.sched_getaffinity(0))
os.sched_setaffinity(0, cores[:1])
import jax
import tests.conftest  # same settings
from tests.native.kernel import test_running as here
print(jax.devices()[0].client.platform, here.digest())
"""

CASES = {
    "slices": ((700, 1500, 1, 1), {}),
    "grouped": ((300, 300, 4, 2), {"mask": MASK}),
    "decoding": ((1, 3000, 4, 2), {"query_offset": 2990, "mask": masks.causal()}),
    "few": ((3, 1300, 2, 1), {"modifiers": "alibi", "score": "additive"}),
    "learned": ((300, 1200, 2, 1), {"modifiers": "alibi", "score": "additive"}),
}


def results(name):
    (t, s, n, k), options = CASES[name]
    options: dict[str, Any] = dict(options)
    slopes = jnp.linspace(0.1, 0.5, n)
    score = scores.scaled_dot()
    if options.pop("score", None):
        score = scores.additive.init(jax.random.key(1), 16, hidden_size=8, num_heads=n)
        score = type(score)(
            score.query_weight, score.key_weight[:1], score.bias, score.weight
        )
    learned = options.pop("modifiers", None) is not None
    q, key, v, above = arrays(t, s, n, k, b=1)

    def run(q, key, v, score, slopes):
        own = [modifiers.alibi(slopes)] if learned else []
        return attention(
            q, key, v, score=score, modifiers=own, implementation="native", **options
        )

    output, pull = jax.vjp(run, q, key, v, score, slopes)
    return [output, *jax.tree.leaves(pull(above))]


def digest():
    """A hash of the results of all cases, each computed three times."""
    found = hashlib.sha256()
    for case in CASES:
        for _ in range(3):
            for x in results(case):
                found.update(np.asarray(x).tobytes())
    return found.hexdigest()


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="slow under a sanitizer")
def test_results_do_not_depend_on_the_run_or_on_the_threads():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"cpu {digest()}\n"


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (MASK, (200, 200)),
        (MASK, (3, 700)),
        (None, (3, 700)),
        (None, (1, 3000)),
        (WINDOW, (1, 3000)),
        (WINDOW, (33, 65)),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                (MASK, (33, 65)),
                (None, (200, 200)),
                (None, (33, 65)),
                (WINDOW, (200, 200)),
                (WINDOW, (3, 700)),
            )
        ),
    ],
    ids=str,
)
def test_16_bit_products_stay_within_their_rounding(shape, mask):
    x = arrays(*shape, dtype=jnp.bfloat16)
    with jax.default_matmul_precision("default"):
        found = both_ways(*x, mask=mask)
    wide = [np.asarray(a, np.float32) for a in x]
    exact = both_ways(*wide, mask=mask, implementation="reference")
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.asarray(a, np.float32) - b)
        # Weights and their gradients are rounded to 8 bits, and so are results.
        assert error.max() <= 3 * 2.0**-8 * np.abs(b).max()


def test_precision_decides_whether_products_are_rounded():
    if load.load().isa != "avx512bf16":
        pytest.skip("this processor multiplies floats only")
    x = arrays(dtype=jnp.bfloat16)
    wide = [a.astype(jnp.float32) for a in x]
    exact = both_ways(*wide, implementation="reference")[0].astype(jnp.bfloat16)
    with jax.default_matmul_precision("default"):
        rough = both_ways(*x)[0]
        fine = both_ways(*x, precision="highest")[0]
    differs = [float((a != exact).mean()) for a in (rough, fine)]
    assert differs[1] < 0.02 < differs[0]


@pytest.mark.parametrize(
    ("sizes", "activation"),
    grid.few(
        itertools.product(
            ["11-17-3", "11"],
            [jax.nn.relu, jax.nn.silu, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu],
        ),
        ("11", jax.nn.silu),
        ("11-17-3", jax.nn.gelu),
    ),
)
def test_activations_of_a_perceptron(activation, sizes):
    hidden_sizes = tuple(int(size) for size in sizes.split("-"))
    score = scores.mlp.init(
        jax.random.key(2),
        16,
        hidden_sizes=hidden_sizes,
        num_heads=4,
        num_key_heads=2,
        activation=activation,
    )
    if activation is jax.nn.sigmoid:
        # Larger parameters: the sigmoid of small ones is almost linear, and the terms
        # of the last bias's gradient would cancel up to rounding.
        score = jax.tree.map(lambda x: 2 * x, score)
    *x, above = arrays(70, 50)

    def all_of(implementation, dtype):
        data = grid.cast(jax.tree.map(np.asarray, [above, *x, score]), dtype)
        with jax.enable_x64(dtype is np.float64):
            found = gradients(implementation, mask=masks.causal())(*data)
        return [np.asarray(a, np.float64) for a in found]

    found = all_of("native", np.float32)
    like = all_of("reference", np.float32)
    for a, b, exact in zip(found, like, all_of("reference", np.float64), strict=True):
        error, usual = (np.abs(z - exact).max() for z in (a, b))
        assert error <= 2 * usual + 16 * np.finfo(np.float32).eps * np.abs(exact).max()


OPTIONS = {
    "all": {},
    "causal": {"mask": masks.causal(), "query_offset": 140},
    "modified": {
        "mask": masks.sliding_window(90, 3),
        "query_offset": 133,
        "modifiers": [modifiers.soft_cap(3.0), modifiers.alibi(4)],
    },
    "dropped": {"dropout_rate": 0.3, "dropout_rng": jax.random.key(5)},
    "padded": {"mask": masks.lengths(key=np.array([149, 0]))},
}


def _few_queries():
    """One or four queries in turn; each score and option is not slow once or twice."""
    for i, score in enumerate(("product", "additive", "perceptron", "deep")):
        for j, options in enumerate(OPTIONS):
            t = (1, 4)[(i // 2 + j // 2 + i + 1) % 2]
            marks = () if (i + j) % 3 == 2 else pytest.mark.slow
            yield pytest.param(score, options, t, marks=marks)


@pytest.mark.parametrize(("score", "options", "t"), [*_few_queries()])
def test_few_queries(t, options, score):
    sizes = {"num_heads": 4, "num_key_heads": 2}
    make = {
        "product": lambda r: scores.bilinear.init(r, 17, num_heads=4),
        "additive": lambda r: scores.additive.init(r, 17, hidden_size=19, **sizes),
        "perceptron": lambda r: scores.mlp.init(
            r, 17, hidden_sizes=(7,), activation=jax.nn.silu, **sizes
        ),
        "deep": lambda r: scores.mlp.init(r, 17, hidden_sizes=(7, 5), **sizes),
    }[score]
    *x, above = arrays(t, 149, h=17, d=13)
    data = above, *x, jax.jit(make)(jax.random.key(4))
    wanted = gradients("reference", **OPTIONS[options])(*data)
    native = gradients("native", **OPTIONS[options])
    for isa in load.load().isas:
        with load.instructions(isa):
            found = native(*data)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6 * max(1, np.abs(b).max()))


def test_an_infinite_value_of_few_queries_stays_one():
    q, k, v, _ = arrays(1, 65)
    v = v.at[:, -1, :, 0].set(jnp.inf)
    output = attention(q, k, v, implementation="native")
    assert jnp.isposinf(output[..., 0]).all()
    assert jnp.isfinite(output[..., 1:]).all()


def test_few_queries_of_heads_that_see_different_keys():
    mask = masks.per_head([masks.full(), *[masks.sliding_window(9, 0)] * 3])
    x = arrays(2, 300)
    found = both_ways(*x, mask=mask, query_offset=250)
    wanted = both_ways(*x, mask=mask, query_offset=250, implementation="reference")
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_an_empty_batch_and_no_keys():
    for shape in (dict(b=0), dict(t=0), dict(s=0)):
        q, k, v, _ = arrays(**shape)
        output = attention(q, k, v, implementation="native")
        assert output.shape == (*q.shape[:3], v.shape[-1])
        assert not output.any()


def test_a_rule_of_the_users_own_reaches_it_as_bits():
    def rule(t, s, shift):
        return (t * 3 + s + shift) % 5 < 2

    shift = jnp.arange(2 * 200).reshape(2, 1, 200, 1) % 7
    mask = masks.predicate(rule, shift) & masks.sliding_window(70, 3)
    x = arrays()
    found = both_ways(*x, mask=mask)
    wanted = both_ways(*x, mask=mask, implementation="reference")
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytree
class Mine(Window):
    """A user's mask with bounds, which the kernel does not support itself."""


@pytest.mark.parametrize("mask", [Mine(100, None), ~Mine(100, None)], ids=str)
def test_a_class_of_the_users_own_with_bounds(mask):
    x = arrays(700, 1000, b=1, n=1, k=1)
    found = both_ways(*x, mask=mask)
    for a, b in zip(
        found, both_ways(*x, mask=mask, implementation="tiled"), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytree
class Widening(scores.Score):
    """Projects to another dtype than that of the value."""

    dtype: object = static(default=jnp.float32)

    def project_query(self, query):
        return query.astype(self.dtype)

    def project_key(self, key):
        return self.project_query(key)


@pytest.mark.parametrize("t", [2, 40])
@pytest.mark.parametrize(
    "types", [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]
)
def test_projections_of_another_type(t, types):
    x = arrays(t, 300, dtype=types[0])
    score = Widening(types[1])
    with jax.default_matmul_precision("default"):
        found = both_ways(*x, score=score)
    wanted = both_ways(*x, score=score, implementation="reference")
    for a, b in zip(found, wanted, strict=True):
        error = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()
        assert error <= 3 * 2.0**-8 * float(jnp.abs(b).max())


def test_more_than_its_arrays_hold_is_refused():
    q, k, v, _ = arrays()
    many = [modifiers.soft_cap(4.0)] * 17
    deep = scores.mlp.init(jax.random.key(0), 16, hidden_sizes=(4,) * 12)
    cases: list[dict[str, Any]] = [{"modifiers": many}, {"score": deep}]
    for options in cases:
        with pytest.raises(NotImplementedError, match="at most 16|does not know"):
            attention(q, k, v, implementation="native", **options)
        assert attention(q, k, v, **options).shape == (*q.shape[:3], v.shape[-1])


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.sigmoid, jnp.tanh])
def test_a_perceptron_shows_a_nan(activation):
    q, k, v, _ = arrays()
    score = scores.mlp.init(
        jax.random.key(0), 16, hidden_sizes=(8,), activation=activation
    )
    found, wanted = (
        attention(q.at[0, 5].set(jnp.nan), k, v, score=score, implementation=name)
        for name in ("native", "reference")
    )
    assert jnp.isnan(wanted[0, 5]).all()
    np.testing.assert_array_equal(jnp.isnan(found), jnp.isnan(wanted))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "t"), grid.in_turn([jnp.float32, jnp.bfloat16, jnp.float16], [40, 3])
)
def test_slots_that_nobody_sees_are_not_read(t, dtype):
    rng = np.random.default_rng(0)
    seen = rng.random((1, 1, t, 70)) < 0.7
    seen[:, :, :, [4, 5, 9, 66, 69]] = seen[:, :, 1] = False
    q, k, v, _ = (x.astype(dtype) for x in arrays(t, 70))
    added = jax.random.normal(jax.random.key(1), (4, t, 70))

    @jax.jit
    def both(q, k, v):
        def loss(q, k, v, added):
            output = attention(
                q,
                k,
                v,
                mask=seen,
                modifiers=(modifiers.bias(added), modifiers.soft_cap(5.0)),
                # Lets the kernel multiply 16-bit inputs directly, by separate code.
                precision="default",
                implementation="native",
            )
            return (output.astype(jnp.float32) ** 2).sum(), output

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(q, k, v, added)

    def poisoned(x, dead):
        return x.at[:, dead].set(jnp.nan)

    keys = ~seen.any((0, 1, 2))
    found = both(*(poisoned(x, at) for x, at in ((q, [1]), (k, keys), (v, keys))))
    jax.tree.map(np.testing.assert_array_equal, found, both(q, k, v))
    assert (np.asarray(found[0][1], np.float32)[:, keys] == 0).all()
    assert not jax.tree.reduce(lambda a, x: a | jnp.isnan(x).any(), found, False)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("t", "mask"),
    [
        (1, masks.sliding_window(1023, 0)),
        (4096, masks.sliding_window(255, 0)),
        (4096, masks.random_blocks(0, 2, 64, 64)),
        (4096, masks.lengths(key=np.array([4000]))),
    ],
)
def test_arrays_are_read_where_they_lie(t, mask, backward):
    """Neither the scale nor dead slots cause a copy of keys or values."""
    q, k, v = (
        jax.ShapeDtypeStruct((1, n, 4, 64), jnp.float32) for n in (t, 4096, 4096)
    )

    def run(q, k, v, mask, offset):
        def once(q, k, v):
            return attention(
                q, k, v, mask=mask, query_offset=offset, implementation="native"
            )

        if not backward:
            return once(q, k, v)
        output, pull = jax.vjp(once, q, k, v)
        return pull(output)

    program = jax.jit(run).lower(q, k, v, mask, 4096 - t).compile().as_text()
    assert program is not None
    entry = program[program.index("\nENTRY") :]
    made = re.findall(r"= f32\[1,4096,4,64\]\S* ([\w-]+)\(", entry)
    assert "parameter" in made
    # Backward, the cotangent is zeroed for queries without visible keys.
    assert made.count("fusion") == (backward and t > 1)
    assert set(made) <= {"parameter", "fusion", "get-tuple-element"}


@pytest.mark.parametrize("t", [1, 40])
def test_nothing_to_compare(t):
    q, k, v, _ = arrays(t, 30, h=0, d=0)
    assert attention(q, k, v, score=scores.dot(), implementation="native").size == 0
