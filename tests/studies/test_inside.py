"""Statistics of attention inside a model, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, nn
from benchmarks.studies.ablations.inside import (
    Inside,
    _deviation,
    _logits,
    _shape_of,
    inside,
)
from benchmarks.studies.machinery.data.stretches import Stretch
from benchmarks.studies.machinery.models.language_models import Sizes, language_model
from tests.grid import few

LENGTH = 12


@pytest.mark.parametrize("scale", [0.1, 40.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_numbers_of_known_logits(is_causal, scale):
    random = np.random.default_rng(0)
    logits = scale * random.standard_normal((2, 3, LENGTH, LENGTH))
    seen = np.tri(LENGTH, dtype=bool) if is_causal else np.ones((LENGTH,) * 2, bool)
    weights = np.where(seen, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.zeros((4, 2, 3, LENGTH - 1))
    for b, n, t in np.ndindex(2, 3, LENGTH - 1):
        own = t + 1
        row, w = logits[b, n, own, seen[own]], weights[b, n, own, seen[own]]
        expected[:, b, n, t] = (
            row.std(),
            -(w * np.log(w)).sum() / np.log(len(w)),
            w.argmax() == own,
            weights[b, n, own, own] * len(w),
        )
    as_32 = jnp.asarray(weights, jnp.float32)
    found = [
        _deviation(jnp.asarray(logits, jnp.float32), is_causal),
        *_shape_of(as_32, is_causal),
    ]
    np.testing.assert_allclose(found, expected.mean((2, 3)), rtol=2e-3, atol=1e-5)


def test_logits_make_the_weights():
    attention = nn.MultiHeadAttention(
        16, 2, mask=masks.causal(), position=nn.Rotary(), rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, 16))
    hidden = np.where(np.tri(LENGTH), 0, -np.inf).astype(np.float32)[None, None]
    expected = jax.nn.softmax(_logits(attention, x) + hidden)
    weights = attention.with_stats(x, top_k="all").weights
    np.testing.assert_allclose(weights, expected, atol=1e-5)


@pytest.mark.parametrize("causal", few([False, True], True))
def test_inside_a_model(causal):
    mask = [masks.causal() if causal else masks.full()] * 2
    model = language_model(20, Sizes(16, 2, 2), mask, causal=causal, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 20, (3, LENGTH))
    found = inside(model, Stretch(tokens, tokens, tokens > 0))
    assert found.shape == (3, 2, len(Inside._fields))
    assert np.isfinite(found).all()
    deviation, entropy, itself, own_weight, kept = np.moveaxis(found, -1, 0)
    assert (deviation > 0).all()
    assert ((entropy > 0) & (entropy < 1)).all()
    assert ((itself >= 0) & (itself <= 1)).all()
    assert (own_weight > 0).all()
    assert ((kept > 0) & (kept < 1)).all()
