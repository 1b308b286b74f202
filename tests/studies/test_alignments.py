"""What attention looks at, word by word, and what counting words says."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies.align import LINKS, Words, by_words, chosen, hit_rate
from benchmarks.studies.batches import Batch
from benchmarks.studies.pairs import Pair
from benchmarks.studies.scores import shape_of
from benchmarks.studies.word_alignment import Ibm1, Word, words_of


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
    # By hand, from equal probabilities. Of the first pair each target word is shared by
    # x, y and NULL, of the second one by x and NULL.
    model = Ibm1([pair("x y", "a b"), pair("x", "a")], iterations=1)
    assert model.probability("a", "x") == pytest.approx((1 / 3 + 1 / 2) / (7 / 6))
    assert model.probability("b", "x") == pytest.approx((1 / 3) / (7 / 6))


class Pieces:
    """Two tokens to a word."""

    def encode(self, text):
        return [10 + i for i in range(2 * len(text.split()))]

    def words(self, tokens):
        return [(t - 10) // 2 for t in tokens]


class Spaces(Pieces):
    """Knows one kind of space."""

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


def test_sharpness_of_known_weights():
    class Model:
        def with_weights(self, source, target, *, source_lengths):
            even = jnp.array([[0.25, 0.25, 0.25, 0.25, 0.0]] * 2)
            sharp = jnp.array([[1 - 1e-4, 1e-4, 0.0, 0.0, 0.0]] * 2)
            return None, jnp.stack([even, sharp])

    batch = Batch(
        jnp.zeros((2, 5), int),
        jnp.array([4, 2]),
        jnp.zeros((2, 3), int),
        jnp.array([3, 2]),
    )
    found = np.asarray(shape_of(Model(), batch))
    # The first sentence has two target tokens, the second one.
    np.testing.assert_allclose(found[0], [0, 2, 2], atol=1e-5)
    entropy = -((1 - 1e-4) * np.log(1 - 1e-4) + 1e-4 * np.log(1e-4)) / np.log(2)
    spread = (np.log(1 - 1e-4) - np.log(1e-4)) / 2
    np.testing.assert_allclose(found[1], [spread, entropy, 1], rtol=1e-3)
