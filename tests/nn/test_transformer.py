"""Blocks, stacks, and the encoder-decoder Transformer."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnlab import masks, nn
from tests.grid import few, in_turn

SMALL = dict(features=16, num_heads=2, num_layers=3)


def test_residuals_and_norms():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    norm = nnx.LayerNorm(8, rngs=nnx.Rngs(0))

    def layer(x):
        return jnp.sin(3 * x)

    np.testing.assert_allclose(nn.Residual()(x, layer), x + layer(x))
    np.testing.assert_allclose(nn.PreNorm(norm)(x, layer), x + layer(norm(x)))
    np.testing.assert_allclose(nn.PostNorm(norm)(x, layer), norm(x + layer(x)))
    np.testing.assert_allclose(nn.NoResidual(norm)(x, layer), layer(norm(x)))


def test_plain_and_gated_feed_forward():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    plain = nn.FeedForward(8, 12, rngs=nnx.Rngs(0))
    hidden = jax.nn.relu(x @ plain.up.kernel[...])
    np.testing.assert_allclose(plain(x), hidden @ plain.down.kernel[...], atol=1e-5)
    gated = nn.GatedFeedForward(8, 12, activation=jax.nn.silu, rngs=nnx.Rngs(0))
    hidden = jax.nn.silu(x @ gated.gate.kernel[...]) * (x @ gated.up.kernel[...])
    np.testing.assert_allclose(gated(x), hidden @ gated.down.kernel[...], atol=1e-5)


def gradient_norms(residual):
    """Gradient norms of the first and of the last of 32 layers."""
    rngs = nnx.Rngs(0)
    blocks = nn.make_blocks(32, features=16, num_heads=2, residual=residual, rngs=rngs)
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))
    above = jax.random.normal(jax.random.key(2), (2, 8, 16))
    stack = nn.Stack(blocks, scan=True)
    gradient = nnx.jit(nnx.grad(lambda stack: (stack(x) * above).sum()))(stack)
    leaves = map(np.asarray, jax.tree.leaves(gradient))
    squares = [(leaf**2).reshape(32, -1).sum(1) for leaf in leaves]
    norms = np.sqrt(sum(squares))
    return norms[0], norms[-1]


@pytest.mark.slow
def test_residual_and_norm_keep_the_gradient():
    first, last = gradient_norms(nn.PreNorm)
    assert last / 10 < first < last * 10
    first, last = gradient_norms(nn.NoResidual)
    assert not last / 10 < first < last * 10


@pytest.mark.parametrize(
    ("options", "residual"),
    in_turn([dict(remat=True), dict(scan=True)], [nn.PreNorm, nn.PostNorm]),
)
def test_remat_and_scan_change_nothing(options, residual):
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 20)

    def model(**options):
        return nn.Decoder.standard(
            20,
            residual=residual,
            position=nn.Rotary,
            rngs=nnx.Rngs(0),
            **SMALL,
            **options,
        )

    def value_and_norms(model):
        both = nnx.jit(nnx.value_and_grad(lambda m: (m(tokens) ** 2).sum()))
        value, gradient = both(model)
        return value, [
            np.linalg.norm(g) for g in jax.tree.leaves(gradient["embedding"])
        ]

    plain, other = value_and_norms(model()), value_and_norms(model(**options))
    np.testing.assert_allclose(plain[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(plain[1], other[1], rtol=1e-4)


@pytest.mark.slow
def test_remat_holds_less():
    def program(**options):
        blocks = nn.make_blocks(8, features=16, num_heads=2, rngs=nnx.Rngs(0))
        graph, state = nnx.split(nn.Stack(blocks, **options))

        def loss(state, x):
            return (nnx.merge(graph, state)(x) ** 2).sum()

        x = jax.ShapeDtypeStruct((4, 128, 16), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(state, x)

    def held(**options):
        compiled = program(scan=True, **options).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(remat=True) < 0.4 * held()
    # One barrier per block; XLA for CPUs removes barriers outside of loops.
    assert program(remat=True).as_text().count("optimization_barrier") == 8


def test_only_what_norms_its_input_norms_its_last_output():
    x = 100 * jax.random.normal(jax.random.key(0), (1, 5, 16))
    for residual in (nn.PreNorm, nn.PostNorm):
        options = SMALL | dict(residual=residual, rngs=nnx.Rngs(0))
        for model in (nn.Encoder, nn.Decoder):
            stack = model.standard(20, **options).stack
            assert (stack.norm is not None) == (residual is nn.PreNorm)
            np.testing.assert_allclose(stack(x).std(-1), 1, atol=1e-3)


class Scaled(nn.PreNorm):
    """A user's pre-norm residual that halves the output of the layer."""

    def __call__(self, x, layer):
        return super().__call__(x, lambda x: 0.5 * layer(x))


