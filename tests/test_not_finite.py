"""Law 17: NaN and infinity reach only the queries that see them, and their keys.

Documents lie side by side in one tile; a number that is not finite in one document must
not reach the outputs or gradients of another, in any implementation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention_with_stats, masks, modifiers, scores
from tests.grid import NATIVE, few
from tests.implementations import interpreted

B, S, N, K, H, D = 2, 70, 4, 2, 8, 6
#: Documents, some shorter than a block, so that tiles are full or partial.
IDS = np.repeat(np.arange(4), [9, 23, 33, 5])[None].repeat(B, 0).astype(np.int32)
RNG = np.random.default_rng(0)
SCORES = {
    "product": scores.scaled_dot,
    "additive": lambda: scores.additive.init(jax.random.key(1), H, hidden_size=5),
    "mlp": lambda: scores.mlp.init(
        jax.random.key(1), H, hidden_sizes=(6, 3), activation=jnp.tanh
    ),
}
#: The place of the number (array, example, slot), and the number.
SPOILT = {
    "query": ("query", 1, -12, np.nan),
    "key": ("key", 1, 60, np.nan),
    "value": ("value", 1, 60, np.nan),
    "infinite value": ("value", 1, 60, np.inf),
    "cotangent": ("cotangent", 1, -12, np.nan),
}


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def floats(arrays):
    return [np.asarray(x, np.float32) for x in arrays]


def problem(t):
    return dict(
        query=normal(B, t, N, H),
        key=normal(B, S, K, H),
        value=normal(B, S, K, D),
        cotangent=normal(B, t, N, D),
    )


CASES = {
    "product": dict(t=S, score="product"),
    "few": dict(t=12, score="product"),
    "additive": dict(t=S, score="additive"),
    "few additive": dict(t=12, score="additive"),
    "mlp": dict(t=S, score="mlp"),
    "dropout": dict(t=S, score="product", dropout=0.3),
    "16 bits": dict(t=S, score="product", dtype=jnp.bfloat16),
    "few of 16 bits": dict(t=12, score="product", dtype=jnp.bfloat16),
}


IMPLEMENTATIONS = ("reference", "tiled", NATIVE, interpreted.NAME)
#: Kernels have separate code for many and for few queries; the other cases differ only
#: in what is computed for a pair.
KEPT = [
    *itertools.product(["product"], ["reference", "tiled", NATIVE]),
    *itertools.product(["few"], ["tiled", NATIVE]),
    *itertools.product(["additive", "dropout", "16 bits"], [NATIVE]),
    ("mlp", "tiled"),
]


@pytest.mark.parametrize(
    ("name", "implementation"), few(itertools.product(CASES, IMPLEMENTATIONS), *KEPT)
)
def test_only_those_who_see_it(name, implementation, monkeypatch, tile):
    interpreted.register(monkeypatch)
    tile(16, 16)
    case = CASES[name]
    t = case["t"]
    score = SCORES[case["score"]]()
    dropped = {}
    if "dropout" in case:
        dropped = dict(dropout_rate=case["dropout"], dropout_rng=jax.random.key(0))

    @jax.jit
    def run(query, key, value, cotangent):
        def forward(query, key, value):
            return attention_with_stats(
                query,
                key,
                value,
                score=score,
                mask=masks.causal() & masks.documents(IDS[:, -t:], IDS),
                modifiers=[modifiers.alibi(N)],
                query_offset=S - t,
                implementation=implementation,
                precision="default",
                **dropped,
            )[:2]

        (output, lse), pull = jax.vjp(forward, query, key, value)
        # The cotangent of an output that is not finite is not finite either.
        lost = jnp.where(jnp.isfinite(output), cotangent, jnp.nan)
        return output, lse, *pull((lost, jnp.zeros_like(lse)))

    data = problem(t)
    dtype = case.get("dtype", jnp.float32)
    data = {name: x.astype(dtype) for name, x in data.items()}
    clean = floats(run(**data))
    assert all(np.isfinite(x).all() for x in clean)
    at = np.arange(S)
    visible = (at[S - t :, None] >= at) & (IDS[0, -t:, None] == IDS[0])
    for array, example, slot, number in SPOILT.values():
        if implementation == "reference" and array == "cotangent":
            continue  # autodiff multiplies NaN by the zeros of hidden pairs
        spoilt = {name: x.copy() for name, x in data.items()}
        spoilt[array][example, slot, 1, 2] = number
        output, lse, d_query, d_key, d_value = floats(run(**spoilt))
        if array in {"query", "cotangent"}:
            head, rows = np.arange(N) == 1, np.arange(t) == t + slot
        else:
            head, rows = np.arange(N) > 1, visible[:, slot]
        of_example = np.arange(B)[:, None, None] == example
        lost = of_example & rows[None, :, None] & head
        keys = of_example & visible[rows].any(0)[None, :, None]
        keys = keys & (np.arange(K) == (0 if head[1] else 1))
        expected = dict(
            output=(output, clean[0], lost & (array != "cotangent")),
            lse=(lse, clean[1], lost & (array in {"query", "key"})),
            d_query=(d_query, clean[2], lost),
            d_key=(d_key, clean[3], keys),
            d_value=(d_value, clean[4], keys),
        )
        for what, (found, before, gone) in expected.items():
            told = f"{array} {number}: {what}"
            kept = ~gone
            assert np.isfinite(found[kept]).all(), told
            np.testing.assert_allclose(
                found[kept], before[kept], atol=2e-5, rtol=2e-5, err_msg=told
            )
            if dropped and what == "d_value":
                continue  # dropped weights have zero gradients
            shown = found if found.ndim == 3 else found.sum(-1)
            assert not np.isfinite(shown[gone]).any(), told
