"""Recurrent decoders against the equations of their papers, step by step."""

import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, nn, scores
from tests.grid import few
from tests.nn.recurrent import reference
from tests.nn.recurrent.test_layers import drawn, log_softmax, with_nan

B, S, T, F, H, V, W = 2, 5, 3, 7, 10, 13, 11
LENGTHS = np.array([2, S])
SIZES = dict(features=F, hidden_size=H)
SOURCE = np.array([[3, 7, 0, 12, 5], [9, 1, 4, 4, 11]], np.int32)
TARGET = np.array([[2, 8, 1], [5, 0, 10]], np.int32)


def aligned(score, features=H, **options):
    return nn.Alignment(score.init(jax.random.key(3), H, features, **options))


def bahdanau(features=2 * H, **options):
    options = SIZES | {"rngs": nnx.Rngs(0)} | options
    return nn.RecurrentEncoderDecoder.bahdanau(V, W, **options)


def luong(**options):
    options = SIZES | {"rngs": nnx.Rngs(0)} | options
    return nn.RecurrentEncoderDecoder.luong(V, W, **options)


def predictive(score, **options):
    return nn.PredictiveAlignment(
        score, features=H, half_width=2, rngs=nnx.Rngs(1), **options
    )


def plain_readout():
    model = bahdanau()
    model.decoder.readout = nn.Readout(3 * H + F, W, rngs=nnx.Rngs(1))
    return model


MODELS = {
    "plain": lambda: nn.RecurrentEncoderDecoder.plain(V, W, rngs=nnx.Rngs(0), **SIZES),
    "plain lstm": lambda: nn.RecurrentEncoderDecoder.plain(
        V, W, cell=nn.LSTM, bidirectional=True, num_layers=2, rngs=nnx.Rngs(0), **SIZES
    ),
    "bahdanau": lambda: bahdanau(attention_size=3),
    "bahdanau lstm": lambda: bahdanau(cell=nn.LSTM, bidirectional=False),
    "bahdanau bilinear": lambda: bahdanau(attention=aligned(scores.bilinear, 2 * H)),
    "bahdanau mlp": lambda: bahdanau(
        attention=aligned(scores.mlp, 2 * H, hidden_sizes=(5, 3))
    ),
    "bahdanau readout": plain_readout,
    "luong": luong,
    "luong dot": lambda: luong(attention=nn.Alignment(scores.dot()), cell=nn.GRU),
    "luong concat": lambda: luong(attention=aligned(scores.concat, hidden_size=5)),
    "luong feed": lambda: luong(input_feeding=True),
    "luong feed size": lambda: luong(
        input_feeding=True,
        cell=nn.GRU,
        attention=nn.Alignment.projected(H, H, 3, rngs=nnx.Rngs(1)),
    ),
    "luong local-m": lambda: luong(
        attention=nn.Alignment(scores.dot(), mask=masks.sliding_window(1, 1))
    ),
    "luong local-m feed": lambda: luong(
        attention=nn.Alignment(scores.dot(), mask=masks.sliding_window(1, 1)),
        input_feeding=True,
    ),
    "luong local-p": lambda: luong(attention=predictive(scores.dot())),
    "luong local-p feed": lambda: luong(
        attention=predictive(scores.scaled_dot()), input_feeding=True
    ),
}
#: Models whose parts are all in other models are slow.
EACH = pytest.mark.parametrize(
    "name",
    few(
        MODELS,
        *("plain", "bahdanau lstm", "bahdanau bilinear", "bahdanau mlp"),
        *("bahdanau readout", "luong concat", "luong feed size", "luong local-m feed"),
        *("luong local-p", "luong dot", "luong feed"),
    ),
)
SOME = ["plain", "bahdanau", "luong", "luong local-m feed", "luong local-p feed"]
#: One of each paper; the others are slow.
FEW = pytest.mark.parametrize("name", few(SOME, "bahdanau", "luong local-p feed"))