@pytest.mark.parametrize(
    "residual",
    [Scaled, functools.partial(nn.PreNorm), lambda norm, **o: Scaled(norm)],
)
def test_residuals_that_only_make_a_pre_norm_have_a_last_norm(residual):
    made = nn.Encoder.standard(
        5, features=4, num_heads=1, num_layers=1, residual=residual, rngs=nnx.Rngs(0)
    )
    assert isinstance(made.stack.norm, nnx.LayerNorm)


def test_stacked_parameters_lead_with_layers():
    model = nn.Decoder.standard(20, scan=True, rngs=nnx.Rngs(0), **SMALL)
    kernel = model.stack.blocks.attention.query.kernel
    assert kernel.shape == (3, 16, 2, 8)
    names = nnx.get_partition_spec(nnx.state(model.stack.blocks.attention))
    assert names["query"]["kernel"].get_value() == jax.sharding.PartitionSpec(
        "layers", "embed", "heads", "head_size"
    )


def test_scan_draws_other_dropout_in_each_layer_and_step():
    model = nn.Decoder.standard(
        20, scan=True, dropout_rate=0.5, rngs=nnx.Rngs(0), **SMALL
    )
    model.train()
    tokens = jnp.zeros((1, 4), int)
    first, second = model(tokens), model(tokens)
    assert float(jnp.abs(first - second).max()) > 1e-3
    model.eval()
    np.testing.assert_array_equal(model(tokens), model(tokens))


def test_scan_of_unlike_blocks_is_refused():
    with pytest.raises(ValueError, match="scan: the blocks differ"):
        nn.Decoder.standard(
            20,
            scan=True,
            mask=[masks.causal(), masks.causal() & masks.sliding_window(2, 0)] * 2,
            rngs=nnx.Rngs(0),
            **SMALL | {"num_layers": 4},
        )


