"""The recurrent language model: causality, caches, packed documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import nn, scores
from tests.grid import few
from tests.nn.recurrent import reference
from tests.nn.recurrent.test_layers import drawn, log_softmax, with_nan

B, T, F, H, V = 2, 7, 5, 11, 13
SIZES = dict(features=F, hidden_size=H)
TOKENS = np.array([[3, 7, 0, 12, 5, 2, 9], [9, 1, 4, 4, 11, 8, 6]], np.int32)

MODELS = {
    "plain": lambda: nn.RecurrentLanguageModel.plain(V, rngs=nnx.Rngs(0), **SIZES),
    "scaled_dot": lambda: nn.RecurrentLanguageModel.standard(
        V, num_layers=2, cell=nn.GRU, rngs=nnx.Rngs(0), **SIZES
    ),
    "additive": lambda: nn.RecurrentLanguageModel.standard(
        V,
        attention=nn.Alignment(
            scores.additive.init(jax.random.key(1), H, hidden_size=3)
        ),
        rngs=nnx.Rngs(0),
        **SIZES,
    ),
    "projected": lambda: nn.RecurrentLanguageModel.standard(
        V,
        attention=nn.Alignment.projected(H, H, 3, rngs=nnx.Rngs(1)),
        rngs=nnx.Rngs(0),
        **SIZES,
    ),
}
EACH = pytest.mark.parametrize("name", MODELS)


@functools.cache
def made(name):
    return drawn(MODELS[name])


@EACH
def test_equations(name):
    model = made(name)
    logits = jax.jit(model)(TOKENS)
    exact = reference.in_float64(model)
    for b in range(B):
        wanted, _ = reference.language_model(exact, np.asarray(TOKENS[b]), np)
        np.testing.assert_allclose(logits[b], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", few(MODELS, "scaled_dot"))
def test_gradients(name):
    model = made(name)
    tokens = TOKENS[:, :4]
    above = np.random.default_rng(2).normal(size=(B, 4, V)).astype(np.float32)

    def plain(model):
        found = [reference.language_model(model, row, jnp)[0] for row in tokens]
        return (jnp.stack(found) * above).sum()

    found = jax.jit(jax.grad(lambda model: (model(tokens) * above).sum()))(model)
    for a, b in zip(
        jax.tree.leaves(found),
        jax.tree.leaves(jax.jit(jax.grad(plain))(model)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@EACH
def test_nothing_comes_from_the_future(name):
    """The gradient of logits with respect to later embeddings is exactly 0."""
    model = made(name)

    class Given(nnx.Module):
        """An embedding that returns ``x`` whatever the tokens."""

        def __init__(self, x):
            self.x = nnx.data(x)

        def __call__(self, tokens):
            return self.x

    def logits(x, t):
        other = nn.RecurrentLanguageModel(
            Given(x), list(model.layers), model.head,
            attention=model.attention, combine=model.combine,
        )  # fmt: skip
        return (other(TOKENS)[:, t] ** 2).sum()

    x = model.embedding(TOKENS)
    gradients = jax.jit(jax.vmap(jax.grad(logits), (None, 0)))(x, np.arange(T))
    for t, gradient in enumerate(np.asarray(gradients)):
        assert (gradient[:, t + 1 :] == 0).all()
        assert (np.abs(gradient[:, : t + 1]).max(-1) > 0).all()


def test_the_first_token_sees_nothing():
    model = made("scaled_dot")
    x = jnp.tile(jnp.eye(H)[0], (1, T, 1))
    memory = model.attention.project(x)
    seen = {}

    class Spy(nnx.Module):
        def project(self, key):
            return memory

        def attend(self, query, memory, **options):
            seen["context"] = model.attention.attend(x, memory, **options)
            return seen["context"]

    other = nn.RecurrentLanguageModel(
        model.embedding, list(model.layers), model.head,
        attention=Spy(), combine=model.combine,
    )  # fmt: skip
    other(TOKENS[:1])
    # All states are equal, so the mean of visible states is that state.
    np.testing.assert_array_equal(seen["context"][0, 0], 0)
    np.testing.assert_allclose(seen["context"][0, 1:], x[0, 1:], rtol=1e-6)


def rotary():
    attention = nn.MultiHeadAttention(
        H, 1, head_size=4, position=nn.Rotary(), rngs=nnx.Rngs(1)
    )
    return nn.RecurrentLanguageModel.standard(
        V, attention=attention, rngs=nnx.Rngs(0), **SIZES
    )


@pytest.mark.parametrize("name", [*MODELS, "rotary"])
def test_step_by_step(name):
    model = drawn(rotary) if name == "rotary" else made(name)
    whole = jax.jit(model)(TOKENS)
    decode = jax.jit(model.decode)
    state = model.start(B, T)
    first, state = decode(TOKENS[:, :3], state)
    parts = [first]
    for t in range(3, T):
        logits, state = decode(TOKENS[:, t : t + 1], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    logits, _ = decode(TOKENS[:, :1], state)
    assert bool(np.isnan(logits).all()) == (name != "plain")  # its cache is full


def test_beams_keep_their_caches():
    model = made("additive")
    prompt, length = TOKENS[:, :2], 4
    found = jax.jit(
        lambda state: nn.beam_search(
            model.decode, state, prompt, beams=3, length=length, end=1
        )
    )(model.start(B, 2 + length))
    found = jax.tree.map(np.asarray, found)
    again = jax.jit(model)
    for k in range(3):
        tokens = found.tokens[:, k]
        given = np.concatenate([prompt, tokens[:, :-1]], 1)
        log_p = log_softmax(again(given))[:, 1:]
        gains = np.take_along_axis(log_p, tokens[..., None], 2)[..., 0]
        counted = np.arange(length)[None] < found.lengths[:, k, None]
        np.testing.assert_allclose(
            gains.sum(1, where=counted), found.scores[:, k], 1e-4
        )


@pytest.mark.parametrize("name", few(MODELS, "plain", "scaled_dot"))
def test_packed_documents_and_padding(name):
    model = made(name)
    ids = np.array([[3, 3, 3, 0, 0, 0, 0], [5, 5, -1, -1, -1, -1, -1]])
    call = jax.jit(model)
    packed = np.asarray(call(TOKENS, documents=ids))
    for b, slots in ((0, slice(0, 3)), (0, slice(3, 7)), (1, slice(0, 2))):
        alone = call(TOKENS[b : b + 1, slots])
        np.testing.assert_allclose(packed[b, slots], alone[0], atol=1e-5)

    padding = int(TOKENS[0, 0]) + 1
    lengths = np.array([4, 2])
    real = np.arange(T) < lengths[:, None]
    tokens = np.where(real, np.where(padding == TOKENS, 0, TOKENS), padding)

    @jax.jit
    def run(model):
        def loss(model):
            logits = model(tokens, lengths=lengths)
            return (jnp.where(real[..., None], logits, 0) ** 2).sum()

        return jax.value_and_grad(loss)(model)

    poisoned = nnx.clone(model)
    table = poisoned.embedding.table.embedding
    table[...] = with_nan(table[...], padding)
    found, wanted = run(poisoned), run(model)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_errors():
    model = made("scaled_dot")
    parts = model.embedding, list(model.layers), model.head
    with pytest.raises(ValueError, match="combine: give both attention and combine"):
        nn.RecurrentLanguageModel(*parts, attention=model.attention)
    with pytest.raises(ValueError, match="layers: expected at least one"):
        nn.RecurrentLanguageModel(parts[0], [], parts[2])
    layer = nn.Recurrent(model.layers[0].cell, reverse=True)
    with pytest.raises(ValueError, match="layers: a language model reads forward"):
        nn.RecurrentLanguageModel(parts[0], [layer], parts[2])
    with pytest.raises(ValueError, match="cache: position 6 does not fit"):
        model.decode(TOKENS, model.start(B, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("loose")
def test_states_and_caches_have_the_type_that_layers_compute_in():
    cell = functools.partial(nn.LSTM, dtype=jnp.bfloat16)
    model = nn.RecurrentLanguageModel.standard(V, cell=cell, rngs=nnx.Rngs(0), **SIZES)
    state = model.start(B, T)
    floating = [x.dtype for x in jax.tree.leaves(state) if x.dtype != jnp.int32]
    assert set(floating) == {jnp.dtype(jnp.bfloat16)}
    logits, _ = jax.jit(model.decode)(TOKENS, state)
    np.testing.assert_allclose(logits, jax.jit(model)(TOKENS), atol=1e-2)
    other = model.start(B, T, dtype=jnp.float32)
    with pytest.raises(TypeError, match="cache: expected dtype bfloat16, .* float32"):
        model.decode(TOKENS, other)
    attention = nn.MultiHeadAttention(H, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    model = nn.RecurrentLanguageModel.standard(
        V, attention=attention, rngs=nnx.Rngs(0), **SIZES
    )
    logits, _ = jax.jit(model.decode)(TOKENS, model.start(B, T))
    np.testing.assert_allclose(logits, jax.jit(model)(TOKENS), atol=1e-2)


def test_tokens_of_another_batch_than_the_state():
    model = made("scaled_dot")
    with pytest.raises(ValueError, match=r"tokens: expected \[3, T\], .* got shape"):
        model.decode(TOKENS, model.start(3, T))


def test_a_state_without_the_cache_that_attention_needs_is_refused():
    model = nn.RecurrentLanguageModel.standard(
        11, features=3, hidden_size=5, rngs=nnx.Rngs(0)
    )
    state = model.start(2, 7)._replace(cache=None)
    with pytest.raises(ValueError, match="state: it has no cache"):
        model.decode(jnp.zeros((2, 1), int), state)
