"""Greedy decoding, sampling and beam search, against searches by hand."""

import functools
import gc
import itertools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import nn
from tests.grid import few

V, END = 4, 3
LENGTH = 4
table = jax.random.normal(jax.random.key(0), (V, V, V)) * 1.5


def step(tokens, state):
    """The step of a second-order Markov chain; the state is the previous token."""
    logits = []
    for t in range(tokens.shape[1]):
        logits.append(table[state, tokens[:, t]])
        state = tokens[:, t]
    return jnp.stack(logits, 1), state


class Chain(nnx.Module):
    """A module with the same step, which counts how often it is traced."""

    def __init__(self):
        self.table = nnx.Param(table)
        self.traced = nnx.static(Traced())

    def decode(self, tokens, state):
        self.traced.times += 1
        logits = [self.table[...][state, tokens[:, 0]]]
        for t in range(1, tokens.shape[1]):
            logits.append(self.table[...][tokens[:, t - 1], tokens[:, t]])
        return jnp.stack(logits, 1), tokens[:, -1]


class Traced:
    times = 0


def all_hypotheses(first, penalty, ends):
    """Every token sequence that ends, or has the full length, with its score."""
    log_p = np.asarray(jax.nn.log_softmax(table))
    found = {}
    for drawn in itertools.product(range(V), repeat=LENGTH):
        ended = [place for place, token in enumerate(drawn) if token in ends]
        tokens = drawn[: ended[0] + 1] if ended else drawn
        before, last, total = 0, first, 0.0
        for token in tokens:
            total += log_p[before, last, token]
            before, last = last, token
        found[tokens] = total / ((5 + len(tokens)) / 6) ** penalty
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("ends", [[END], [END, 1]])
def test_wide_beam_finds_what_brute_force_finds(ends):
    prompt, state = jnp.array([[0], [1], [2]]), jnp.zeros(3, jnp.int32)
    search = jax.jit(
        lambda penalty: nn.beam_search(
            step,
            state,
            prompt,
            beams=V**LENGTH,
            length=LENGTH,
            end=ends,
            length_penalty=penalty,
        )
    )
    for penalty in (0.0, 0.6, 2.0):
        found = jax.tree.map(np.asarray, search(penalty))
        for b in range(3):
            expected = all_hypotheses(b, penalty, ends)
            for place, (tokens, score) in enumerate(expected[:20]):
                assert found.scores[b, place] == pytest.approx(score, abs=1e-4)
                assert found.lengths[b, place] == len(tokens)
            best = tuple(found.tokens[b, 0, : found.lengths[b, 0]].tolist())
            assert best == expected[0][0]
            assert np.isinf(found.scores[b, len(expected) :]).all()


def test_narrow_beam_runs_on_where_many_tokens_end():
    """All probable tokens but one end a hypothesis; the beam must keep that one."""
    logits = jnp.array([0.0, 3, 3, 3, 3, 2.9])

    def fixed(tokens, state):
        return jnp.broadcast_to(logits, (*tokens.shape, 6)), state

    prompt, ends = jnp.zeros((1, 1), jnp.int32), np.array([1, 2, 3, 4])
    found = nn.beam_search(
        fixed, (), prompt, beams=1, length=2, end=ends, length_penalty=9.0
    )
    assert found.tokens[0, 0, 0] == 5


def test_one_beam_is_greedy():
    prompt, state = jnp.array([[0], [1], [2]]), jnp.zeros(3, jnp.int32)
    options = dict(length=8, end=END)
    beam = nn.beam_search(step, state, prompt, beams=1, **options)
    one = nn.greedy(step, state, prompt, **options)
    for b in range(3):
        n = int(one.lengths[b])
        np.testing.assert_array_equal(beam.tokens[b, 0, :n], one.tokens[b, :n])
    np.testing.assert_allclose(beam.scores[:, 0], one.scores, rtol=1e-5)


def test_stops_when_all_have_ended():
    calls = []

    def counted(tokens, state):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.full((2, tokens.shape[1], V), -9.0).at[..., END].set(0), state

    nn.greedy(counted, (), jnp.zeros((2, 1), int), length=50, end=END)
    jax.effects_barrier()
    assert len(calls) == 2  # the prompt, and one step with END