def test_a_pattern_for_each_layer():
    """The last token depends on what windows of 2 and 1 reach in two layers."""
    patterns = [masks.causal() & masks.sliding_window(n, 0) for n in (2, 1)]
    model = nn.Decoder.standard(
        20, mask=patterns, rngs=nnx.Rngs(0), **SMALL | {"num_layers": 2}
    )
    x = jax.random.normal(jax.random.key(0), (1, 8, 16))
    gradient = jax.grad(lambda x: model.stack(x)[0, -1].sum() ** 2)(x)
    reach = jnp.abs(gradient).max((0, 2)) > 0
    np.testing.assert_array_equal(reach, [0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.slow
def test_padding_of_the_source_changes_nothing():
    model = nn.EncoderDecoder.standard(30, rngs=nnx.Rngs(0), **SMALL)
    source = jax.random.randint(jax.random.key(0), (2, 7), 0, 30)
    target = jax.random.randint(jax.random.key(1), (2, 5), 0, 30)
    lengths = jnp.array([4, 7])
    seen = masks.lengths(key=lengths)
    call = jax.jit(model)
    found = call(source, target, source_mask=seen, memory_mask=seen)
    alone = call(source[:1, :4], target[:1])
    np.testing.assert_allclose(found[:1], alone, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_decoder_step_by_step(scan):
    model = nn.EncoderDecoder.standard(
        30,
        scan=scan,
        residual=nn.PreNorm,
        num_key_heads=1,
        norm=nnx.RMSNorm,
        feed_forward=functools.partial(nn.GatedFeedForward, activation=jax.nn.gelu),
        rngs=nnx.Rngs(0),
        **SMALL,
    )
    source = jax.random.randint(jax.random.key(0), (2, 7), 0, 30)
    target = jax.random.randint(jax.random.key(1), (2, 5), 0, 30)
    seen = masks.lengths(key=jnp.array([4, 7]))

    @jax.jit
    def begin(model):
        whole = model(source, target, source_mask=seen, memory_mask=seen)
        memory = model.encoder(source, mask=seen)
        return whole, model.decoder.start(2, 5, memory, memory_mask=seen)

    whole, state = begin(model)
    decode = jax.jit(model.decoder.decode)
    first, state = decode(target[:, :2], state)
    parts = [first]
    for t in range(2, 5):
        logits, state = decode(target[:, t : t + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)


def half(part, **options):
    return functools.partial(part, dtype=jnp.bfloat16, **options)


def embedding(**options):
    return nn.Embedding(30, 16, rngs=nnx.Rngs(1), **options)


#: Options of a decoder, and the dtypes of its self-attentions.
TYPES = {
    "float32": ({}, "float32", "float32"),
    "attention": (dict(attention=half(nn.MultiHeadAttention)), "bfloat16", "bfloat16"),
    "scanned": (
        dict(attention=half(nn.MultiHeadAttention), scan=True),
        "bfloat16",
        "bfloat16",
    ),
    "parameters": (
        dict(
            attention=functools.partial(
                nn.MultiHeadAttention, param_dtype=jnp.bfloat16
            ),
            embedding=embedding(param_dtype=jnp.bfloat16),
        ),
        "bfloat16",
        "float32",  # the norms of the first block return float32
    ),
    "norm first": (
        dict(
            attention=functools.partial(
                nn.MultiHeadAttention, param_dtype=jnp.bfloat16
            ),
            embedding=embedding(param_dtype=jnp.bfloat16),
            residual=nn.PreNorm,
        ),
        "float32",
        "float32",
    ),
    "all": (
        dict(
            attention=half(nn.MultiHeadAttention, head_size=6, value_size=4),
            embedding=embedding(dtype=jnp.bfloat16),
            feed_forward=half(nn.FeedForward),
            norm=half(nnx.LayerNorm),
            num_key_heads=1,
            dropout_rate=0.5,
        ),
        "bfloat16",
        "bfloat16",
    ),
}


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("name", few(TYPES, "all"))
def test_caches_have_the_type_that_attention_computes_in(name):
    options, *types = TYPES[name]
    model = nn.Decoder.standard(
        30, rngs=nnx.Rngs(0), **SMALL | {"num_layers": 2} | options
    )
    model.train()
    state = model.start(2, 5)  # no random numbers are used
    found = [str(block.cache.key.dtype) for block in state.blocks]
    assert found == types
    model.eval()
    traced = nnx.jit(lambda model: model.start(2, 5))(model)
    assert jax.tree.map(jnp.result_type, traced) == jax.tree.map(jnp.result_type, state)
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 30)
    whole = np.asarray(nnx.jit(lambda model: model(tokens))(model))
    decode = nnx.jit(lambda model, *rest: model.decode(*rest))
    first, state = decode(model, tokens[:, :3], state)
    parts = [first]
    for t in range(3, 5):
        logits, state = decode(model, tokens[:, t : t + 1], state)
        parts.append(logits)
    assert parts[-1].dtype == whole.dtype
    atol = 1e-4 if types == ["float32"] * 2 else 0.1
    np.testing.assert_allclose(
        np.concatenate(parts, 1).astype(float), whole.astype(float), atol=atol
    )


@pytest.mark.slow
def test_type_of_caches_beside_a_memory_and_on_request():
    model = nn.EncoderDecoder.standard(
        30, attention=half(nn.MultiHeadAttention), rngs=nnx.Rngs(0), **SMALL
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 30)
    memory = jax.jit(model.encoder)(tokens)
    decoder = model.decoder
    decode = jax.jit(decoder.decode)
    found, _ = decode(tokens, decoder.start(2, 5, memory))
    same = decoder.start(2, 5, memory, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found, decode(tokens, same)[0])
    other = decoder.start(2, 5, memory, dtype=jnp.float32)
    with pytest.raises(TypeError, match=r"cache: expected dtype bfloat16, .* float32"):
        decoder.decode(tokens, other)


def test_memory_of_other_features_has_no_say_in_the_types_of_caches():
    attention = half(nn.MultiHeadAttention)
    rngs = nnx.Rngs(0)
    block = nn.Block(
        attention(16, 2, mask=masks.causal(), rngs=rngs),
        nn.FeedForward(16, 8, rngs=rngs),
        cross_attention=attention(16, 2, key_features=7, rngs=rngs),
        residual=nn.Residual,
    )
    decoder = nn.Decoder(embedding(), nn.Stack([block]))
    state = decoder.start(2, 5, jnp.ones((2, 3, 7)))
    assert state.blocks[0].cache.key.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(3, 1), (2,)])
def test_tokens_of_another_batch_than_the_state(shape):
    model = nn.Decoder.standard(30, rngs=nnx.Rngs(0), **SMALL)
    with pytest.raises(ValueError, match=r"tokens: expected \[2, T\], .* got shape"):
        model.decode(jnp.zeros(shape, int), model.start(2, 5))


@pytest.mark.slow
def test_positions_count_in_cross_attention_too():
    """A window over the memory moves with each decoding step."""
    model = nn.Decoder.standard(
        30, cross_attention=True, position=nn.Rotary, rngs=nnx.Rngs(0), **SMALL
    )
    memory = jax.random.normal(jax.random.key(0), (2, 6, SMALL["features"]))
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 30)
    window = masks.sliding_window(1, 1)
    call, decode = jax.jit(model), jax.jit(model.decode)
    whole = call(tokens, memory, memory_mask=window)
    state = model.start(2, 6, memory, memory_mask=window)
    parts = []
    for t in range(6):
        logits, state = decode(tokens[:, t : t + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)
    places = np.arange(3, 6)
    later = call(tokens[:, 3:], memory, memory_mask=window, positions=places)
    first = call(tokens[:, 3:], memory, memory_mask=window)
    assert float(jnp.abs(later - first).max()) > 1e-2
    (block,) = model.stack.blocks[:1]
    x = memory[:, :1]
    at = block.cross_attention(x, memory, mask=window, query_positions=jnp.array([4]))
    moved = block.cross_attention(x, memory, mask=window)
    assert float(jnp.abs(at - moved).max()) > 1e-3


def test_masks_and_vectors_of_both_sides():
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 30)
    other = tokens.at[:, 4].set((tokens[:, 4] + 1) % 30)
    window = masks.sliding_window(2, 2)
    for mask in (None, window, [window, masks.full(), window]):
        embedding = nn.Embedding(30, SMALL["features"], rngs=nnx.Rngs(1))
        model = nn.EncoderDecoder.standard(
            30, mask=mask, embedding=embedding, rngs=nnx.Rngs(0), **SMALL
        )
        assert model.encoder.embedding is embedding is model.decoder.embedding
        found, changed = (model(tokens, target) for target in (tokens, other))
        np.testing.assert_array_equal(found[:, :4], changed[:, :4])
        assert float(jnp.abs(found[:, 4:] - changed[:, 4:]).max()) > 1e-3


