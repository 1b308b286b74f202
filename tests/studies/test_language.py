"""Long documents, masked tokens, and language models with sparse patterns."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab._src.masks.graph import reach_through
from benchmarks.studies.machinery.data.addresses import load_addresses
from benchmarks.studies.machinery.data.batches import END, START
from benchmarks.studies.machinery.data.stretches import Stretches
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.models.language_models import (
    PATTERNS,
    UNITS,
    Sizes,
    anchors_of_own,
    copy_parameters,
    language_model,
    layer_masks,
    losses_and_hits,
)
from benchmarks.studies.machinery.models.long_contexts import close_rows
from benchmarks.studies.machinery.page import interval
from tests.grid import few

STREAM = np.arange(100, 1000, dtype=np.int32)


def stretches(stream=STREAM, **changes):
    options: dict[str, Any] = {
        "length": 16,
        "rows": 4,
        "vocabulary_size": 2000,
        "causal": True,
    }
    return Stretches(stream, **{**options, **changes})


def test_documents_are_whole(long_texts, tmp_path):
    found = load_addresses(tmp_path, folder=long_texts, pieces=300, test=3, dev=2)
    parts = {"train": found.train, "dev": found.dev, "test": found.test}
    seen = {}
    for part, stream in parts.items():
        documents = np.split(stream, np.flatnonzero(stream == START)[1:])
        assert len(documents) == found.counts["documents"][part]
        assert all(d[0] == START and d[-1] == END for d in documents)
        seen[part] = {found.vocabulary.decode(d[1:]) for d in documents}
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]
    again = load_addresses(tmp_path, folder=long_texts, pieces=300, test=3, dev=2)
    assert again.fingerprint == found.fingerprint
    other = load_addresses(
        tmp_path, folder=long_texts, pieces=300, test=3, dev=2, seed=1
    )
    assert other.fingerprint != found.fingerprint


def test_copies_of_what_is_held_out_are_left_out(long_texts, tmp_path):
    options = {"folder": tmp_path, "pieces": 300, "test": 3, "dev": 2}
    for path in long_texts.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    before = load_addresses(tmp_path, **options)
    assert before.counts["left_out"] == 0
    text = before.vocabulary.decode(before.test[1:])
    # Another file would change the random order, so one is replaced.
    kept = before.vocabulary.decode(before.train[1:])
    (twin,) = (p for p in long_texts.iterdir() if kept.startswith(p.read_text()[:40]))
    (tmp_path / twin.name).write_text(text)
    after = load_addresses(tmp_path, **options)
    assert after.counts["left_out"] == 1
    assert after.counts["documents"]["train"] == before.counts["documents"]["train"] - 1


def test_too_few_documents(long_texts, tmp_path):
    with pytest.raises(StudyError, match="expected more than 60 documents.*got 12"):
        load_addresses(tmp_path, folder=long_texts, test=40, dev=20)


def test_what_follows():
    made = stretches()
    seen = []
    for step in range(made.steps):
        batch = made.batch_at(step)
        np.testing.assert_array_equal(batch.labels, batch.tokens + 1)
        assert np.asarray(batch.counted).all()
        seen += np.asarray(batch.tokens).ravel().tolist()
    assert len(seen) == len(set(seen)) == made.steps * 4 * 16
    again, later = made.batch_at(0), made.batch_at(made.steps)
    np.testing.assert_array_equal(again.tokens, stretches().batch_at(0).tokens)
    assert (later.tokens != again.tokens).any()


def test_evaluation_sees_each_stretch_once():
    batches = stretches(rows=5).all()
    counted = np.concatenate([b.tokens[np.asarray(b.counted)] for b in batches])
    whole = (len(STREAM) - 1) // 16 * 16
    np.testing.assert_array_equal(counted, STREAM[:whole])
    assert {b.tokens.shape for b in batches} == {(5, 16)}


def test_what_is_hidden():
    stream = np.random.default_rng(0).integers(4, 2000, 60000).astype(np.int32)
    made = stretches(stream, length=1000, rows=20, causal=False)
    assert made.vocabulary_size == 2001
    batch = made.batch_at(3)
    tokens, labels, chosen = map(np.asarray, batch)
    assert chosen.mean() == pytest.approx(0.15, abs=0.01)
    np.testing.assert_array_equal(tokens[~chosen], labels[~chosen])
    hidden, same = tokens[chosen] == 2000, tokens[chosen] == labels[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert same.mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_array_equal(made.batch_at(3).tokens, tokens)
    assert (made.batch_at(4).tokens != tokens).any()


def test_a_text_that_is_too_short():
    message = r"expected a text of at least 81 tokens for 4 .*got 70"
    with pytest.raises(StudyError, match=message):
        stretches(STREAM[:70])


@pytest.mark.slow
def test_patterns_cost_the_same():
    for causal in (False, True):
        densities = {
            name: np.mean([m.density(512) for m in layer_masks(name, 512, 3, causal)])
            for name in PATTERNS
        }
        full = densities.pop("full")
        for name, density in densities.items():
            # Random blocks may coincide, and windows are cut at the ends.
            assert 0.06 < density / full < 0.11, name


@pytest.mark.parametrize(
    ("name", "causal"),
    few(
        itertools.product([*PATTERNS, "own projections"], [False, True]),
        ("own projections", True),
    ),
)
def test_models_see_what_masks_show(name, causal):
    """The gradient of an output is zero exactly where the graph has no path."""
    length, layers = 2 * UNITS, 2
    own = 0
    if name == "own projections":
        name, own = "window+anchor", 0 if causal else anchors_of_own(length)
    mask = layer_masks(name, length, layers, causal)
    model: Any = language_model(
        20,
        Sizes(16, 2, layers),
        mask,
        causal=causal,
        own_projections=own,
        rngs=nnx.Rngs(0),
    )
    stack = model.stack if causal else model.encoder.stack
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, length, 16)).astype(np.float32)
    weights = rng.normal(size=(length, 16)).astype(np.float32)

    def outputs(x):
        return (stack(x)[0] * weights).sum(-1)

    depends = np.linalg.norm(jax.jit(jax.jacrev(outputs))(x)[:, 0], axis=-1) > 0
    expected = reach_through(mask, length)
    np.testing.assert_array_equal(depends, expected)


@pytest.mark.slow
def test_models_begin_as_others_ended():
    """Also for anchor projections, copies of which do not change the output."""
    length = 2 * UNITS
    mask = layer_masks("window+anchor", length, 2, False)

    def model(seed, own):
        sizes, rngs = Sizes(16, 2, 2), nnx.Rngs(seed)
        return language_model(
            20, sizes, mask, causal=False, own_projections=own, rngs=rngs
        )

    source, target = model(0, 0), model(1, anchors_of_own(length))
    tokens = jax.random.randint(jax.random.key(2), (1, length), 0, 20)
    before = target(tokens)
    copy_parameters(source, target)
    np.testing.assert_allclose(target(tokens), source(tokens), rtol=1e-5, atol=1e-6)
    assert np.abs(before - source(tokens)).max() > 0.1
    # A training step donates each array, which must not be shared.
    leaves = jax.tree.leaves(nnx.state(target, nnx.Param))
    kept = jax.tree.leaves(nnx.state(source, nnx.Param))
    assert len({id(x) for x in [*leaves, *kept]}) == len(leaves) + len(kept)


def test_losses_count_what_is_asked():
    batch = stretches(vocabulary_size=1000).batch_at(0)
    counted = np.asarray(batch.counted).copy()
    counted[:, 5:] = False
    model = lambda tokens: jax.nn.one_hot(tokens + 1, 1000) * 50.0
    losses, hits = losses_and_hits(model, batch._replace(counted=counted))
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_array_equal(hits, counted)
    wrong = lambda tokens: jnp.zeros((*tokens.shape, 1000))
    losses, _ = losses_and_hits(wrong, batch._replace(counted=counted))
    np.testing.assert_allclose(losses, counted * np.log(1000), rtol=1e-6)


def test_close_rows():
    found = {"a": 3.0, "b": 3.04, "c": 3.2, "d": 3.31, "e": 3.345, "f": 3.39}
    assert close_rows(found) == ["a", "b", "d", "e", "f"]
    assert close_rows({"a": 1.0}) == []


def test_interval():
    assert interval([2.0]) == (2.0, None)
    mean, half = interval([1.0, 2.0, 3.0])
    # Student's t for two degrees of freedom is 4.303; the spread 1 over sqrt(3).
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