def test_padding_follows_the_end():
    found = nn.greedy(
        lambda tokens, state: (jax.nn.one_hot(tokens + 1, V), state),
        (),
        jnp.array([[0], [1]]),
        length=5,
        end=END,
        padding=9,
    )
    np.testing.assert_array_equal(found.tokens, [[1, 2, 3, 9, 9], [2, 3, 9, 9, 9]])
    np.testing.assert_array_equal(found.lengths, [3, 2])


def test_sampling_follows_the_probabilities():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))

    def fixed(tokens, state):
        return jnp.broadcast_to(logits, (*tokens.shape, V)), state

    def frequencies(**options):
        draw = jax.jit(
            lambda rng: nn.sample(
                fixed, (), jnp.zeros((4000, 1), int), rng, length=1, end=9, **options
            )
        )
        tokens = draw(jax.random.key(0)).tokens[:, 0]
        return np.bincount(tokens, minlength=V) / 4000

    np.testing.assert_allclose(frequencies(), [0.1, 0.2, 0.3, 0.4], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.65), [0, 0, 3 / 7, 4 / 7], atol=0.03)
    sharp = np.array([1, 4, 9, 16]) / 30
    np.testing.assert_allclose(frequencies(temperature=0.5), sharp, atol=0.03)


def kept(logits, **options):
    return np.isfinite(np.asarray(nn.restrict(logits, **options), np.float32))


def test_top_k_keeps_exactly_k_of_tied_logits():
    """Of equal logits, those of the lowest index are kept."""
    logits = jnp.round(4 * jax.random.normal(jax.random.key(1), (4, 64)))
    logits = logits.at[0].set(jnp.where(logits[0] == 0, -0.0, 0.0))
    order = np.argsort(-np.asarray(logits), axis=-1, stable=True)
    place = np.argsort(order, axis=-1)
    each = np.array([1, 20, 50, 99])
    for dtype in (jnp.float32, jnp.bfloat16):
        typed = logits.astype(dtype)
        np.testing.assert_array_equal(kept(typed, top_k=20), place < 20)
        np.testing.assert_array_equal(kept(typed, top_k=each), place < each[:, None])
        assert nn.restrict(typed, top_k=20).dtype == dtype
    listed: Any = [3.0, 2, 2, 2, 1]
    two: Any = np.int64(2)
    np.testing.assert_array_equal(
        nn.restrict(listed, top_k=two), [3, 2, *[-np.inf] * 3]
    )


def test_top_p_keeps_the_fewest_of_tied_logits():
    each = jnp.array([1e-9, 0.3, 0.5, 1.0])
    found = kept(jnp.zeros((4, 1000)), top_p=each)
    expected = np.arange(1000) < np.array([1, 300, 500, 1000])[:, None]
    np.testing.assert_array_equal(found, expected)
    both = kept(jnp.zeros((4, 1000)), top_k=10, top_p=each)
    expected = np.arange(1000) < np.array([1, 3, 5, 10])[:, None]
    np.testing.assert_array_equal(both, expected)


def test_top_p_of_one_keeps_what_rounding_would_lose():
    assert kept(jnp.array([30.0, 0, -30]), top_p=1.0).all()


class Tied(nnx.Module):
    """A model for which tokens 1 and 2 are always equally the most probable."""

    def __call__(self, tokens, state):
        logits = jnp.array([1.0, 3.0, 3.0, 2.0], jnp.bfloat16)
        return jnp.broadcast_to(logits, (*tokens.shape, V)), state


def test_cold_samples_are_greedy():
    prompt = jnp.zeros((2, 1), jnp.int32)

    def draw(**options):
        rng = jax.random.key(0)
        found = nn.sample(Tied(), (), prompt, rng, length=40, end=9, **options)
        return np.asarray(found.tokens)

    for temperature in (0, 0.0, np.float32(0), 1e-40, jnp.float32(1e-45)):
        assert (draw(temperature=temperature) == 1).all()
    assert (draw(top_k=1) == 1).all()
    assert (draw(top_k=1, temperature=1e30) == 1).all()
    assert set(draw(temperature=1e-30).ravel()) == {1, 2}
    rows = draw(temperature=np.array([1e-40, 1e30]))
    assert set(rows[0]) == {1}
    assert set(rows[1]) == {0, 1, 2, 3}
    rows = draw(top_k=np.array([1, 2]), top_p=jnp.array([1.0, 0.6]), temperature=9)
    assert set(rows[0]) == {1}
    assert set(rows[1]) == {1, 2}


