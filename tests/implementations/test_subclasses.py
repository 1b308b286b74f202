"""Kernels call the overriding methods of subclasses, or refuse them by name."""

import jax
import numpy as np
import pytest

from attnlab import attention, cost, explain, masks, scores
from attnlab._src.masks.base import And, Full, Not
from attnlab._src.masks.structural import Window
from attnlab._src.modifiers.bias import Bias
from attnlab._src.scores.pairwise import Additive, Concat, Mlp
from attnlab._src.scores.projected import ProjectedKeys
from attnlab._src.types import pytree
from tests.grid import NATIVE, in_turn
from tests.implementations import interpreted

RNG = np.random.default_rng(0)
T, N, H = 32, 2, 8
Q, K, V = (RNG.normal(size=(1, T, N, H)).astype("f") for _ in range(3))
KEY = jax.random.key(0)


def softmax(logits, visible=True):
    """``[N, T, S] -> [1, T, N, D]``."""
    weights = np.where(visible, np.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    return np.einsum("nts,bsnd->btnd", weights, V)


DOT = np.einsum("btnh,bsnh->nts", Q, K)


@pytree
class EvenKeys(Full):
    def visible(self, tile, operands):
        return tile.key_positions % 2 == 0


@pytree
class Turns(Full):
    """Even keys for even heads, odd keys for odd heads."""

    def visible(self, tile, operands):
        return (tile.key_positions + tile.head) % 2 == 0


@pytree
class Holes(Window):
    def visible(self, tile, operands):
        return super().visible(tile, operands) & (tile.key_positions % 3 != 1)


@pytree
class Xor(And):
    def visible(self, tile, operands):
        one, other = (
            m.visible(tile, o) for m, o in zip(self.parts, operands, strict=True)
        )
        return one ^ other


@pytree
class Itself(Not):
    def visible(self, tile, operands):
        return self.part.visible(tile, operands)


PARTS = masks.sliding_window(3, 0), masks.chunked(8)
ROWS, COLS = np.arange(T)[:, None], np.arange(T)[None, :]
BEFORE = (COLS <= ROWS) & (COLS >= ROWS - 3)
MASKS = {
    "full": (EvenKeys(), COLS % 2 == 0),
    "heads": (
        Turns() & ~masks.anchor([0, 1, 2]),
        ((COLS + np.arange(N)[:, None, None]) % 2 == 0) & (ROWS > 2) & (COLS > 2),
    ),
    "window": (Holes(9, 9), (abs(ROWS - COLS) <= 9) & (COLS % 3 != 1)),
    "and": (
        Xor(PARTS) & masks.causal(),
        (BEFORE ^ (ROWS // 8 == COLS // 8)) & (COLS <= ROWS),
    ),
    "not": (Itself(PARTS[0]), BEFORE),
}


@pytest.mark.parametrize(
    ("name", "implementation"),
    in_turn(MASKS, ["tiled", NATIVE, interpreted.NAME, "jax_nn"]),
)
def test_masks_that_show_something_else(name, implementation, monkeypatch, tile):
    tile(16, 8)
    interpreted.register(monkeypatch)
    mask, visible = MASKS[name]
    found = attention(
        Q, K, V, mask=mask, score=scores.dot(), implementation=implementation
    )
    np.testing.assert_allclose(found, softmax(DOT, visible), atol=1e-5)


def test_pairs_of_a_mask_that_reads_the_head():
    mask, visible = MASKS["heads"]
    assert cost(Q, K, V, mask=mask).pairs == visible.sum()


def test_a_mask_that_says_what_it_means_keeps_it():
    @pytree
    class Left(Holes):
        def bounds(self, rows, cols, operands):
            return super(Holes, self).bounds(rows, cols, operands)

    assert Left.bounds is not Holes.bounds
    assert Left.sees_itself is Holes.sees_itself
    assert Holes(1, 1).sees_itself is False
    assert int(Left(24, 24).plan(64, block_size=8).rows.full.per_row().sum()) > 0
    assert int(Holes(24, 24).plan(64, block_size=8).rows.full.per_row().sum()) == 0


@pytree
class Twice(Bias):
    def apply(self, logits, tile, *operands):
        return logits + 2 * operands[0]


@pytree
class Minus(scores.dot):
    def compare(self, params, query, key):
        return -(query @ key.T)


@pytree
class HalfOf(Concat):
    def compare(self, params, query, key):
        return super().compare(params, query, key) / 2


@pytree
class Louder(Additive):
    def pair_params(self):
        return 3 * self.weight


@pytree
class Shifted(Mlp):
    def project_query(self, query):
        return super().project_query(query) + 1


@pytree
class Squared(Mlp):
    def compare(self, params, query, key):
        return super().compare(params, query, key) ** 2


@pytree
class Reversed(ProjectedKeys):
    def compare(self, params, query, key):
        return -(query @ key.T)


BIAS = RNG.normal(size=(T, T)).astype("f")
CONCAT = HalfOf.init(KEY, H, hidden_size=3)
ADDITIVE = Louder.init(KEY, H, hidden_size=3)
FIRST, MLP = (kind.init(KEY, H, hidden_sizes=(4,)) for kind in (Shifted, Squared))


def hidden(score, act):
    q = np.einsum("btnh,hp->ntp", Q, score.query_weight[0])[:, :, None]
    k = np.einsum("bsnh,hp->nsp", K, score.key_weight[0])[:, None]
    return act(q + k + isinstance(score, Shifted)) @ np.asarray(score.weight[0])


OTHERS = {
    "bias": (dict(score=scores.dot(), modifiers=[Twice(BIAS)]), DOT + 2 * BIAS),
    "dot": (dict(score=Minus()), -DOT),
    "concat": (dict(score=CONCAT), hidden(CONCAT, np.tanh) / 2),
    "parameters": (dict(score=ADDITIVE), hidden(ADDITIVE, np.tanh) * 3),
    "projection": (dict(score=FIRST), hidden(FIRST, lambda x: np.maximum(x, 0))),
    "perceptron": (dict(score=MLP), hidden(MLP, lambda x: np.maximum(x, 0)) ** 2),
    "projected keys": (dict(score=Reversed(scores.scaled_dot())), -DOT / H**0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_scores_and_modifiers_that_do_something_else(name, monkeypatch):
    options, logits = OTHERS[name]
    found = attention(Q, K, V, **options)
    np.testing.assert_allclose(found, softmax(logits), atol=1e-5)
    interpreted.register(monkeypatch)
    refuse = {"native", "jax_nn", "splash"}
    # The TPU kernels trace ``apply`` of any modifier.
    refuse |= {interpreted.NAME} if name != "bias" else set()
    refuse = {"jax_nn", "splash"} if name == "projection" else refuse
    reasons = explain(Q, K, V, **options, implementation="reference").passed_over
    for implementation in refuse:
        with pytest.raises(NotImplementedError, match="cannot take these inputs"):
            explain(Q, K, V, **options, implementation=implementation)
    assert set(reasons) > refuse
