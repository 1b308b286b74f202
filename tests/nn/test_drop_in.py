"""``nn.attention_fn`` in the attention modules of Flax, Linen and NNX."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from attnlab import attention, masks, modifiers, nn, scores
from tests.grid import few, in_turn

B, T, S, F, N = 2, 6, 9, 12, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(B, T, F)), jnp.float32)
MEMORY = jnp.asarray(RNG.normal(size=(B, S, F)), jnp.float32)
ATTEND = nn.attention_fn()
#: Masks as Flax makes them: floating, and every query sees some key.
VISIBLE = (RNG.random((B, N, T, T)) < 0.5) | np.eye(T, dtype=bool)
MASKS = {
    "none": None,
    "causal": linen.make_causal_mask(jnp.ones((B, T))),
    "padding": np.arange(T) < np.array([4, 6])[:, None, None, None],
    "heads": jnp.asarray(VISIBLE, jnp.bfloat16),
}


def near(found, wanted, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), atol=atol
        )


def of_linen(attend=None, kind=linen.MultiHeadDotProductAttention, **options):
    if attend is not None:
        options["attention_fn"] = attend
    return kind(num_heads=N, qkv_features=16, out_features=7, **options)


def of_nnx(attend=None, **options):
    if attend is not None:
        options["attention_fn"] = attend
    options = dict(decode=False, rngs=nnx.Rngs(0)) | options
    return nnx.MultiHeadAttention(N, F, 16, 7, **options)


# The same module and parameters give the same result.


@pytest.mark.parametrize("name", MASKS)
def test_linen(name):
    params = of_linen().init(jax.random.key(0), X)
    assert jax.tree.structure(params) == jax.tree.structure(
        of_linen(ATTEND).init(jax.random.key(0), X)
    )

    def run(attend):
        def loss(params, x):
            output = of_linen(attend).apply(params, x, mask=MASKS[name])
            return jnp.sin(output).sum(), output

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, X)

    near(run(ATTEND), run(None))


@pytest.mark.parametrize(
    ("name", "key_heads", "is_causal"),
    few(
        itertools.product(MASKS, [4, 2], [False, True]),
        *(("none", 4, True), ("causal", 2, False), ("padding", 4, False)),
        *(("heads", 2, True), ("heads", 4, False)),
    ),
)
def test_nnx(name, key_heads, is_causal):
    def run(attend):
        layer = of_nnx(attend, num_kv_heads=key_heads)

        def loss(layer, x):
            mask = MASKS[name]
            if is_causal and mask is not None:
                # Flax needs it in full shape, to combine it with its causal mask.
                mask = jnp.broadcast_to(mask, (B, mask.shape[1], T, T))
            output = layer(x, mask=mask, is_causal=is_causal)
            return jnp.sin(output).sum(), output

        return nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layer, X)

    near(run(ATTEND), run(None))


@pytest.mark.slow
def test_the_alias_cross_attention_and_other_batch_axes():
    alias = functools.partial(of_linen, kind=linen.MultiHeadAttention)
    for make in (of_linen, alias):
        params = make().init(jax.random.key(0), X, MEMORY, MEMORY)
        for x, memory in ((X, MEMORY), (X[0], MEMORY[0]), (X[None], MEMORY[None])):
            near(
                make(ATTEND).apply(params, x, memory, memory * 2),
                make().apply(params, x, memory, memory * 2),
            )
    for x, memory in ((X, MEMORY), (X[0], MEMORY[0]), (X[None], MEMORY[None])):
        near(of_nnx(ATTEND)(x, memory), of_nnx()(x, memory))


@pytest.mark.parametrize(
    ("shape", "function"),
    few(
        itertools.product(
            [(B, N, T, S), (N, 1, S), (T, S), (1, 1, 1, S)],
            [linen.dot_product_attention, None],
        ),
        ((B, N, T, S), linen.dot_product_attention),
        ((N, 1, S), None),
    ),
)
def test_bias(shape, function):
    function = nnx.dot_product_attention if function is None else function
    q, k, v = (
        jnp.asarray(RNG.normal(size=(B, length, N, 5)), jnp.float32)
        for length in (T, S, S)
    )
    bias = jnp.asarray(RNG.normal(size=shape), jnp.float32)

    def run(attend, bias):
        mask = jnp.tri(T, S, dtype=bool)
        # Masks of NNX have four axes, as those of jax.nn.
        return attend(q, k, v, bias.reshape((1,) * (4 - bias.ndim) + shape), mask)

    near(run(ATTEND, bias), run(function, bias))
    gradients = [
        jax.grad(lambda b, a=attend: jnp.sin(run(a, b)).sum())(bias)
        for attend in (ATTEND, function)
    ]
    near(*gradients)


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize(
    ("dtype", "given"),
    in_turn([None, jnp.bfloat16, jnp.float16], [jnp.bfloat16, jnp.int32, np.float32]),
)
def test_dtype_of_the_computation(dtype, given):
    x = jnp.asarray(jnp.round(X * 2), given)
    params = of_linen().init(jax.random.key(0), X)
    # Two roundings of results below 4, and Flax's softmax is computed in 16 bits.
    atol = {None: 1e-5, jnp.bfloat16: 2**-5, jnp.float16: 2**-8}[dtype]
    make = functools.partial(of_linen, dtype=dtype)
    near(make(ATTEND).apply(params, x), make().apply(params, x), atol)
    make = functools.partial(of_nnx, dtype=dtype)
    near(make(ATTEND)(x), make()(x), atol)


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_of_the_function(dtype):
    # Results below 2 are rounded twice; Flax rounds its weights, too.
    q = X[:, :, None] / 2
    for function in (linen.dot_product_attention, nnx.dot_product_attention):
        found, wanted = (f(q, q, q, dtype=dtype) for f in (ATTEND, function))
        near(found, wanted, 4 * float(jnp.finfo(dtype).eps))


def test_forced_float32_softmax_is_what_there_is_anyway():
    params = of_linen().init(jax.random.key(0), X)
    make = functools.partial(of_linen, dtype=jnp.bfloat16)
    forced = make(ATTEND, force_fp32_for_softmax=True).apply(params, X)
    np.testing.assert_array_equal(forced, make(ATTEND).apply(params, X))


@pytest.mark.usefixtures("loose")
def test_types_are_promoted_by_the_function_given():
    def promote(arrays, *, dtype=None):
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    q = jnp.ones((T, N, 4))
    assert ATTEND(q, q, q, promote_dtype=promote).dtype == jnp.bfloat16
    assert ATTEND(q, q.astype(jnp.float16), q).dtype == jnp.float32


@pytest.mark.parametrize("precision", ["highest", jax.lax.Precision.HIGH])
def test_precision_reaches_the_products(precision):
    attend = nn.attention_fn(implementation="tiled")
    q = jnp.ones((T, N, 4))

    def program(**options):
        return jax.jit(lambda q: attend(q, q, q, **options)).lower(q).as_text()

    with jax.default_matmul_precision("default"):
        name = "HIGHEST" if precision == "highest" else "HIGH"
        assert f"[{name}, {name}]" not in program()
        assert f"[{name}, {name}]" in program(precision=precision)


def test_every_argument_of_flax_is_taken():
    taken = set(inspect.signature(ATTEND).parameters)
    for function in (linen.dot_product_attention, nnx.dot_product_attention):
        assert set(inspect.signature(function).parameters) <= taken


# Features that Flax does not have.


def test_score_mask_modifiers_and_sinks():
    score = scores.additive.init(jax.random.key(1), 4, hidden_size=5, num_heads=N)
    options = dict(
        score=score,
        mask=masks.sliding_window(2, 1),
        modifiers=[modifiers.alibi(N), modifiers.soft_cap(3.0)],
        sinks=np.arange(N, dtype=np.float32),
    )
    q, k, v = (
        jnp.asarray(RNG.normal(size=(B, T, N, 4)), jnp.float32) for _ in range(3)
    )
    bias = jnp.asarray(RNG.normal(size=(T, T)), jnp.float32)
    padding = MASKS["padding"]
    wanted = attention(
        q,
        k,
        v,
        **options
        | dict(
            mask=options["mask"] & masks.causal() & padding,
            modifiers=[*options["modifiers"], modifiers.bias(bias)],
        ),
        implementation="reference",
    )
    attend = nn.attention_fn(**options, implementation="tiled")
    near(attend(q, k, v, bias, padding, is_causal=True), wanted)


def test_a_mask_of_the_call_may_be_attnlabs():
    params = of_linen().init(jax.random.key(0), X)
    lengths = masks.lengths(key=np.array([4, 6]))
    near(
        of_linen(ATTEND).apply(params, X, mask=lengths),
        of_linen().apply(params, X, mask=MASKS["padding"]),
    )
    found = of_nnx(nn.attention_fn(mask=VISIBLE))(X, mask=lengths)
    near(found, of_nnx()(X, mask=MASKS["padding"] & VISIBLE))


def test_a_query_that_sees_nothing_yields_zero():
    mask = jnp.asarray(VISIBLE).at[:, :, 1].set(False)
    q = jnp.ones((B, T, N, 4))
    found = ATTEND(q, q, q, mask=mask)
    np.testing.assert_array_equal(found[:, 1], np.zeros((B, N, 4)))
    assert np.abs(np.delete(found, 1, 1)).min() > 0.9


def test_arrays_are_learned_where_the_function_is_made_within():
    weight = jnp.asarray(RNG.normal(size=(N, 4, 4)), jnp.float32)
    params = of_linen().init(jax.random.key(0), X)

    def loss(weight, implementation):
        attend = nn.attention_fn(
            score=scores.bilinear(weight), implementation=implementation
        )
        return jnp.sin(of_linen(attend).apply(params, X)).sum()

    found, wanted = (jax.jit(jax.grad(loss), static_argnums=1)(weight, name)
                     for name in ("tiled", "reference"))  # fmt: skip
    near(found, wanted)
    assert np.abs(found).max() > 1e-3


# Dropout.


def dropped(attend=ATTEND, t=64, s=48, rng=0, rate=0.3, **options):
    """Weights after dropout ``[B, T, N, S]``; without dropout they are uniform."""
    query, key = jnp.zeros((B, t, N, 4)), jnp.zeros((B, s, N, 4))
    value = jnp.broadcast_to(jnp.eye(s)[:, None], (B, s, N, s))
    return np.asarray(
        attend(
            query,
            key,
            value,
            dropout_rng=jax.random.key(rng),
            dropout_rate=rate,
            **options,
        )
    )


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
@pytest.mark.parametrize("shared", [True, False])
def test_dropout_statistics(shared, implementation):
    attend = nn.attention_fn(implementation=implementation)
    weights = dropped(attend, broadcast_dropout=shared)
    # Weights are dropped, or scaled so that the expectation does not change.
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / (48 * 0.7), rtol=1e-5)
    patterns = kept.swapaxes(1, 2).reshape(B * N, -1).astype(float)
    count = patterns[0].size * (1 if shared else B * N)
    # Five standard deviations of the mean of ``count`` independent draws.
    assert abs(patterns.mean() - 0.7) < 5 * np.sqrt(0.3 * 0.7 / count)
    for other in patterns[1:]:
        if shared:
            np.testing.assert_array_equal(other, patterns[0])
        else:
            agreement = (other == patterns[0]).mean()
            expected = 0.7**2 + 0.3**2
            spread = np.sqrt(expected * (1 - expected) / other.size)
            assert abs(agreement - expected) < 5 * spread


def test_dropout_is_decided_by_its_rng():
    np.testing.assert_array_equal(dropped(), dropped())
    assert (dropped() != dropped(rng=1)).mean() > 0.3
    np.testing.assert_array_equal(dropped(), dropped(broadcast_dropout=True))
    np.testing.assert_allclose(dropped(deterministic=True), 1 / 48, rtol=1e-6)
    np.testing.assert_allclose(dropped(rate=0.0), 1 / 48, rtol=1e-6)


def test_dropout_while_decoding_is_that_of_the_whole():
    whole = dropped(t=48) > 0
    index = np.array([20, 33])
    mask = np.arange(48) <= index[:, None, None, None]
    step = dropped(t=1, mask=mask) > 0
    for example, place in enumerate(index):
        np.testing.assert_array_equal(
            step[example, 0, :, : place + 1],
            whole[example, place, :, : place + 1],
        )


def test_dropout_in_the_modules():
    layer = of_linen(ATTEND, dropout_rate=0.4, deterministic=False)
    params = of_linen().init(jax.random.key(0), X)

    def run(seed, **options):
        return layer.apply(params, X, rngs={"dropout": jax.random.key(seed)}, **options)

    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 1e-3
    still = of_linen(ATTEND, dropout_rate=0.4, deterministic=True)
    near(still.apply(params, X), of_linen().apply(params, X))

    def nnx_run(seed, **options):
        layer = of_nnx(ATTEND, dropout_rate=0.4, deterministic=False)
        return layer(X, rngs=nnx.Rngs(dropout=seed), **options)

    np.testing.assert_array_equal(nnx_run(0), nnx_run(0))
    assert np.abs(nnx_run(0) - nnx_run(1)).max() > 1e-3
    near(nnx_run(0, deterministic=True), of_nnx()(X))


# Weights on request.


@pytest.mark.parametrize(
    ("dtype", "dropout"),
    few(itertools.product([None, jnp.bfloat16], [0.0, 0.4]), (None, 0.4)),
)
def test_linen_sows_what_flax_sows(dtype, dropout):
    params = of_linen().init(jax.random.key(0), X)

    def sown(attend, x=X, mask=MASKS["heads"]):
        layer = of_linen(attend, dtype=dtype, dropout_rate=dropout, deterministic=False)
        return layer.apply(
            params,
            x,
            mask=mask,
            sow_weights=True,
            mutable=["intermediates"],
            rngs={"dropout": jax.random.key(0)},
        )[1]

    near(sown(ATTEND), sown(None), 1e-5 if dtype is None else 2**-7)
    near(sown(ATTEND, X[0], None), sown(None, X[0], None), 2**-7)


@pytest.mark.parametrize("key_heads", [4, 2])
def test_nnx_sows_what_flax_sows(key_heads):
    def sown(attend):
        call = nnx.capture(of_nnx(attend, num_kv_heads=key_heads), nnx.Intermediate)
        output, state = call(X, mask=MASKS["padding"], sow_weights=True)
        return output, nnx.to_pure_dict(state)

    found, wanted = sown(ATTEND), sown(None)
    assert found[1]["attention_weights"][0].shape == (B, N, T, T)
    near(found, wanted)


def test_sown_weights_do_not_depend_on_the_implementation():
    layer = of_nnx(nn.attention_fn(implementation="jax_nn"))
    output, state = nnx.capture(layer, nnx.Intermediate)(X, sow_weights=True)
    (weights,) = nnx.to_pure_dict(state)["attention_weights"]
    near(output, of_nnx()(X))
    np.testing.assert_allclose(weights.sum(-1), np.ones((B, N, T)), atol=1e-6)


# Decoding with Flax's cache.

BANDS = {
    "causal": nn.attention_fn(mask=masks.causal()),
    "window": nn.attention_fn(mask=masks.sliding_window(2, 0)),
    "prefix": nn.attention_fn(
        mask=masks.causal() & (masks.sliding_window(1, 0) | masks.prefix(2))
    ),
    "alibi": nn.attention_fn(
        mask=masks.sliding_window(3, 0), modifiers=[modifiers.alibi(N)]
    ),
    "relative": nn.attention_fn(
        mask=masks.causal(),
        modifiers=[
            modifiers.clipped_relative(
                RNG.normal(size=(N, 4)).astype("f"), left=3, right=0
            )
        ],
    ),
    "bilinear": nn.attention_fn(
        score=scores.bilinear.init(jax.random.key(3), 4), mask=masks.causal()
    ),
}


@pytest.mark.parametrize("name", few(BANDS, *[*BANDS][::2]))
def test_linen_decodes_as_the_whole(name):
    whole, steps = of_linen(BANDS[name]), of_linen(BANDS[name], decode=True)
    variables = steps.init(jax.random.key(0), X)
    params, cache = {"params": variables["params"]}, variables["cache"]
    wanted = whole.apply(params, X)
    # Flax's own function can be compared only for masks that it has.
    if name == "causal":
        mask = linen.make_causal_mask(jnp.ones((B, T)))
        near(wanted, of_linen().apply(params, X, mask=mask))

    @jax.jit
    def step(cache, x):
        variables = params | {"cache": cache}
        return steps.apply(variables, x, mutable=["cache"])

    outputs = []
    for place in range(T):
        output, changed = step(cache, X[:, place : place + 1])
        cache = changed["cache"]
        outputs.append(output)
    near(jnp.concatenate(outputs, 1), wanted)


@pytest.mark.parametrize(
    ("name", "key_heads", "is_causal"),
    in_turn(["plain", *BANDS], [4, 2], [False, True, True]),
)
def test_nnx_decodes_as_the_whole(name, key_heads, is_causal):
    attend = ATTEND if name == "plain" else BANDS[name]
    layer = of_nnx(attend, num_kv_heads=key_heads)
    wanted = nnx.jit(lambda layer: layer(X, is_causal=True))(layer)
    if name == "plain":
        near(wanted, of_nnx(num_kv_heads=key_heads)(X, is_causal=True))
    layer.init_cache(X.shape)

    @nnx.jit
    def step(layer, x):
        return layer(x, decode=True, is_causal=is_causal)

    outputs = [step(layer, X[:, place : place + 1]) for place in range(T)]
    near(jnp.concatenate(outputs, 1), wanted)


@pytest.mark.slow
def test_each_example_has_a_position_of_its_own():
    options = dict(mask=masks.sliding_window(1, 0), modifiers=[modifiers.alibi(N)])
    q, k, v = (
        jnp.asarray(RNG.normal(size=(2, 3, length, N, 5)), jnp.float32)
        for length in (1, S, S)
    )
    index = RNG.integers(0, S, (2, 3))
    mask = np.arange(S) <= np.asarray(index)[..., None, None, None]
    wanted = attention(q, k, v, query_offset=index, **options)
    attend = nn.attention_fn(**options)
    near(attend(q, k, v, mask=mask), wanted)
    near(attend(q, k, v, mask=mask, is_causal=True), wanted)
    # Heads that see less do not change the position of the query.
    less = jnp.broadcast_to(mask, (2, 3, N, 1, S)).at[:, :, 0].set(False)
    near(attend(q, k, v, mask=less)[..., 1:, :], wanted[..., 1:, :])
    # One mask for all examples and heads.
    near(
        attend(q, k, v, mask=np.arange(S) <= 4),
        attention(q, k, v, query_offset=4, **options),
    )


def test_one_query_without_a_mask_stands_at_the_start():
    q, k, v = jnp.ones((B, 1, N, 4)), jnp.ones((B, S, N, 4)), RNG.normal(size=(S, 4))
    v = jnp.broadcast_to(jnp.asarray(v, jnp.float32)[:, None], (B, S, N, 4))
    near(ATTEND(q, k, v, is_causal=True)[:, 0], v[:, 0])


# Refusals.

Q = jnp.ones((B, T, N, 4))
ERRORS = {
    **{
        name: (
            lambda name=name: ATTEND(Q, Q, Q, **{name: jnp.einsum}),
            NotImplementedError,
            f"{name}: attnlab's tiles have no einsum.* leave it .* Flax's own",
        )
        for name in (
            "einsum_dot_general",
            "qk_attn_weights_einsum",
            "attn_weights_value_einsum",
        )
    },
    "a module's einsum": (
        lambda: of_linen(
            ATTEND,
            qk_attn_weights_einsum_cls=lambda: jnp.einsum,
            attn_weights_value_einsum_cls=lambda: jnp.einsum,
        ).init(jax.random.key(0), X),
        NotImplementedError,
        "qk_attn_weights_einsum: .*_einsum_cls",
    ),
    "mask shape": (
        lambda: ATTEND(Q, Q, Q, mask=jnp.ones((B, T, T))),
        ValueError,
        r"mask: shape \(2, 6, 6\) does not broadcast to \(2, 4, 6, 6\), \[\*batch",
    ),
    "mask of the cache and attnlab's": (
        lambda: ATTEND(Q, Q, Q, mask="causal"),
        TypeError,
        "mask: expected an array, got str",
    ),
    "bias shape": (
        lambda: ATTEND(Q, Q, Q, jnp.ones((T, 3))),
        ValueError,
        r"bias: shape \(6, 3\) does not broadcast to \(2, 4, 6, 6\)",
    ),
    "boolean bias": (
        lambda: ATTEND(Q, Q, Q, jnp.ones((T, T), bool)),
        TypeError,
        "bias: .*pass it as mask=",
    ),
    "modifier alone": (
        lambda: nn.attention_fn(modifiers=modifiers.soft_cap(3.0))(Q, Q, Q),
        TypeError,
        r"modifiers: expected a sequence, got SoftCap.*; write modifiers=\[",
    ),
    "mask of the function": (
        lambda: nn.attention_fn(mask="causal"),
        TypeError,
        "mask: expected an attnlab mask, a boolean array or None, got str",
    ),
    "score": (
        lambda: nn.attention_fn(score=scores.dot)(Q, Q, Q),
        TypeError,
        "score: .*class: call it",
    ),
    "rank": (lambda: ATTEND(Q[0, 0], Q, Q), ValueError, "query: .*three axes"),
    "heads": (lambda: ATTEND(Q, Q[:, :, :3], Q), ValueError, "value: heads K"),
    "dropout without rng": (
        lambda: ATTEND(Q, Q, Q, dropout_rate=0.5),
        ValueError,
        "dropout_rng: dropout_rate=0.5 needs a PRNG key, got None",
    ),
    "dropout of everything": (
        lambda: ATTEND(Q, Q, Q, dropout_rate=1.0, dropout_rng=jax.random.key(0)),
        ValueError,
        r"dropout_rate: expected a number in \[0, 1\)",
    ),
    "implementation": (
        lambda: nn.attention_fn(implementation="flash")(Q, Q, Q),
        ValueError,
        "implementation: expected one of .* got 'flash'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_message(name):
    run, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        run()
