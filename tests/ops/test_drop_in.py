"""``dot_product_attention`` against ``jax.nn.dot_product_attention``."""

import inspect
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnlab
from attnlab import dot_product_attention
from tests.conftest import loosely

B, T, S, N, K, H = 2, 7, 11, 6, 3, 4
RNG = np.random.default_rng(0)
THEIRS = loosely(jax.nn.dot_product_attention)


def normal(*shape, rng=RNG):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H)
LENGTHS = np.array([5, 9], np.int32)
#: A mask in which every query sees some key.
VISIBLE = jnp.asarray(RNG.random((B, N, T, S)) < 0.5).at[..., 0].set(True)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(is_causal=True),
    "scale": dict(scale=0.3),
    "traced scale": dict(scale=jnp.float32(0.3)),
    "zero scale": dict(scale=0),
    "one number for a window": dict(local_window_size=2),
    "window": dict(local_window_size=(1, 3)),
    "NumPy window": dict(local_window_size=(np.int64(0), np.int64(2))),
    "causal window": dict(is_causal=True, local_window_size=(2, 3)),
    "key lengths": dict(key_value_seq_lengths=LENGTHS),
    "query lengths": dict(query_seq_lengths=np.array([3, 7], np.int32)),
    "both lengths, causal": dict(
        query_seq_lengths=np.array([7, 0], np.int32),
        key_value_seq_lengths=LENGTHS,
        is_causal=True,
    ),
    "mask": dict(mask=VISIBLE),
    "mask of examples": dict(mask=VISIBLE[:, :1, :1]),
    "mask of heads": dict(mask=VISIBLE[:1]),
    "mask without batch": dict(mask=VISIBLE[0]),
    "mask of two axes": dict(mask=VISIBLE[0, 0]),
    "mask of queries": dict(mask=jnp.ones((T, 1), bool)),
    "bias": dict(bias=normal(B, N, T, S)),
    "bias of two axes": dict(bias=normal(T, S)),
    "bias of keys": dict(bias=normal(B, 1, 1, S)),
    "bias of heads": dict(bias=normal(N, 1, 1)),
    "everything": dict(
        bias=normal(1, N, T, S),
        mask=VISIBLE,
        scale=0.7,
        is_causal=True,
        local_window_size=6,
        query_seq_lengths=np.array([6, 2], np.int32),
        key_value_seq_lengths=LENGTHS,
    ),
}


def value_and_gradients(function, query, key, value, options):
    """The output, and the gradients of q, k, v and the bias, if there is one."""
    bias = options.get("bias")
    rest = {name: x for name, x in options.items() if name != "bias"}

    def loss(arrays):
        q, k, v, bias = arrays
        output = function(q, k, v, bias, **rest)
        return jnp.sin(output).sum(), output

    # One program for output and gradients.
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return run((query, key, value, bias))


def near(found, wanted, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=atol
        )


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    arrays = QUERY, KEY, VALUE, CASES[name]
    near(
        value_and_gradients(dot_product_attention, *arrays),
        value_and_gradients(THEIRS, *arrays),
    )


