"""BLEU and chrF with intervals, and translation in batches."""

import numpy as np
import pytest
import sacrebleu

from benchmarks.studies.bottleneck.study import share
from benchmarks.studies.machinery.data.batches import END, pad
from benchmarks.studies.machinery.models.scoring import (
    exact_matches,
    score,
    score_by_length,
)
from benchmarks.studies.machinery.models.translation import padded_length, translate

REFERENCES = [
    f"and the {w} of the land went up to the city in the {n} year of the king"
    for w, n in zip(
        ["men", "sons", "kings", "priests", "women", "rulers", "armies", "servants"],
        ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "tenth"],
        strict=True,
    )
]
TRANSLATIONS = [
    r.replace("went up", "came") if i % 2 else r for i, r in enumerate(REFERENCES)
]


def test_scores_are_those_of_sacrebleu():
    found = score(TRANSLATIONS, REFERENCES, bootstrap=200)
    bleu = sacrebleu.corpus_bleu(TRANSLATIONS, [REFERENCES])
    chrf = sacrebleu.corpus_chrf(TRANSLATIONS, [REFERENCES])
    assert found["bleu"].value == pytest.approx(bleu.score)
    assert found["chrf"].value == pytest.approx(chrf.score)
    for value in found.values():
        assert 0 < value.half_width < 25
        assert abs(value.mean - value.value) < value.half_width
        assert "bs:200" in value.signature
    assert found == score(TRANSLATIONS, REFERENCES, bootstrap=200)
    assert str(found["bleu"]).startswith(f"{bleu.score:.1f} ± ")


def test_all_right_is_sure():
    for value in score(REFERENCES, REFERENCES, bootstrap=50).values():
        assert (value.value, value.half_width) == (pytest.approx(100), pytest.approx(0))


def test_each_has_a_reference():
    with pytest.raises(
        ValueError, match="expected one for each translation, got 7 for 8"
    ):
        score(TRANSLATIONS, REFERENCES[1:])


def test_scores_by_length():
    sources = ["x " * n for n in (1, 10, 11, 20, 21, 50, 51, 90)]
    rows = score_by_length(
        sources, TRANSLATIONS, REFERENCES, edges=(10, 20, 30, 50), bootstrap=20
    )
    assert [(r["words"], r["sentences"], r["mean_words"]) for r in rows] == [
        ("1-10", 2, 5.5),
        ("11-20", 2, 15.5),
        ("21-30", 1, 21),
        ("31-50", 1, 50),
        ("51+", 2, 70.5),
    ]
    alone = score(TRANSLATIONS[6:], REFERENCES[6:], bootstrap=20)
    assert rows[-1]["bleu"] == alone["bleu"]._asdict()


def test_shares_of_scores():
    part, whole = ({"value": x, "half_width": y} for x, y in ((20, 2), (40, 3)))
    np.testing.assert_allclose(share(part, whole), (0.5, 0.5 * 0.125))
    assert share(part, {"value": 0.0, "half_width": 0.0}) == (0, 0)


def test_exact_matches():
    batch = pad([([], [5, 6]), ([], [5, 6]), ([], [5]), ([], []), ([], [7, 7])], 6, 4)
    said = np.array([
        [5, 6, END, 9],  # tokens after END do not count
        [5, 6, 6, END],
        [5, END, 0, 0],
        [END, 0, 0, 0],
        [7, END, 0, 0],
        [5, 5, 5, 5],  # a row without an example
    ])
    assert exact_matches(said, batch).tolist() == [True, False, True, True, False]
    assert exact_matches(said[:, :2], batch).tolist() == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_translating_in_a_few_shapes():
    random = np.random.default_rng(0)
    sources = [[10 + i] * n for i, n in enumerate(random.integers(1, 40, 53))]
    sources.append([3000] * 100)
    shapes = set()

    def double(source, lengths):
        shapes.add(source.shape)
        assert all(row[n - 1] == END for row, n in zip(source, lengths, strict=True))
        return 2 * source

    found = translate(sources, double, tokens=64, lengths=(8, 16, 32), devices=2)
    for source, tokens in zip(sources, found, strict=True):
        assert tokens[: len(source)].tolist() == [2 * t for t in source]
    assert shapes == {(8, 8), (4, 16), (2, 32), (2, 64), (2, 128)}
    with pytest.raises(ValueError, match=r"expected to return \[8, L\], got \(8,\)"):
        translate([[4]], lambda s, n: n, tokens=64, lengths=(8,))


def test_lengths_beyond_the_longest():
    assert [padded_length(n, (8, 12)) for n in (1, 8, 9, 12, 13, 25)] == [
        8,
        8,
        12,
        12,
        24,
        48,
    ]


def test_samples_in_which_nothing_is_right():
    references = ["a b c d e f", "g h i j k l", "m n o p q r"]
    said = ["a b c d e f", "x x x x x x", "y y y y y y"]
    found = score(said, references, bootstrap=50)["bleu"]
    assert 0 < found.value < 100
    assert found.half_width > 0