def test_documents_in_one_row_are_as_if_alone():
    model = nn.Decoder.standard(30, rngs=nnx.Rngs(0), **SMALL)
    tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 30)
    ids = jnp.array([[0] * 4 + [1] * 5])
    where = jnp.concatenate([jnp.arange(4), jnp.arange(5)])
    # Positions restart in each document, so the mask must not depend on them.
    x = model.embedding(tokens, where)
    packed = jax.jit(model.stack)(x, mask=masks.documents(ids))
    alone = jax.jit(model.stack)(model.embedding(tokens[:, 4:]))
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-5)


def test_memory_without_cross_attention_and_the_reverse():
    block = nn.make_blocks(1, features=8, num_heads=2, rngs=nnx.Rngs(0))[0]
    x = jnp.ones((1, 3, 8))
    with pytest.raises(ValueError, match="memory: the block has no cross_attention"):
        block(x, x)
    (block,) = nn.make_blocks(
        1, features=8, num_heads=2, cross_attention=True, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="memory: .* needs one, got None"):
        block(x)


LENGTHS = jnp.array([3, 4])
REAL = np.arange(4) < np.array(LENGTHS)[:, None]
PLACES = np.where(REAL, np.arange(4), -1).astype(np.int32)


def of_paddings(model, run, x, paddings):
    """Sum of the outputs of real tokens, and gradients, for each value of padding."""
    real = REAL.reshape(*REAL.shape, *[1] * (x.ndim - 2))

    @nnx.jit
    def both(model, x):
        return nnx.value_and_grad(
            lambda model: jnp.where(REAL[..., None], run(model, x), 0).sum()
        )(model)

    return [jax.tree.leaves(both(model, jnp.where(real, x, p))) for p in paddings]


def blocks():
    options = {"features": 8, "num_heads": 2, "hidden_features": 8}
    return nn.make_blocks(2, residual=nn.PreNorm, rngs=nnx.Rngs(0), **options)


def both_sides(model, x):
    return model(x, mask=masks.lengths(LENGTHS, LENGTHS))


