"""Word alignments by attention, and by IBM model 1."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab._src.nn.parameters import as_arrays
from benchmarks.studies.align.study import LINKS, Words, by_words, chosen, hit_rate
from benchmarks.studies.align.word_alignment import Ibm1, Word, words_of
from benchmarks.studies.machinery.data.batches import Batch
from benchmarks.studies.machinery.data.pairs import Pair
from benchmarks.studies.machinery.models.translators import Sizes
from benchmarks.studies.scores.study import model_maker, shape_of
from tests.grid import few


def pair(source, target):
    return Pair(source, target, "")


PAIRS = [
    pair("il dort", "he sleeps"),
    pair("elle dort", "she sleeps"),
    pair("il mange", "he eats"),
    pair("elle chante bien", "she sings well"),
]


def test_words_have_neither_case_nor_punctuation():
    assert words_of("Qu'il DORT.") == [Word("qu", 0), Word("il", 0), Word("dort", 1)]


def test_model_1_finds_who_goes_with_whom():
    model = Ibm1(PAIRS, iterations=20)
    assert model.probability("he", "il") > 0.9
    assert model.probability("sleeps", "dort") > 0.9
    assert model.probability("well", "il") == model.probability("he", "personne") == 0
    for target, place in (("he", 1), ("sleeps", 0)):
        assert model.place_of(target, "dort, il") == place


def test_probabilities_given_a_source_word_sum_to_one():
    model = Ibm1(PAIRS)
    target = {w.text for p in PAIRS for w in words_of(p.target)}
    for source in ("il", "dort", "bien"):
        total = sum(model.probability(t, source) for t in target)
        assert total == pytest.approx(1)


def test_the_first_step_is_that_of_the_paper():
    # Computed by hand from equal probabilities. In the first pair each target word is
    # divided among x, y and NULL, in the second one between x and NULL.
    model = Ibm1([pair("x y", "a b"), pair("x", "a")], iterations=1)
    assert model.probability("a", "x") == pytest.approx((1 / 3 + 1 / 2) / (7 / 6))
    assert model.probability("b", "x") == pytest.approx((1 / 3) / (7 / 6))


class Pieces:
    """A vocabulary with two tokens for each word."""

    def encode(self, text):
        return [10 + i for i in range(2 * len(text.split()))]

    def words(self, tokens):
        return [(t - 10) // 2 for t in tokens]


class Spaces(Pieces):
    """A vocabulary that splits words only at " "."""

    def encode(self, text):
        return [10 + i for i in range(2 * len(text.split(" ")))]


def test_weights_of_tokens_become_those_of_words():
    weights = np.zeros((8, 9))  # four target tokens and padding; END after 4 of 6
    weights[:4, :5] = [
        [0.5, 0.1, 0.2, 0.1, 0.1],
        [0.1, 0.3, 0.2, 0.2, 0.2],
        [0.0, 0.0, 0.5, 0.5, 0.0],
        [0.0, 0.2, 0.0, 0.6, 0.2],
    ]
    found = by_words(pair("un deux", "one two"), weights, Pieces())
    np.testing.assert_allclose(
        found.weights, [[0.5, 0.35, 0.15], [0.1, 0.8, 0.1]], atol=1e-12
    )


def test_words_that_tokens_divide_otherwise_are_left_out():
    weights = np.zeros((8, 9))
    assert by_words(pair("un\x1cdeux", "one two"), weights, Spaces()) is None


def test_hits_are_counted_where_both_words_are():
    ibm1 = Ibm1(PAIRS, iterations=20)
    seen = [
        Words(PAIRS[0], np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])),  # a hit
        Words(PAIRS[2], np.array([[0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])),  # END: none
        Words(PAIRS[1], np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])),  # no he
    ]
    rate = hit_rate(seen, "he", LINKS["he"], ibm1)
    assert rate == (0.5, 0.5, 1.0, 2)
    assert hit_rate(seen, "we", LINKS["we"], ibm1) is None


def test_sentences_shown_are_short_and_others_differ_from_them():
    words = " un deux trois quatre cinq"
    pairs = [pair(f"{w}{words}", f"he{words}") for w in ("il", "on", "elle", "il")]
    pairs += [pair("il" + 3 * words, "he" + 3 * words), pair("il dort", "he sleeps")]
    with_he, others = chosen(pairs, 2)
    assert with_he == [pairs[0], pairs[3]]
    assert sorted(others) == sorted(pairs[1:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    few(itertools.product(["dot", "additive"], [1, 60, 2000]), ("additive", 60)),
)
def test_sharpness(name, size):
    """Also where softmax rounds weights to zero."""
    sizes = Sizes(features=8, hidden_size=8, dropout_rate=0.0)
    model = model_maker(name, 16)(30, sizes, nnx.Rngs(0))
    own = model.decoder.attention
    own.score = jax.tree.map(lambda x: size * x, own.score)
    if own.query is not None:
        own.query.kernel[...] *= 5 * size
    source, target = jax.random.randint(jax.random.key(1), (2, 2, 6), 3, 30)
    lengths, steps = jnp.array([6, 3]), jnp.array([6, 4])
    batch = Batch(source, lengths, target, steps)
    found = np.asarray(jax.jit(shape_of)(model, batch))

    logits = jax.jit(dense)(model, source, target[:, :-1], lengths)
    logits = np.asarray(logits, np.float64)
    zeros = 0
    for b, row in enumerate(found):
        seen = logits[b, : steps[b] - 1, : lengths[b]]
        weights = np.exp(seen - seen.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        zeros += (weights < 1e-45).sum()
        entropy = -(weights * np.log(np.maximum(weights, 1e-300))).sum(-1)
        expected = [seen.std(-1).sum(), entropy.sum() / np.log(lengths[b]), len(seen)]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
    assert (zeros > 0) == (size > 1)


def dense(model, source, target, lengths):
    """Logits ``[B, T, S]``."""
    encoded = model.encoder(source, lengths=lengths)
    decoder = model.decoder
    own = decoder.attention
    query = decoder._read(target, decoder.start(encoded))[1]
    score, key = as_arrays(own.score), encoded.states
    query, key = (
        x if project is None else project(x)
        for x, project in ((query, own.query), (key, own.key))
    )
    query = score.project_query(query[:, :, None])[:, :, 0]
    key = score.project_key(key[:, :, None])[:, :, 0]
    if score.is_inner_product:
        return query @ key.swapaxes(1, 2)
    params = jax.tree.map(lambda x: x[0], score.pair_params())
    return jax.vmap(lambda q, k: score.compare(params, q, k))(query, key)
