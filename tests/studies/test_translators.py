"""Translators do not depend on padding and on rows without an example."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.studies.machinery.data.batches import pad
from benchmarks.studies.machinery.models.translators import (
    TRANSLATORS,
    Sizes,
    best_of_beams,
    greedy,
    logits,
)
from tests.grid import few

SIZES = Sizes(features=12, hidden_size=10, layers=1, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", few(TRANSLATORS, "additive"))
def test_padding_is_not_seen(name):
    model = TRANSLATORS[name](23, SIZES, nnx.Rngs(3))
    model.eval()
    examples = [([5, 9, 7], [8, 6]), ([11, 12, 13, 14, 15], [4, 17, 18, 19])]
    batch = jax.tree.map(np.asarray, pad(examples, 2, 7))
    other = batch.source.copy()
    other[0, 4:] = 21
    filled = batch._replace(source=other)
    call = jax.jit(logits)
    found, same = (call(model, b)[0, :3] for b in (batch, filled))
    np.testing.assert_allclose(found, same, rtol=1e-5, atol=1e-5)
    alone = call(model, jax.tree.map(np.asarray, pad(examples[:1], 1, 4)))[0, :3]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    for translate in (greedy, best_of_beams):
        run = jax.jit(translate)
        first, second = (
            run(model, b.source, b.source_lengths) for b in (batch, filled)
        )
        np.testing.assert_array_equal(first[0], second[0])
