"""Greedy decoding, sampling and beam search, against searches by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import nn

V, END = 4, 3
LENGTH = 4
table = jax.random.normal(jax.random.key(0), (V, V, V)) * 1.5


def step(tokens, state):
    """A second-order Markov chain: the state is the token before."""
    logits = []
    for t in range(tokens.shape[1]):
        logits.append(table[state, tokens[:, t]])
        state = tokens[:, t]
    return jnp.stack(logits, 1), state


def all_hypotheses(first, penalty):
    """Every token sequence that ends, or has the full length, with its score."""
    log_p = np.asarray(jax.nn.log_softmax(table))
    found = {}
    for drawn in itertools.product(range(V), repeat=LENGTH):
        tokens = drawn[: drawn.index(END) + 1] if END in drawn else drawn
        before, last, total = 0, first, 0.0
        for token in tokens:
            total += log_p[before, last, token]
            before, last = last, token
        found[tokens] = total / ((5 + len(tokens)) / 6) ** penalty
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_wide_beam_finds_what_brute_force_finds(penalty):
    prompt, state = jnp.array([[0], [1], [2]]), jnp.zeros(3, jnp.int32)
    search = jax.jit(
        lambda state, prompt: nn.beam_search(
            step,
            state,
            prompt,
            beams=V**LENGTH,
            length=LENGTH,
            end=END,
            length_penalty=penalty,
        )
    )
    found = search(state, prompt)
    for b in range(3):
        expected = all_hypotheses(b, penalty)
        for place, (tokens, score) in enumerate(expected[:20]):
            assert found.scores[b, place] == pytest.approx(score, abs=1e-4)
            assert found.lengths[b, place] == len(tokens)
        best = tuple(found.tokens[b, 0, : found.lengths[b, 0]].tolist())
        assert best == expected[0][0]
        assert np.isinf(found.scores[b, len(expected) :]).all()


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
    assert len(calls) == 2  # the prompt, and the step of the end itself


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


def test_top_p_keeps_at_least_one():
    kept = nn.restrict(jnp.log(jnp.array([0.9, 0.1])), top_p=0.01)
    np.testing.assert_array_equal(jnp.isinf(kept), [False, True])
    everything = nn.restrict(jnp.log(jnp.array([0.9, 0.1])), top_p=1.0)
    assert np.isfinite(everything).all()


def test_beams_of_a_transformer_keep_their_caches():
    """The score of each hypothesis is what the model says of its whole sequence."""
    model = nn.EncoderDecoder.standard(
        V, features=8, num_heads=2, num_layers=2, rngs=nnx.Rngs(3)
    )
    source = jnp.array([[0, 1, 2], [2, 2, 1]])
    memory = model.encoder(source)
    state = model.decoder.start(2, LENGTH + 1, memory)
    prompt = jnp.zeros((2, 1), int)
    found = jax.jit(
        lambda state: nn.beam_search(
            model.decoder.decode, state, prompt, beams=5, length=LENGTH, end=END
        )
    )(state)
    assert np.isfinite(found.scores).all()
    for b in range(2):
        for hypothesis, n, score in zip(
            found.tokens[b], found.lengths[b].tolist(), found.scores[b], strict=True
        ):
            given = jnp.concatenate([prompt[b], hypothesis[: n - 1]])
            log_p = jax.nn.log_softmax(model(source[b][None], given[None])[0])
            total = log_p[jnp.arange(n), hypothesis[:n]].sum()
            assert score == pytest.approx(float(total), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=0.0), "temperature: expected a positive .* greedy"),
        (dict(top_k=0), "top_k: expected at least 1, got 0"),
        (dict(top_p=1.5), r"top_p: expected a number in \(0, 1\], got 1.5"),
        (dict(length=0), "length: expected at least 1, got 0"),
    ],
)
def test_errors(options, message):
    options = {"length": 3, "end": END, **options}
    prompt, state = jnp.zeros((1, 1), int), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        nn.sample(step, state, prompt, jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beams=0), "beams: expected at least 1, got 0"),
        (dict(beams=2, length_penalty=-1.0), "length_penalty: expected at least 0"),
    ],
)
def test_errors_of_beam_search(options, message):
    prompt, state = jnp.zeros((1, 1), int), jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match=message):
        nn.beam_search(step, state, prompt, length=3, end=END, **options)


SEARCHES = {
    "greedy": nn.greedy,
    "sample": lambda *args, **options: nn.sample(*args, jax.random.key(0), **options),
    "beams": lambda *args, **options: nn.beam_search(*args, beams=2, **options),
}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", SEARCHES)
def test_full_caches_hold_all_tokens_but_the_last(name, scan):
    model = nn.Decoder.standard(
        30, features=8, num_heads=2, num_layers=2, scan=scan, rngs=nnx.Rngs(0)
    )
    prompt = jax.random.randint(jax.random.key(0), (2, 4), 0, 30)

    def search(slots, length):
        state = model.start(2, slots)
        return SEARCHES[name](model.decode, state, prompt, length=length, end=99)

    enough, plenty = search(7, 4), search(20, 4)
    np.testing.assert_array_equal(enough.tokens, plenty.tokens)
    np.testing.assert_allclose(enough.scores, plenty.scores, rtol=1e-5)
    assert np.isfinite(enough.scores).all()
    for call in (search, jax.jit(search, static_argnums=(0, 1))):
        with pytest.raises(ValueError, match=r"of 7 slots .* need 8; .*length=8\)"):
            call(7, 5)


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
    rings = iter([nn.ring_cache(2, 2, 2, 4), nn.streaming_cache(2, 1, 2, 2, 4)])
    state = model.start(2, 1, make_cache=lambda block: next(rings))
    found = nn.greedy(model.decode, state, prompt, length=6, end=99)
    assert np.isfinite(found.scores).all()
    mixed = iter([nn.ring_cache(2, 2, 2, 4), nn.full_cache(2, 7, 2, 4)])
    state = model.start(2, 1, make_cache=lambda block: next(mixed))
    with pytest.raises(ValueError, match="full cache of 7 slots"):
        nn.greedy(model.decode, state, prompt, length=6, end=99)


def test_prompt_without_a_token():
    with pytest.raises(ValueError, match=r"prompt: expected \[B, T\]"):
        nn.greedy(step, jnp.zeros(1, int), jnp.zeros((1, 0), int), length=3, end=END)
