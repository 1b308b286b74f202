"""Batches: each pair once per epoch, few shapes, a function of the step alone."""

import collections

import numpy as np
import pytest

from benchmarks.studies.machinery.data.batches import END, PADDING, START, Batches, pad
from benchmarks.studies.machinery.data.synthetic import FIRST_SYMBOL, Symbols


def examples(count=211, longest=40):
    random = np.random.default_rng(0)
    lengths = random.integers(1, longest, (count, 2))
    # The first token identifies the example.
    return [
        ([100 + i, *[7] * (a - 1)], [100 + i, *[9] * (b - 1)])
        for i, (a, b) in enumerate(lengths)
    ]


def rows(batch):
    """The pairs of a batch, without special tokens and padding."""
    for source, n, target, m in zip(*batch, strict=True):
        if m > 1:
            assert source[n - 1] == END
            assert target[0] == START
            assert target[m - 1] == END
            assert (source[n:] == PADDING).all()
            assert (target[m:] == PADDING).all()
            yield source[: n - 1].tolist(), target[1 : m - 1].tolist()


def test_an_epoch_sees_each_pair_once():
    given = examples()
    made = Batches(given, tokens=96, lengths=(8, 16, 33), devices=2)
    fits = [e for e in given if max(map(len, e)) < 33]
    assert (made.kept, made.dropped) == (len(fits), len(given) - len(fits))
    assert made.dropped > 20
    wanted = sorted((list(a), list(b)) for a, b in fits)
    for epoch in range(3):
        steps = range(epoch * made.steps, (epoch + 1) * made.steps)
        found = [row for s in steps for row in rows(made.batch_at(s))]
        assert sorted(found) == wanted
    assert sorted(row for batch in made.all() for row in rows(batch)) == wanted


def test_few_shapes_that_devices_can_share():
    made = Batches(examples(), tokens=96, lengths=(8, 16, 33), devices=2)
    assert made.shapes == [(12, 8), (6, 16), (2, 33)]
    found = collections.Counter(
        made.batch_at(s).source.shape for s in range(2 * made.steps)
    )
    assert set(found) == {(12, 8), (6, 16), (2, 33)}
    for step in range(made.steps):
        batch = made.batch_at(step)
        assert batch.target.shape == (len(batch.source), batch.source.shape[1] + 1)
        assert batch.source_lengths.min() >= 1
        assert {x.dtype for x in batch} == {np.dtype(np.int32)}


def test_a_batch_follows_from_seed_and_step_alone():
    one, other, third = (
        Batches(examples(), tokens=96, lengths=(8, 16, 33), seed=s) for s in (1, 1, 2)
    )
    order = [5, 3 * one.steps + 1, 0, 5, one.steps, one.steps - 1]
    found = {s: one.batch_at(s) for s in order}
    for step in reversed(order):
        for x, y in zip(found[step], other.batch_at(step), strict=True):
            np.testing.assert_array_equal(x, y)
    assert sources(one, 0, one.steps) != sources(third, 0, one.steps)
    assert sources(one, 0, one.steps) != sources(one, one.steps, 2 * one.steps)


def sources(batches, start, end):
    return [batches.batch_at(s).source.tolist() for s in range(start, end)]


def test_a_batch_in_full():
    batch = pad([([5, 6], [7]), ([], [8, 9, 4])], 3, 4)
    assert batch.source.tolist() == [[5, 6, 3, 0], [3, 0, 0, 0], [3, 0, 0, 0]]
    assert batch.source_lengths.tolist() == [3, 1, 1]
    assert batch.target.tolist() == [[2, 7, 3, 0, 0], [2, 8, 9, 4, 3], [2, 0, 0, 0, 0]]
    assert batch.target_lengths.tolist() == [3, 5, 1]


def test_refusals():
    with pytest.raises(ValueError, match="expected some of at most 7 tokens"):
        Batches([([1] * 8, [1])], lengths=(8,))
    with pytest.raises(ValueError, match="lengths: expected ascending"):
        Batches(examples(), lengths=(16, 8))


@pytest.mark.parametrize("task", ["copy", "reverse"])
def test_symbols(task):
    made = Symbols(task, symbols=5, lengths=(2, 6), rows=40, seed=3)
    assert made.vocabulary_size == FIRST_SYMBOL + 5
    lengths = collections.Counter()
    for step in range(5):
        found = list(rows(made.batch_at(step)))
        assert len(found) == 40
        for source, target in found:
            assert target == (source[::-1] if task == "reverse" else source)
            assert FIRST_SYMBOL <= min(source) <= max(source) < made.vocabulary_size
            lengths[len(source)] += 1
    assert sorted(lengths) == [2, 3, 4, 5, 6]
    assert min(lengths.values()) > 25
    assert made.batch_at(0).source.shape == (40, 7)


def test_symbols_are_new_at_each_step_and_the_same_again():
    one, other = (Symbols("copy", symbols=5, lengths=(2, 6), rows=4) for _ in range(2))
    for step in (3, 0, 3):
        np.testing.assert_array_equal(
            one.batch_at(step).source, other.batch_at(step).source
        )
    assert one.batch_at(0).source.tolist() != one.batch_at(1).source.tolist()


def test_symbols_to_test_with():
    made = Symbols("reverse", symbols=5, lengths=(2, 6), rows=4)
    found = made.test([3, 9], batches=2)
    assert [set(b.source_lengths.tolist()) for b in found] == [{4}, {4}, {10}, {10}]
    assert {b.source.shape for b in found} == {(4, 10)}
    assert found[0].source.tolist() != found[1].source.tolist()
    for fields, match in (
        (dict(task="sort"), "task: expected copy or reverse"),
        (dict(lengths=(0, 3)), "lengths: expected 1 <= least <= most"),
        (dict(padded=6), "padded: expected more than 6"),
    ):
        with pytest.raises(ValueError, match=match):
            Symbols(**{
                **dict(task="copy", symbols=5, lengths=(2, 6), rows=4),
                **fields,
            })