@pytest.mark.parametrize("implementation", ["xla", "tiled", "jax_nn", "reference"])
def test_implementations(implementation):
    options = CASES["everything"]
    near(
        dot_product_attention(
            QUERY, KEY, VALUE, **options, implementation=implementation
        ),
        THEIRS(QUERY, KEY, VALUE, **options),
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("bias_heads", [1, 4])
def test_head_layouts(heads, bias_heads):
    n, k = heads
    query, key, value = normal(B, T, n, H), normal(B, S, k, H), normal(B, S, k, H)
    options = dict(bias=normal(B, bias_heads, T, S), is_causal=True)
    near(
        value_and_gradients(dot_product_attention, query, key, value, options),
        value_and_gradients(THEIRS, query, key, value, options),
    )


@pytest.mark.parametrize("name", ["plain", "causal window", "bias of two axes"])
def test_without_a_batch_axis(name):
    arrays = QUERY[0], KEY[0], VALUE[0], CASES[name]
    near(
        value_and_gradients(dot_product_attention, *arrays),
        value_and_gradients(THEIRS, *arrays),
    )


def test_ranks_may_differ_and_lengths_go_without_a_batch_axis():
    options: dict[str, Any] = dict(
        key_value_seq_lengths=LENGTHS[:1], return_residual=True
    )
    for query, key in ((QUERY[0], KEY[:1]), (QUERY[:1], KEY[0])):
        near(
            dot_product_attention(query, key, VALUE[0], **options),
            THEIRS(query, key, VALUE[0], **options),
        )


@pytest.mark.parametrize("name", ["plain", "both lengths, causal", "everything"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_residual(name, dtype):
    q, k, v = (x.astype(dtype) for x in (QUERY, KEY, VALUE))
    options = CASES[name]
    found = dot_product_attention(q, k, v, return_residual=True, **options)
    wanted = THEIRS(q, k, v, return_residual=True, **options)
    # For queries beyond the length, jax.nn returns something else than log-sum-exp.
    beyond = np.zeros((B, T, 1), bool)
    if "query_seq_lengths" in options:
        beyond = np.arange(T)[:, None] >= options["query_seq_lengths"][:, None, None]
    assert np.isneginf(np.asarray(found[1], np.float32)[beyond[..., 0]]).all()
    found, wanted = (
        (output, jnp.where(beyond, 0, lse)) for output, lse in (found, wanted)
    )
    # jax.nn rounds weights to bfloat16's eight bits, and results are up to about 4.
    near(found, wanted, 1e-5 if dtype == jnp.float32 else 4 * 2**-8)


def test_the_residual_carries_no_gradient():
    def total(function, query):
        return function(query, KEY, VALUE, return_residual=True)[1].sum()

    for function in (dot_product_attention, THEIRS):
        gradient = jax.grad(lambda q, function=function: total(function, q))(QUERY)
        np.testing.assert_array_equal(gradient, np.zeros_like(QUERY))


def test_values_may_have_a_size_of_their_own():
    value = normal(B, S, K, 9)
    found = dot_product_attention(QUERY, KEY, value)
    assert found.shape == (B, T, N, 9)
    near(found[..., :H], dot_product_attention(QUERY, KEY, value[..., :H]))


def test_under_jit_and_vmap():
    def call(function):
        def one(q, k, v, bias, length):
            return function(
                q, k, v, bias, is_causal=True, key_value_seq_lengths=length[None]
            )

        return jax.jit(jax.vmap(one, (0, 0, 0, None, 0)))(
            QUERY, KEY, VALUE, CASES["bias of two axes"]["bias"], LENGTHS
        )

    near(call(dot_product_attention), call(THEIRS))


def test_integer_bias_and_lists_as_there():
    bias = RNG.integers(-3, 3, (T, S))
    near(
        dot_product_attention(QUERY, KEY, VALUE, bias),
        THEIRS(QUERY, KEY, VALUE, jnp.asarray(bias)),
    )
    small: Any = [[[1.0, 2.0]], [[3.0, 5.0]]]
    near(dot_product_attention(small, small, small), THEIRS(small, small, small))


def test_the_argument_list_is_theirs():
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (dot_product_attention, THEIRS)
    )
    assert ours == theirs


# Cases in which attnlab's laws are stricter than jax.nn.


def test_a_query_that_sees_nothing_yields_zero():
    mask = VISIBLE.at[:, :, 2].set(False)
    found, gradients = value_and_gradients(
        dot_product_attention, QUERY, KEY, VALUE, dict(mask=mask, bias=normal(T, S))
    )
    np.testing.assert_array_equal(found[1][:, 2], np.zeros((B, N, H)))
    np.testing.assert_array_equal(gradients[0][:, 2], np.zeros((B, N, H)))
    np.testing.assert_array_equal(gradients[3][2], np.zeros(S))
    _, lse = dot_product_attention(QUERY, KEY, VALUE, mask=mask, return_residual=True)
    assert np.isneginf(lse[:, 2]).all()
    assert np.isfinite(np.delete(lse, 2, 1)).all()


def test_hidden_slots_may_hold_nan():
    beyond = np.arange(S)[:, None, None] >= LENGTHS[:, None, None, None]
    clean, key, value = (
        jnp.where(beyond, fill, x)
        for fill, x in ((0, VALUE), (jnp.nan, KEY), (jnp.nan, VALUE))
    )
    options = dict(key_value_seq_lengths=LENGTHS)
    found = value_and_gradients(dot_product_attention, QUERY, key, value, options)
    near(
        found,
        value_and_gradients(dot_product_attention, QUERY, KEY, clean, options),
    )


# Static options give structural masks.


@pytest.mark.parametrize(
    "options", [dict(is_causal=True), dict(local_window_size=(20, 0))], ids=str
)
def test_no_array_of_all_pairs(options):
    length = 2048
    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

    def largest(function):
        def loss(q, k, v):
            return function(q, k, v, **options).sum()

        program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
        shapes = re.findall(r"tensor<([0-9x]+)x[a-z]", program)
        return max(math.prod(map(int, shape.split("x"))) for shape in shapes)

    assert largest(dot_product_attention) < length * length // 4
    assert largest(THEIRS) >= length * length


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        (dict(is_causal=True), 512 * 513 // 2),
        (dict(local_window_size=(9, 0)), 512 * 10 - 45),
        (dict(local_window_size=(9, 4), is_causal=True), 512 * 10 - 45),
        (dict(query_seq_lengths=np.array([100])), 100 * 512),
    ],
    ids=str,
)
def test_dead_blocks_are_skipped(options, pairs, monkeypatch, tile):
    tile(64, 64)
    module = sys.modules["attnlab._src.ops.drop_in"]
    masks = []

    def spy(args, settings):
        masks.append(args.mask)
        return run_attention(args, settings)

    run_attention = module.run_attention
    monkeypatch.setattr(module, "run_attention", spy)
    x = normal(1, 512, 1, 4)
    dot_product_attention(x, x, x, **options)
    (mask,) = masks
    cost = attnlab.cost(x, x, x, mask=mask)
    assert cost.pairs == pairs
    assert cost.blocks_full + cost.blocks_partial < cost.blocks_total
    assert cost.pairs_executed < 512 * 512


# Bad input: errors name the argument, what was given, and what is expected.


def call(query=QUERY, key=KEY, value=VALUE, *rest, **options):
    return lambda: dot_product_attention(query, key, value, *rest, **options)


ERRORS = {
    "no array": (call(query="x"), TypeError, "query: expected an array, got str"),
    "two axes": (
        call(query=QUERY[0, 0]),
        ValueError,
        r"query: expected \[B, T, N, H\] or \[T, N, H\], got shape \(6, 4\)",
    ),
    "five axes": (call(key=KEY[None]), ValueError, r"key: expected \[B, S, K, H\] or"),
    "dtype": (call(key=KEY.astype(jnp.bfloat16)), TypeError, "key: dtype bfloat16"),
    "batch": (call(query=QUERY[:1]), ValueError, "key: batch axes"),
    "groups": (call(query=QUERY[:, :, :4]), ValueError, "query: 4 heads .* 3 key"),
    "value length": (call(value=VALUE[:, :3]), ValueError, "value: length S is 3.*11"),
    "mask dtype": (call(mask=jnp.ones((T, S))), TypeError, "mask: .*modifiers.bias"),
    "attnlab mask": (
        call(mask=attnlab.masks.causal()),
        TypeError,
        "mask: expected an array, got Window",
    ),
    "mask shape": (
        call(mask=np.ones((T, S - 1), bool)),
        ValueError,
        r"mask: shape \(7, 10\) does not broadcast to \(2, 6, 7, 11\), \[\*batch, N,",
    ),
    "mask of key heads": (
        call(mask=np.ones((B, K, T, S), bool)),
        ValueError,
        r"mask: shape \(2, 3, 7, 11\) does not broadcast",
    ),
    "mask of five axes": (
        call(mask=np.ones((1, B, N, T, S), bool)),
        ValueError,
        "mask: shape .* does not broadcast",
    ),
    "bias shape": (
        call(bias=jnp.zeros((B, T, S))),
        ValueError,
        r"bias: shape \(2, 7, 11\) does not broadcast to \(2, 6, 7, 11\)",
    ),
    "boolean bias": (
        call(bias=np.ones((T, S), bool)),
        TypeError,
        "bias: .*pass it as mask=",
    ),
    "is_causal": (call(is_causal=1), TypeError, "is_causal: expected a bool.* got 1"),
    "return_residual": (
        call(return_residual="yes"),
        TypeError,
        "return_residual: expected a bool.* got 'yes'",
    ),
    "scale": (call(scale=jnp.ones(6)), ValueError, r"scale: expected a scalar.*\(6,\)"),
    "scale of a string": (call(scale="x"), TypeError, "scale: expected an array"),
    "negative window": (
        call(local_window_size=(3, -1)),
        ValueError,
        r"local_window_size: expected an int of at least 0.* got \(3, -1\)",
    ),
    "three windows": (call(local_window_size=(1, 2, 3)), ValueError, "local_window_"),
    "floating window": (call(local_window_size=1.5), ValueError, "local_window.*1.5"),
    "lengths dtype": (
        call(query_seq_lengths=np.ones(B)),
        TypeError,
        "query_seq_lengths: expected integers, got float",
    ),
    "lengths shape": (
        call(key_value_seq_lengths=np.ones(3, int)),
        ValueError,
        r"key_value_seq_lengths: expected one length.* shape \(2,\), got \(3,\)",
    ),
    "cudnn": (
        call(implementation="cudnn"),
        NotImplementedError,
        "implementation: 'cudnn' is jax.nn's own.* use None",
    ),
    "implementation": (
        call(implementation="flash"),
        ValueError,
        "implementation: expected one of native, pallas_tpu, .* got 'flash'",
    ),
    "refusal": (
        call(implementation="jax_nn", return_residual=True),
        NotImplementedError,
        "'jax_nn' cannot .*log-sum-exp",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_message(name):
    run, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        run()
