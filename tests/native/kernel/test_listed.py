"""The pass in which each query has a list of keys of its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, cost, explain, masks, modifiers
from attnlab._src.implementations.native import listed, load
from tests.native.kernel.test_running import arrays, both_ways

pytestmark = pytest.mark.skipif(load.why_not() is not None, reason="no library")

T, S, N, K = 37, 300, 4, 2


def lists(heads, entries, key_block=1):
    rng = np.random.default_rng(0)
    most = -(-S // key_block)
    found = rng.integers(-1, most, (2, heads, T, entries))
    found[:, :, 3] = -1  # a query that sees nothing
    found[:, :, 4] = found[:, :, 4, :1]  # one key, many times
    return found


def inputs(dtype=jnp.float32):
    return arrays(t=T, s=S, n=N, k=K, dtype=dtype)


CASES = {
    "keys": (lists(K, 9), 1, lambda m: m),
    "blocks": (lists(1, 4, 16), 16, lambda m: masks.causal() & m),
    "each head": (lists(N, 70), 1, lambda m: m & ~masks.prefix(20) & masks.full()),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    found, block, more = CASES[name]
    options: dict[str, Any] = dict(query_offset=S - T, precision="highest")
    options["mask"] = more(masks.selected(found, key_block=block))
    q, k, v, above = inputs()
    wanted = both_ways(q, k, v, above, implementation="reference", **options)
    for one, other in zip(both_ways(q, k, v, above, **options), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_nan_reaches_those_who_list_it():
    q, k, v, _ = inputs()
    found, call = lists(K, 9), jax.jit(attention, static_argnames="implementation")
    broken = v.at[:, 7].set(jnp.nan), k.at[:, 7].set(jnp.nan)
    sees = np.repeat((found == 7).any(-1).swapaxes(1, 2), N // K, 2)
    assert sees.any()
    for key, value in ((k, broken[0]), (broken[1], v)):
        mask = masks.selected(found)
        output = call(q, key, value, mask=mask, implementation="native")
        np.testing.assert_array_equal(np.isnan(output).any(-1), sees)


def test_mapped_lists_of_the_same_keys():
    """A mapped axis becomes heads that share a key head, with lists that differ."""
    q, k, v, _ = inputs()
    several = jnp.stack([q, 2 * q]), np.stack([lists(K, 9), lists(K, 9)[:, :, ::-1]])

    def call(q, found):
        mask = masks.selected(found)
        return attention(q, k, v, mask=mask, implementation="native")

    found = jax.jit(jax.vmap(call))(*several)
    for i, wanted in enumerate(map(jax.jit(call), *several)):
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5, atol=1e-5)


def test_where_it_is_taken(monkeypatch):
    """For few keys of single queries; else blocks of the plan are computed."""
    asked = []
    told = listed.lists_of
    monkeypatch.setattr(
        "attnlab._src.implementations.native.lists_of",
        lambda inputs: asked.append(told(inputs)) or asked[-1],
    )
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs()[:3]]

    def takes(mask, **options):
        asked.clear()
        call = jax.jit(
            lambda *x: attention(*x, mask=mask, implementation="native", **options)
        )
        call.lower(*shapes)
        return asked[0] is not None

    few, many = masks.selected(lists(1, 9)), masks.selected(lists(1, 100))
    assert takes(few)
    assert takes(few & masks.causal())
    assert not takes(many)
    assert not takes(few | masks.causal())
    assert not takes(few & masks.documents(np.zeros(T, int), np.zeros(S, int)))
    assert not takes(few, modifiers=[modifiers.soft_cap(3.0)])
    assert not takes(few, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    assert not takes(few, key_positions=np.arange(S))
    shared = masks.selected(lists(1, 4, 16)[:, :, ::16], query_block=16, key_block=16)
    assert not takes(shared)


def test_cost_and_explain_count_what_lists_hold():
    q, k, v, _ = inputs()
    mask = masks.selected(lists(K, 9))
    options: dict[str, Any] = dict(mask=mask, implementation="native")
    found = cost(q, k, v, **options)
    assert found.pairs_executed == 2 * N * T * 9 >= found.pairs > 0
    assert "each query alone, with the 9 keys of its list" in str(
        explain(q, k, v, **options)
    )
    soft = explain(q, k, v, modifiers=[modifiers.soft_cap(3.0)], **options)
    assert soft.keys_listed is None
    assert "blocks of" in str(soft)
