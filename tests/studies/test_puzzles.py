"""The puzzles of the recall study."""

from random import Random
from typing import Any

import numpy as np
import pytest

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.data import puzzles
from benchmarks.studies.machinery.data.puzzles import (
    CLOSE,
    EMPTY,
    FILLERS,
    KEYS,
    OPERATORS,
    ListOps,
    Recall,
    draw_list,
    value,
)
from benchmarks.studies.machinery.page import half_width
from benchmarks.studies.recall.study import Task


def test_recall_has_one_answer():
    task = Recall(length=64, rows=8, distances=(2, 40), pairs=6)
    batch = task.batch_at(0)
    distances = []
    for tokens, labels, counted in zip(*map(np.asarray, batch), strict=True):
        asked = np.flatnonzero(counted)
        assert 2 <= len(asked) <= 6
        for ask in asked:
            (key,) = np.flatnonzero(tokens == tokens[ask] - KEYS)
            assert FILLERS <= tokens[key] < FILLERS + KEYS
            assert tokens[key + 1] == labels[ask] >= FILLERS + 2 * KEYS
            distances.append(int(ask - key - 1))
    assert min(distances) >= 2
    assert max(distances) <= 40
    assert len(set(distances)) > 10
    # Distances are log-uniform: about as many are below 9 as above.
    assert 0.3 < np.mean(np.array(distances) < 9) < 0.7
    assert max(tokens.max() for tokens in batch.tokens) < task.vocabulary_size
    np.testing.assert_array_equal(task.batch_at(0).tokens, batch.tokens)
    assert (task.batch_at(1).tokens != batch.tokens).any()


def test_recall_at_one_distance():
    task = Recall(length=32, rows=4, distances=(3, 9))
    (batch,), (other,) = (task.apart((9, 9), 1, purpose=p) for p in ("test", "dev"))
    assert (batch.tokens != other.tokens).any()
    tokens, _, counted = map(np.asarray, batch)
    for row, ask in zip(*np.nonzero(counted), strict=True):
        assert tokens[row, ask - 10] == tokens[row, ask] - KEYS


def test_several_questions_for_one_pair():
    task = Recall(length=64, rows=8, distances=(2, 40), pairs=1, questions=6)
    asked = []
    for tokens, labels, counted in zip(*map(np.asarray, task.batch_at(0)), strict=True):
        (key,) = np.flatnonzero((tokens >= FILLERS) & (tokens < FILLERS + KEYS))
        questions = np.flatnonzero(counted)
        assert (tokens[questions] == tokens[key] + KEYS).all()
        assert (labels[questions] == tokens[key + 1]).all()
        distances = questions - key - 1
        assert 2 <= distances.min() <= distances.max() <= 40
        asked.append(len(questions))
    assert 4 < np.mean(asked) <= max(asked) <= 6


def test_a_distance_that_does_not_fit():
    message = r"distances: expected 1 <= least <= most <= 14, got \(3, 15\)"
    with pytest.raises(ValueError, match=message):
        Recall(length=16, rows=1, distances=(3, 15))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([10, 3, 1, 2, 14], 1),
        ([11, 3, 1, 2, 14], 3),
        ([12, 9, 1, 2, 14], 2),
        ([12, 9, 1, 2, 4, 14], 3),
        ([13, 9, 8, 7, 14], 4),
        ([11, 2, 10, 8, 9, 14, 0, 14], 8),
    ],
)
def test_values_of_lists(tokens, expected):
    assert value(tokens) == expected


def test_lists_follow_the_rules():
    random = Random(0)
    drawn = [draw_list(random, 60) for _ in range(400)]
    kept = [tokens for tokens in drawn if tokens is not None]
    assert 0 < len(kept) < 400
    arguments, nested = [], 0
    for tokens in kept:
        assert len(tokens) <= 60
        assert 0 <= value(tokens) <= 9
        open_lists, deepest = [], 0
        for token in tokens:
            if token in OPERATORS:
                if open_lists:
                    open_lists[-1] += 1
                    nested += 1
                open_lists.append(0)
                deepest = max(deepest, len(open_lists))
            elif token == CLOSE:
                arguments.append(open_lists.pop())
            else:
                open_lists[-1] += 1
        assert not open_lists
        assert deepest < puzzles.DEPTH
    assert (min(arguments), max(arguments)) == (2, 10)
    # Long lists are rejected, so less than a quarter of the arguments are lists.
    assert 0.05 < nested / sum(arguments) < 0.25


def test_listops_asks_at_the_end():
    task = ListOps(length=64, rows=6)
    batch = task.batch_at(2)
    for tokens, labels, counted in zip(*map(np.asarray, batch), strict=True):
        assert np.flatnonzero(counted).tolist() == [63]
        spelt = tokens[tokens != EMPTY]
        assert len(spelt) >= 16
        assert tokens[63] == CLOSE
        assert value(spelt.tolist()) == labels[63]
    np.testing.assert_array_equal(task.batch_at(2).tokens, batch.tokens)
    test, dev = (task.apart(1, purpose=p)[0] for p in ("test", "dev"))
    assert (test.tokens != batch.tokens).any()
    assert (test.tokens != dev.tokens).any()


def test_what_the_graph_says(mesh, tmp_path):
    nowhere: Any = None
    task = Task(Context("recall", tmp_path, mesh, nowhere, quick=True), "recall")
    near, far = task.apart(4, "test").values()
    guess = 1 / puzzles.VALUES
    assert task.predicted("full", far) == (1, 1)
    # Two layers of a window of three do not reach 30 back: answers are guesses.
    assert task.predicted("window", far) == (guess, guess)
    assert task.predicted("window", near) == (1, 1)
    # Only every fourth word is seen: never both the value and its key.
    expected, most = task.predicted("dilated", near)
    assert expected == guess < most
    # With one value only, the key is not needed.
    task = Task(task.context, "reach")
    near, _ = task.apart(4, "test").values()
    expected, most = task.predicted("dilated", near)
    assert guess < expected == most < 1


def test_half_width():
    # 50 of 100: (50 + 2) / 104 is still a half.
    assert half_width(0.5, 100) == pytest.approx(1.96 * 0.5 / 104**0.5)
    assert half_width(0, 10) > 0.1