def test_any_of_several_tokens_ends():
    prompt = jnp.array([[0], [2]])
    found = nn.greedy(
        lambda tokens, state: (jax.nn.one_hot(tokens + 1, 6), state),
        (),
        prompt,
        length=4,
        end=(2, 4),
    )
    np.testing.assert_array_equal(found.tokens, [[1, 2, 0, 0], [3, 4, 0, 0]])


def test_a_method_is_traced_once_for_a_shape():
    """Other weights, tokens or numbers do not trace the method again."""
    model, state = Chain(), jnp.zeros(2, jnp.int32)
    for number, search in enumerate((
        functools.partial(nn.greedy, model.decode),
        lambda state, prompt, **kw: nn.sample(
            model.decode, state, prompt, jax.random.key(kw["padding"]), top_k=2, **kw
        ),
        functools.partial(nn.beam_search, model.decode, beams=2),
    )):
        model.table[...] = table
        prompt = jnp.array([[0, 2], [1, 0]])
        first = search(state, prompt, length=3, end=END, padding=0)
        times = model.traced.times
        assert times == 2 * (number + 1)  # the prompt, and the loop
        search(state + 1, prompt[::-1], length=3, end=2, padding=8)
        model.table[...] = -table
        other = search(state, prompt, length=3, end=END, padding=0)
        assert model.traced.times == times
        whole = functools.partial(search, state, length=3, end=END, padding=0)
        again = jax.jit(whole)(prompt)
        np.testing.assert_array_equal(other.tokens, again.tokens)
        assert (np.asarray(first.scores) != np.asarray(other.scores)).all()


@pytest.mark.slow
def test_a_module_that_was_searched_with_is_let_go():
    model, array = Chain(), table + 1
    model.table = nnx.Param(array)
    listed: Any = [[0]]
    nn.greedy(model.decode, jnp.zeros(1, jnp.int32), listed, length=2, end=END)
    held = weakref.ref(model), weakref.ref(array)
    del model, array
    gc.collect()
    assert [x() for x in held] == [None, None]


def test_what_a_function_reads_may_change():
    weights = [table]

    def read(tokens, state):
        return weights[0][state[:, None], tokens], tokens[:, -1]

    prompt, state = jnp.array([[0], [1]]), jnp.zeros(2, jnp.int32)
    before = nn.greedy(read, state, prompt, length=2, end=9)
    weights[0] = -table
    after = nn.greedy(read, state, prompt, length=2, end=9)
    assert (np.asarray(before.tokens) != np.asarray(after.tokens)).any()


class Noisy(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, tokens, state):
        return self.dropout(jnp.ones((*tokens.shape, V))), state


def test_dropout_is_refused():
    model, prompt = Noisy(), jnp.zeros((1, 1), jnp.int32)

    def closed(tokens, state):
        return model(tokens, state)

    for step in (model, closed):
        with pytest.raises(ValueError, match=r"^step: .* dropout .*model.eval\(\)"):
            nn.greedy(step, (), prompt, length=2, end=9)
    model.eval()
    nn.greedy(model, (), prompt, length=2, end=9)


