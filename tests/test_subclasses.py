"""Law 15: a subclass that overrides a method is never treated like its base.

For each public class, a subclass overrides one method. The result must be that of the
new method, or a refusal with a reason, never that of the base class.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks, nn
from attnlab._src.types import Modifier
from tests import grid
from tests.grid import NATIVE, few

SIZES = grid.Setting(2, 17, 17, 4, 2, 8, 8, 8, np.random.default_rng(0))
Q, K, V = (SIZES.normal(2, 17, heads, 8) for heads in (SIZES.N, SIZES.K, SIZES.K))


def derived(x, **methods):
    """The same object as an instance of a subclass with ``methods``."""
    kind = type(x)
    made = grid.pytree(type(f"Own{kind.__name__}", (kind,), methods))
    return made(**{f.name: getattr(x, f.name) for f in dataclasses.fields(x)})


def every_other(base):
    def visible(self, tile, operands):
        even = (tile.query_positions + tile.key_positions) % 2 == 0
        return base.visible(self, tile, operands) & even

    return visible


MASKS = [name for name in grid.MASKS if name not in ("none", "dense")]
IMPLEMENTATIONS = ["tiled", NATIVE, "jax_nn"]


@pytest.mark.parametrize(
    ("name", "implementation"),
    few(
        itertools.product(MASKS, IMPLEMENTATIONS),
        ("causal", NATIVE),
        ("big_bird", "tiled"),
        ("documents", NATIVE),
        ("per_head", NATIVE),
        ("longformer", "tiled"),
        ("not", "jax_nn"),
    ),
)
def test_masks(name, implementation):
    base = grid.MASKS[name](SIZES)
    own = derived(base, visible=every_other(type(base)))
    seen = np.asarray(base.to_dense(17, 17))
    if seen.shape[1] == SIZES.K:
        seen = seen.repeat(SIZES.N // SIZES.K, axis=1)
    seen = seen & (np.add.outer(np.arange(17), np.arange(17)) % 2 == 0)
    found = attention(Q, K, V, mask=own, implementation=implementation)
    wanted = attention(Q, K, V, mask=seen, implementation="reference")
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def tripled(base):
    def apply(self, logits, tile, *operands):
        return 3 * base.apply(self, logits, tile, *operands)

    return apply


@pytest.mark.parametrize(
    ("name", "implementation"),
    few(
        itertools.product(
            [n for n in grid.MODIFIERS if n not in ("none", "stacked")],
            IMPLEMENTATIONS,
        ),
        ("alibi", NATIVE),
        ("t5", "tiled"),
        ("bias", "jax_nn"),
    ),
)
def test_modifiers(name, implementation):
    (base,) = grid.MODIFIERS[name](SIZES)

    @grid.pytree
    class Triple(Modifier):
        def apply(self, logits, tile, *operands):
            return 3 * logits

    own = derived(base, apply=tripled(type(base)))
    wanted = attention(Q, K, V, modifiers=(base, Triple()), implementation="reference")
    if implementation != "tiled":
        with pytest.raises(NotImplementedError, match=f"Own{type(base).__name__}"):
            attention(Q, K, V, modifiers=(own,), implementation=implementation)
    found = attention(Q, K, V, modifiers=(own,))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


class Turning(nn.Rotary):
    """Rotates twice as large vectors, so that logits are four times as large."""

    def rotate(self, x, positions):
        return super().rotate(2 * x, positions)


class Gentle(nn.PreNorm):
    """Halves the output of its layer."""

    def __call__(self, x, layer):
        return super().__call__(x, lambda y: layer(y) / 2)


class Scaled(nn.FeedForward):
    def __call__(self, x):
        return 3 * super().__call__(x)


class Doubled(nn.MultiHeadAttention):
    """Doubles its queries in every use."""

    def _attend(self, query, *others, **options):
        return super()._attend(2 * query, *others, **options)


PARTS: dict[str, Any] = dict(
    position=Turning, residual=Gentle, feed_forward=Scaled, attention=Doubled
)
SMALL = dict(features=16, num_heads=2, num_layers=2)
TOKENS = np.arange(6)[None] % 5


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_standard_models(part):
    """Overridden parts are used on whole sequences, with caches, and in scans."""
    known: dict[str, Any] = dict(position=nn.Rotary, residual=nn.PreNorm) | SMALL
    model, base = (
        nn.Decoder.standard(7, rngs=nnx.Rngs(0), **options)
        for options in (known | {part: PARTS[part]}, known)
    )
    assert (model.stack.norm is None) == (base.stack.norm is None)
    whole = model(TOKENS)
    assert np.abs(whole - base(TOKENS)).max() > 1e-3
    state, steps = model.start(batch=1, length=6), []
    for i in range(0, 6, 3):
        logits, state = model.decode(TOKENS[:, i : i + 3], state)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole, atol=1e-4)


def test_drop_ins_ask_the_subclass():
    own = derived(masks.causal(), visible=every_other(type(masks.causal())))
    found = nn.attention_fn(mask=own)(Q, K, V)
    seen = np.tril(np.ones((17, 17), bool))
    seen &= np.add.outer(np.arange(17), np.arange(17)) % 2 == 0
    wanted = attention(Q, K, V, mask=seen, implementation="reference")
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_caches_of_a_mask_that_shows_less():
    base = masks.sliding_window(3, 0)
    own = derived(base, visible=every_other(type(base)))
    layer = nn.MultiHeadAttention(16, 2, mask=own, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    cache, steps = nn.full_cache(1, 6, 2, layer.compared_size), []
    for i in range(6):
        y, cache = layer.decode(x[:, i : i + 1], cache)
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), layer(x), atol=1e-5)