PADDED = {
    "dense": (
        lambda: nn.MultiHeadAttention(8, 2, mask=masks.causal(), rngs=nnx.Rngs(0)),
        lambda m, x: m(x, mask=REAL[:, None, :, None] & REAL[:, None, None, :]),
    ),
    "positions": (
        lambda: nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)),
        lambda m, x: m(x, query_positions=PLACES, key_positions=PLACES),
    ),
    "cross-attention": (
        lambda: nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)),
        lambda m, x: m(jnp.ones((2, 4, 8)), x, mask=masks.lengths(key=LENGTHS)),
    ),
    "projected before": (
        lambda: nn.MultiHeadAttention(8, 2, rngs=nnx.Rngs(0)),
        lambda m, x: m.attend(
            x,
            m.project(x, positions=PLACES),
            query_positions=PLACES,
            key_positions=PLACES,
        ),
    ),
    "alignment": (
        lambda: nn.Alignment.projected(8, 8, 4, rngs=nnx.Rngs(0)),
        lambda m, x: m.attend(
            jnp.ones((2, 4, 8)), m.project(x, positions=PLACES), key_positions=PLACES
        ),
    ),
    "anchors": (
        lambda: nn.AnchoredAttention(
            8,
            2,
            mask=masks.longformer(window=2, anchors=1),
            anchors=nn.AnchorProjections(8, 2, 4, positions=1, rngs=nnx.Rngs(1)),
            rngs=nnx.Rngs(0),
        ),
        both_sides,
    ),
    "block": (lambda: blocks()[0], lambda m, x: m(x, mask=masks.documents(PLACES))),
    "stack": (lambda: nn.Stack(blocks()), both_sides),
    "scan": (
        lambda: nn.Stack(blocks(), scan=True),
        lambda m, x: m(x, query_positions=PLACES),
    ),
}


@pytest.mark.parametrize(
    "name", few(PADDED, "dense", "positions", "cross-attention", "anchors", "scan")
)
def test_padding_reaches_no_gradient(name):
    make, run = PADDED[name]
    model = make()
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    wanted, *found = of_paddings(model, run, x, (0, jnp.nan, jnp.inf))
    for leaves in found:
        for one, other in zip(leaves, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_tokens_in_padding_need_no_vector():
    """Padding tokens may be beyond the vocabulary, for which Flax returns NaN."""
    model = nn.Encoder.standard(
        5, num_layers=1, features=8, num_heads=2, rngs=nnx.Rngs(0)
    )
    tokens = jnp.ones((2, 4), jnp.int32)
    found, wanted = of_paddings(model, both_sides, tokens, (99, 0))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_what_a_query_sees_shows():
    """NaN in a visible key is not hidden."""
    layer = nn.MultiHeadAttention(8, 2, mask=masks.causal(), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 4, 8)).at[0, 2].set(jnp.nan)
    assert np.isnan(layer(x)[0, 2:]).all()


@pytest.mark.slow
def test_a_memory_mask_is_reordered_with_the_beams():
    """A mask with an array for all examples, and one with an array per example."""
    mask = masks.dense(np.arange(4)[None, :] < 3) & masks.lengths(key=LENGTHS)
    model = nn.Decoder.standard(
        5, num_layers=1, features=8, num_heads=2, cross_attention=True, rngs=nnx.Rngs(0)
    )
    memory = jax.random.normal(jax.random.key(0), (2, 4, 8))
    prompt = jnp.zeros((2, 1), jnp.int32)

    @jax.jit
    def both(model):
        state = model.start(2, 3, memory, memory_mask=mask)
        found = nn.beam_search(model.decode, state, prompt, beams=2, length=3, end=9)
        tokens = found.tokens[:, 0]
        given = jnp.concatenate([prompt, tokens[:, :-1]], 1)
        log_p = jax.nn.log_softmax(model(given, memory, memory_mask=mask))
        gains = jnp.take_along_axis(log_p, tokens[..., None], 2)[..., 0]
        return gains.sum(1), found.scores[:, 0]

    np.testing.assert_allclose(*both(model), atol=1e-4)


def test_memory_masks_that_do_not_lead_with_the_batch():
    model = nn.Decoder.standard(
        5, num_layers=1, features=8, num_heads=2, cross_attention=True, rngs=nnx.Rngs(0)
    )
    for mask in (masks.lengths(key=np.array(3)), np.ones((3, 1, 1, 4), bool)):
        with pytest.raises(ValueError, match="memory_mask: .* lead with a batch of 2"):
            model.start(2, 3, jnp.ones((2, 4, 8)), memory_mask=mask)