def test_positions_that_were_not_learned_are_refused():
    embedding = nn.Embedding(
        V, 8, position=nn.Learned(5, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
    )
    model = nn.Decoder.standard(
        V, features=8, num_heads=2, num_layers=1, embedding=embedding, rngs=nnx.Rngs(0)
    )
    prompt = jnp.zeros((1, 3), jnp.int32)
    with pytest.raises(ValueError, match="length: 3 .* and length=4 need 6 .* the 5"):
        nn.greedy(model.decode, model.start(1, 9), prompt, length=4, end=9)


def test_logits_that_cannot_be_restricted():
    for logits in (jnp.ones(3, jnp.float8_e4m3fn), jnp.ones(3, jnp.int32)):
        with pytest.raises(TypeError, match=r"^logits: .* 16 bits, .*float32"):
            nn.restrict(logits, top_k=1)


@pytest.mark.parametrize("options", [dict(top_k=2), dict(top_p=0.6)])
def test_what_is_left_out_is_no_error(options):
    """Left-out logits are -inf, without an error from ``jax.debug_infs``."""
    with jax.debug_infs(True):
        found = nn.restrict(jnp.array([2.0, 1.0, -5.0]), **options)
    assert np.isneginf(found[2])


def test_top_p_keeps_at_least_one():
    kept = nn.restrict(jnp.log(jnp.array([0.9, 0.1])), top_p=0.01)
    np.testing.assert_array_equal(jnp.isinf(kept), [False, True])
    everything = nn.restrict(jnp.log(jnp.array([0.9, 0.1])), top_p=1.0)
    assert np.isfinite(everything).all()


def test_beams_of_a_transformer_keep_their_caches():
    """Scores equal the log-probabilities of the whole sequences."""
    model = nn.EncoderDecoder.standard(
        V, features=8, num_heads=2, num_layers=2, rngs=nnx.Rngs(3)
    )
    source = jnp.array([[0, 1, 2], [2, 2, 1]])
    prompt = jnp.zeros((2, 1), int)

    @jax.jit
    def search(model):
        state = model.decoder.start(2, LENGTH + 1, model.encoder(source))
        return nn.beam_search(
            model.decoder.decode, state, prompt, beams=5, length=LENGTH, end=END
        )

    @jax.jit
    def log_p(model, tokens):
        given = jnp.concatenate([prompt, tokens[:, :-1]], 1)
        return jax.nn.log_softmax(model(source, given))

    found = jax.tree.map(np.asarray, search(model))
    assert np.isfinite(found.scores).all()
    for k in range(5):
        tokens, lengths = found.tokens[:, k], found.lengths[:, k]
        gains = np.take_along_axis(log_p(model, tokens), tokens[..., None], 2)[..., 0]
        # Tokens after END do not count, and tokens before do not see them.
        total = gains.sum(1, where=np.arange(LENGTH) < lengths[:, None])
        np.testing.assert_allclose(found.scores[:, k], total, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-1.0), "temperature: expected at least 0, got -1.0"),
        (dict(temperature=np.array([1, np.nan])), "temperature: expected at least 0"),
        (dict(temperature=jnp.ones(3)), r"temperature: .* row, shape \(2,\), .*\(3,\)"),
        (dict(temperature=True), "temperature: expected at least 0, got bool"),
        (dict(temperature="hot"), "temperature: expected at least 0, got str"),
        (dict(top_k=0), "top_k: expected at least 1, got 0"),
        (dict(top_k=2.5), "top_k: expected an int, got 2.5"),
        (dict(top_k=np.array([1, 0])), r"top_k: expected at least 1, got \[1 0\]"),
        (dict(top_k=jnp.ones(2)), "top_k: expected integers, got float32"),
        (dict(top_p=1.5), r"top_p: expected a number in \(0, 1\], got 1.5"),
        (dict(top_p=np.array([0.5, 0])), r"top_p: expected a number in \(0, 1\], got"),
        (dict(length=0), "length: expected at least 1, got 0"),
        (dict(length=2.0), "length: expected an int, got 2.0"),
        (dict(end=2.5), "end: expected integers, got float64"),
        (dict(end=[[1, 2]]), r"end: expected one token or \[E\], got shape \(1, 2\)"),
        (dict(padding=[0]), r"padding: expected one token, got shape \(1,\)"),
    ],
)
def test_errors(options, message):
    options = {"length": 3, "end": END, **options}
    prompt, state = jnp.zeros((2, 1), int), jnp.zeros(2, jnp.int32)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        nn.sample(step, state, prompt, jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beams=0), "beams: expected at least 1, got 0"),
        (dict(beams=1.5), "beams: expected an int, got 1.5"),
        (
            dict(length_penalty=-1.0),
            "length_penalty: expected a number, at least 0, got -1.0",
        ),
        (dict(length_penalty=np.ones(2)), r"length_penalty: .* got shape \(2,\)"),
        (dict(length_penalty="long"), "length_penalty: expected a number, got str"),
    ],
)
def test_errors_of_beam_search(options, message):
    options = {"beams": 2, **options}
    prompt, state = jnp.zeros((1, 1), int), jnp.zeros(1, jnp.int32)
    with pytest.raises((TypeError, ValueError), match=message):
        nn.beam_search(step, state, prompt, length=3, end=END, **options)


