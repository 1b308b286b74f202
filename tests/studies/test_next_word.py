"""Words, the places where they stood last, and where attention looks."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

from attnlab import nn
from benchmarks.studies.machinery.data.batches import END, START, UNKNOWN
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.next_word.inside import (
    DISTANCES,
    STEPS_BACK,
    attention_weights,
    last_places,
    measure,
    read,
)
from benchmarks.studies.next_word.words import (
    KINDS,
    Sentence,
    Words,
    drawn,
    kind_of,
    text_of,
    tokens_of,
)

TEXT = tokens_of("The students opened their books. Their books, the students' books!")
WORDS = Words(TEXT, 100)


def test_tokens_and_kinds():
    assert tokens_of("It’s $1,000.50 - for THE students.") == [
        "it's", "$", "1,000.50", "-", "for", "the", "students", ".",
    ]  # fmt: skip
    kinds = [KINDS[kind_of(w)] for w in ("it's", "$", "1,000.50", "their", "books")]
    assert kinds == ["function", "punctuation", "content", "function", "content"]
    assert KINDS[kind_of(WORDS.labels[END])] == "mark"


def test_the_most_frequent_words_are_kept():
    few = Words(TEXT, 6)
    assert few.labels[4:] == ["books", "students"]
    assert few.encode(["their", "books"]) == [UNKNOWN, 4]


def test_a_stream_has_whole_documents():
    documents = [[["a", "b"], ["c"]], [["d"]]]
    text = text_of({"train": documents, "dev": documents, "test": [[["e"]]]}, 50)
    labels = [text.words.labels[token] for token in text.train]
    start, end = text.words.labels[START], text.words.labels[END]
    assert labels == [start, "a", "b", end, "c", end, start, "d", end]
    assert text.test.tolist() == [START, UNKNOWN, END]


def test_sentences_stop_before_a_known_content_word():
    document = [tokens_of("The students of it opened their books. It is. We are.")]
    text = text_of(dict.fromkeys(("train", "dev", "test"), [document]), 50)
    (found,) = drawn("here", text, 3)
    assert found.words == document[0][: len(found.words)]
    assert found.next == document[0][len(found.words)]
    assert found.next in {"opened", "books"}
    unknown = text_of({"train": [], "dev": [], "test": [document]}, 50)
    assert drawn("here", unknown, 3) == []


def batch_of(words):
    tokens = np.array([[END, *WORDS.encode(words)]], np.int32)
    labels = tokens[:, 1:]
    return Stretch(tokens[:, :-1], labels, np.ones(labels.shape, bool))


def test_where_a_word_stood_last():
    batch = batch_of(["the", "books", "the", "the", "books"])
    assert last_places(batch).tolist() == [[-1, -1, 1, 3, 2]]


def model(kind):
    made: Any = getattr(nn.RecurrentLanguageModel, kind)(
        WORDS.size, features=8, hidden_size=8, rngs=nnx.Rngs(0)
    )
    made.eval()
    return made


def test_what_is_measured(mesh):
    one = batch_of(["the", "students", "opened", "their", "books", ".", "the", "books"])
    batch = Stretch(*(np.concatenate([x, x]) for x in one))
    batch.counted[1] = False
    found = measure(model("standard"), [batch], WORDS, mesh)
    sums = np.array(found["sums"])
    counts = {
        (KINDS[i], DISTANCES[j]): int(sums[i, j, 1])
        for i, j in np.argwhere(sums[..., 1])
    }
    assert counts == {
        ("function", "never"): 2,
        ("function", "1-8"): 1,
        ("content", "never"): 3,
        ("content", "1-8"): 1,
        ("punctuation", "never"): 1,
    }
    assert found["loss"] == pytest.approx(sums[..., 0].sum() / 8)
    weights = np.asarray(attention_weights(model("standard"), one.tokens))[0]
    looks = found["looks"]
    back = np.mean([weights[t, t - 1] for t in range(1, 8)])
    equal = np.mean([1 / t for t in range(1, 8)])
    assert looks["back"]["1"] == pytest.approx([back, equal], rel=1e-4)
    assert set(looks["back"]) == set(STEPS_BACK)
    # Step 7 reads "the" again, which step 1 has read.
    assert looks["same"]["as the last one"][0] == pytest.approx(weights[7, 1] / 7)
    # The second "books" comes after step 7, and its first place is step 5.
    pair = looks["repeated"]["1-8"]
    assert pair["word"] == pytest.approx([weights[7, 5], 1 / 7], rel=1e-4)
    assert pair["before"] == pytest.approx([weights[7, 4], 1 / 7], rel=1e-4)
    assert "looks" not in measure(model("plain"), [batch], WORDS, mesh)


def test_sentences_of_different_lengths():
    short = Sentence(None, ["the", "students"], "books")
    long = Sentence(None, ["the", "students", "opened", "their"], None)
    (found, other), (alone,) = (
        read(model("standard"), sentences, WORDS)
        for sentences in ([short, long], [short])
    )
    assert found["best"] == [[w, pytest.approx(p)] for w, p in alone["best"]]
    assert [len(row) for row in other["weights"]] == [0, 1, 2, 3, 4]
    assert other["next"] is None
    assert 0 < found["next"] < 1