@pytest.mark.parametrize("scan", [False, True])
def test_flax_tabulates_decoders(scan):
    model = nn.Decoder.standard(
        5, num_layers=2, features=8, num_heads=2, scan=scan, rngs=nnx.Rngs(0)
    )
    assert " Block " in nnx.tabulate(model, jnp.zeros((1, 3), jnp.int32))


def test_errors_of_stacks():
    with pytest.raises(ValueError, match="blocks: expected at least one"):
        nn.Stack([])
    with pytest.raises(ValueError, match="mask: got 2 masks for 3 layers"):
        nn.make_blocks(3, features=8, num_heads=2, mask=[None] * 2, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (nn.Rotary(), r"got an instance of Rotary; write position=lambda: Rotary\("),
        (nn.Alibi(2), "got an instance of Alibi; write position=lambda: Alibi"),
        (nn.Alibi, r"Alibi is called without arguments .* position=lambda: Alibi\("),
        ("rotary", "got an instance of str; write position=Rotary"),
        (nn.Learned, r"Learned is added .* belongs in Embedding\(position="),
        (nn.Sinusoidal(), r"Sinusoidal is added .* belongs in Embedding\(position="),
        (
            lambda: nn.Learned(8, 16, rngs=nnx.Rngs(0)),
            r"Learned is added .* belongs in Embedding\(position=",
        ),
    ],
)
def test_positions_that_are_something_else(position, message):
    with pytest.raises(TypeError, match="position: .*" + message):
        nn.Decoder.standard(20, position=position, rngs=nnx.Rngs(0), **SMALL)


@pytest.mark.parametrize(
    ("length", "scan"),  # SMALL has 3 layers
    [*itertools.product([3, 5], [False, True])],
)
@pytest.mark.slow
def test_an_array_is_one_mask_for_all_blocks(length, scan):
    def logits(kind, mask):
        model = kind.standard(20, mask=mask, scan=scan, rngs=nnx.Rngs(0), **SMALL)
        tokens = jnp.arange(2 * length).reshape(2, length)
        given = (tokens, tokens) if kind is nn.EncoderDecoder else (tokens,)
        return nnx.jit(lambda model: model(*given))(model)

    for kind in (nn.Decoder, nn.EncoderDecoder):
        found = logits(kind, np.tri(length, dtype=bool))
        np.testing.assert_allclose(found, logits(kind, masks.causal()), atol=1e-5)
    with pytest.raises(TypeError, match="mask: expected an attnlab mask, .* function"):
        logits(nn.Decoder, masks.causal)


@pytest.mark.slow
@pytest.mark.usefixtures("loose")  # for optax
def test_overfits_64_pairs():
    """The model learns random sentences and their reversals by heart."""
    count, length, vocabulary, start, end = 64, 6, 24, 0, 1
    random = np.random.default_rng(0)
    words = random.integers(2, vocabulary, (count, length))
    sizes = random.integers(3, length + 1, count)
    inside = np.arange(length) < sizes[:, None]
    source = np.where(inside, words, 1)
    target = np.full((count, length + 1), end)
    for row, (sentence, n) in enumerate(zip(words, sizes, strict=True)):
        target[row, :n] = sentence[:n][::-1]
    given = np.concatenate([np.full((count, 1), start), target[:, :-1]], 1)
    counted = np.arange(length + 1) <= sizes[:, None]
    seen = masks.lengths(key=jnp.asarray(sizes))

    model = nn.EncoderDecoder.standard(
        vocabulary, features=32, num_heads=4, num_layers=1, residual=nn.PreNorm,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    optimizer = nnx.Optimizer(model, optax.adam(6e-3), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer):
        def loss(model):
            logits = model(
                jnp.asarray(source),
                jnp.asarray(given),
                source_mask=seen,
                memory_mask=seen,
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
            return losses.sum(where=counted) / counted.sum()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    for _ in range(130):
        value = train(model, optimizer)
    assert value < 0.05

    @jax.jit
    def translate(source):
        memory = model.encoder(source, mask=seen)
        state = model.decoder.start(count, length + 2, memory, memory_mask=seen)
        prompt = jnp.full((count, 1), start)
        return nn.greedy(
            model.decoder.decode, state, prompt, length=length + 1, end=end, padding=end
        )

    np.testing.assert_array_equal(translate(jnp.asarray(source)).tokens, target)