def test_state_of_beams_leads_with_the_batch():
    arrays = (jnp.zeros(2), jnp.zeros(1))
    listed: Any = [[0], [0]]
    with pytest.raises(
        ValueError, match=r"state: .* batch of 2, .*\(1,\) at state\[1\]"
    ):
        nn.beam_search(step, arrays, listed, beams=2, length=3, end=END)


SEARCHES = {
    "greedy": nn.greedy,
    "sample": lambda step, state, prompt, **options: nn.sample(
        step, state, prompt, jax.random.key(0), **options
    ),
    "beams": lambda *args, **options: nn.beam_search(*args, beams=2, **options),
}


@pytest.mark.parametrize(
    ("name", "scan"), few(itertools.product(SEARCHES, [False, True]))
)
def test_full_caches_hold_all_tokens_but_the_last(name, scan):
    model = nn.Decoder.standard(
        30, features=8, num_heads=2, num_layers=2, scan=scan, rngs=nnx.Rngs(0)
    )
    prompt = jax.random.randint(jax.random.key(0), (2, 4), 0, 30)

    def search(slots, length):
        state = model.start(2, slots)
        return SEARCHES[name](model.decode, state, prompt, length=length, end=99)

    jitted = jax.jit(search, static_argnums=(0, 1))
    enough, plenty = jitted(7, 4), jitted(20, 4)
    np.testing.assert_array_equal(enough.tokens, plenty.tokens)
    np.testing.assert_allclose(enough.scores, plenty.scores, rtol=1e-5)
    assert np.isfinite(enough.scores).all()
    for call in (search, jitted):
        with pytest.raises(ValueError, match=r"of 7 slots .* need 8; .*length=8\)"):
            call(7, 5)


@pytest.mark.slow
def test_what_a_cache_holds_already_takes_slots_too():
    model = nn.Decoder.standard(
        30, features=8, num_heads=2, num_layers=1, rngs=nnx.Rngs(0)
    )
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, 30)
    _, state = model.decode(tokens[:, :3], model.start(2, 8))
    found = nn.greedy(model.decode, state, tokens[:, 3:], length=4, end=99)
    whole = nn.greedy(model.decode, model.start(2, 8), tokens, length=4, end=99)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    search = functools.partial(nn.greedy, model.decode, state, end=99)
    for call in (search, jax.jit(search, static_argnames="length")):
        assert np.isfinite(call(tokens[:, 3:], length=4).scores).all()
        with pytest.raises(ValueError, match=r"need 6 besides 3 .*\(length=9\)"):
            call(tokens[:, 3:], length=5)


def test_only_full_caches_run_out_of_slots():
    model = nn.Decoder.standard(
        30, features=8, num_heads=2, num_layers=2, rngs=nnx.Rngs(0)
    )
    prompt = jnp.zeros((2, 3), int)
    first, second = model.stack.each()
    first.attention.cache = nn.CachePolicy(window=2)
    second.attention.cache = nn.CachePolicy(window=2, anchors=1)
    state = model.start(2, 1)
    assert [block.cache.key.shape[1] for block in state.blocks] == [2, 3]
    found = nn.greedy(model.decode, state, prompt, length=6, end=99)
    assert np.isfinite(found.scores).all()
    mixed = iter([nn.ring_cache(2, 2, 2, 4), nn.full_cache(2, 7, 2, 4)])
    state = model.start(2, 1, make_cache=lambda block: next(mixed))
    with pytest.raises(ValueError, match="full cache of 7 slots"):
        nn.greedy(model.decode, state, prompt, length=6, end=99)


def test_a_policy_of_the_users_own_makes_the_caches():
    class Longer(nn.CachePolicy):
        def make(self, batch, length, *sizes, **types):
            return super().make(batch, length + 3, *sizes, **types)

    model = nn.Decoder.standard(
        30, features=8, num_heads=2, num_layers=1, rngs=nnx.Rngs(0)
    )
    (block,) = model.stack.each()
    block.attention.cache = Longer()
    assert model.start(2, 4).blocks[0].cache.key.shape == (2, 7, 2, 4)


def test_prompt_without_a_token():
    with pytest.raises(ValueError, match=r"prompt: expected \[B, T\]"):
        nn.greedy(step, jnp.zeros(1, int), jnp.zeros((1, 0), int), length=3, end=END)