@functools.cache
def made(name):
    return drawn(MODELS[name])


@jax.jit
def translated(model, source, target):
    return model(source, target, source_lengths=LENGTHS)


def window(name):
    return 1 if "local-m" in name else None


@EACH
def test_equations_of_the_papers(name):
    """Also ``with_weights``, and independent of the padding of the source."""
    model = made(name)
    attends = hasattr(model.decoder, "attention")

    @jax.jit
    def run(model):
        if attends:
            return model.with_weights(SOURCE, TARGET, source_lengths=LENGTHS)
        return model(SOURCE, TARGET, source_lengths=LENGTHS), None

    logits, weights = run(model)
    exact = reference.in_float64(model)
    for b, n in enumerate(LENGTHS):
        wanted, rows = reference.translate(
            exact, np.asarray(SOURCE[b, :n]), np.asarray(TARGET[b]), window(name), np
        )
        np.testing.assert_allclose(logits[b], wanted, rtol=1e-5, atol=2e-5)
        if attends:
            assert weights.shape == (B, T, S)
            np.testing.assert_allclose(weights[b, :, :n], rows, atol=1e-5)
            np.testing.assert_array_equal(weights[b, :, n:], 0)
            if "local" not in name:
                np.testing.assert_allclose(weights[b].sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", few(SOME, "bahdanau"))
def test_gradients(name):
    """Gradients of every parameter, against the reference in ``jax.numpy``."""
    model = made(name)
    target = TARGET[:, :2]
    above = np.random.default_rng(2).normal(size=(B, 2, W)).astype(np.float32)

    @jax.jit
    @jax.grad
    def mine(model):
        return (model(SOURCE, target, source_lengths=LENGTHS) * above).sum()

    @jax.jit
    @jax.grad
    def plain(model):
        total = 0
        for b, n in enumerate(LENGTHS):
            found, _ = reference.translate(
                model, SOURCE[b, :n], target[b], window(name), jnp
            )
            total += (found * above[b]).sum()
        return total

    found, wanted = mine(model), plain(model)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@FEW
def test_step_by_step(name):
    model = made(name)
    whole = translated(model, SOURCE, TARGET)
    decode = jax.jit(model.decode)
    state = jax.jit(lambda model: model.start(SOURCE, source_lengths=LENGTHS))(model)
    for x in jax.tree.leaves(state):
        assert x.shape[0] == B  # so that beams can be reordered
    first, state = decode(TARGET[:, :2], state)
    parts = [first]
    for t in range(2, T):
        logits, state = decode(TARGET[:, t : t + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


@FEW
def test_beams_keep_their_states(name):
    """Scores equal the log-probabilities of the whole sequences."""
    model = made(name)
    length, end = 3, 1
    prompt = np.zeros((B, 1), np.int32)

    @jax.jit
    def search(model):
        state = model.start(SOURCE, source_lengths=LENGTHS)
        options = dict(length=length, end=end)
        beams = nn.beam_search(model.decode, state, prompt, beams=3, **options)
        return beams, nn.greedy(model.decode, state, prompt, **options)

    beams, one = jax.tree.map(np.asarray, search(model))
    for tokens, lengths, totals in (
        (one.tokens, one.lengths, one.scores),
        *(
            (beams.tokens[:, k], beams.lengths[:, k], beams.scores[:, k])
            for k in (0, 2)
        ),
    ):
        given = np.concatenate([prompt, tokens[:, :-1]], 1)
        log_p = log_softmax(translated(model, SOURCE, given))
        gains = np.take_along_axis(log_p, tokens[..., None], 2)[..., 0]
        counted = np.arange(length)[None] < lengths[:, None]
        np.testing.assert_allclose(gains.sum(1, where=counted), totals, atol=1e-4)


@FEW
def test_padding_does_not_exist(name):
    """NaN in the embedding of padding and in padded states has no effect."""
    model = made(name)
    padding = V - 1
    source = np.where(padding == SOURCE, 0, SOURCE)
    real = np.arange(S) < LENGTHS[:, None]

    @jax.jit
    def run(model, source):
        def loss(model):
            logits = model(source, TARGET, source_lengths=LENGTHS)
            return (logits**2).sum(), logits

        return jax.value_and_grad(loss, has_aux=True)(model)

    (_, clean), wanted = run(model, source)
    poisoned = nnx.clone(model)
    table = poisoned.encoder.embedding.table.embedding
    table[...] = with_nan(table[...], padding)
    (_, logits), found = run(poisoned, np.where(real, source, padding))
    np.testing.assert_array_equal(logits, clean)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)

    @jax.jit
    def of_states(model):
        encoded = model.encoder(source, lengths=LENGTHS)
        states = jnp.where(real[..., None], encoded.states, jnp.nan)

        def loss(decoder, states):
            return (decoder(TARGET, encoded._replace(states=states)) ** 2).sum()

        return jax.grad(loss, (0, 1))(model.decoder, states)

    gradients = jax.tree.map(np.asarray, of_states(model))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[1][~real], 0)


@pytest.mark.slow
def test_many_heads_in_place_of_an_alignment():
    attention = nn.MultiHeadAttention(H, 2, key_features=H, rngs=nnx.Rngs(1))
    model = luong(attention=attention, input_feeding=True)
    run = jax.jit(lambda m: m.with_weights(SOURCE, TARGET, source_lengths=LENGTHS))
    logits, weights = run(model)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    alone = jax.jit(model)(SOURCE[:1, :2], TARGET[:1])
    np.testing.assert_allclose(logits[:1], alone, atol=1e-5)
    gradient = jax.jit(
        jax.grad(lambda m: (m(SOURCE, TARGET, source_lengths=LENGTHS) ** 2).sum())
    )(model)
    kernel = gradient.decoder.attention.key.kernel[...]
    assert float(jnp.abs(kernel).max()) > 0


def test_keys_are_projected_once_a_sentence():
    """The loop over steps does not project keys."""
    model = made("bahdanau")

    def products(jaxpr, inside):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            if name == "dot_general" and inside:
                yield equation.invars[0].aval.shape
            for sub in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(sub, inside or name == "scan")

    jaxpr = jax.make_jaxpr(lambda m, s: m.decoder.decode(TARGET, s))(
        model, model.start(SOURCE)
    )
    shapes = list(products(jaxpr.jaxpr, False))
    assert sorted(np.prod(s) for s in shapes) == [B * H, B * H, B * 2 * H]


def test_errors():
    decoder = made("luong feed").decoder
    parts = dict(combine=decoder.combine, head=decoder.head, first=decoder.first)
    wrong = nnx.Linear(H, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="feed: expected out_features=40, got 10"):
        nn.LuongDecoder(
            decoder.embedding, decoder.cell, decoder.attention, feed=wrong, **parts
        )
    with pytest.raises(ValueError, match="first: expected out_features=20, got 10"):
        nn.LuongDecoder(
            decoder.embedding,
            decoder.cell,
            decoder.attention,
            **parts | {"first": wrong},
        )
    small = nn.GRU(F + 1, H, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="cell: expected in_features=7, got 8"):
        nn.LuongDecoder(decoder.embedding, small, decoder.attention, **parts)
    for name in ("plain", "bahdanau"):
        d = made(name).decoder
        with pytest.raises(ValueError, match="context: expected out_features=30"):
            d.__class__(
                d.embedding,
                d.cell,
                *([d.attention] if name == "bahdanau" else []),
                d.readout,
                context=wrong,
                first=d.first,
            )
    with pytest.raises(TypeError, match="decoder: PlainDecoder does not attend"):
        made("plain").with_weights(SOURCE, TARGET)
