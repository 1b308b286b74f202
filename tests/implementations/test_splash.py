"""JAX's splash attention, interpreted, as a cross-check of attnlab's results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import attention, explain, masks, modifiers, scores
from attnlab._src.implementations import IMPLEMENTATIONS
from attnlab._src.implementations.splash import Splash
from tests.grid import few

MASKS = {
    "full": None,
    "causal": masks.causal(),
    "window": masks.sliding_window(100, 20),
    "sees_nothing": masks.causal() & ~masks.prefix(200),
    "per_head": masks.per_head([masks.causal(), masks.full()] * 2),
    "a_head_sees_nothing": masks.per_head([masks.causal(), ~masks.full()] * 2),
    "all_see_nothing": ~masks.full(),
}


class Interpreted(Splash):
    name = "splash_interpreted"
    platforms = None
    interpret = True


@pytest.mark.parametrize("name", few(MASKS, "per_head"))
def test_it_computes_what_the_reference_does(name, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, Interpreted.name, Interpreted())
    random = np.random.default_rng(0)
    q, k, v = (
        random.normal(size=(2, length, heads, 16)).astype(np.float32)
        for length, heads in ((256, 4), (384, 2), (384, 2))
    )

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation):
        def attend(*arrays):
            return attention(*arrays, mask=MASKS[name], implementation=implementation)

        output, pull = jax.vjp(attend, q, k, v)
        return output, pull(jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5),
        both(Interpreted.name),
        both("reference"),
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(score=scores.additive.init(jax.random.key(0), 64, hidden_size=4)),
         "not an inner product"),
        (dict(modifiers=[modifiers.soft_cap(5.0)]), "no modifiers"),
        (dict(dropout_rate=0.1, dropout_rng=jax.random.key(0)), "no dropout"),
        (dict(sinks=jnp.zeros(2)), "carries no gradient"),
        (dict(mask=masks.lengths(key=np.array([3]))), "carries data"),
        (dict(query_offset=3), "positions are given"),
        (dict(precision="highest"), "no precision="),
    ],
)  # fmt: skip
def test_what_it_refuses(options, reason):
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    with pytest.raises(NotImplementedError, match=reason):
        explain(x, x, x, implementation="splash", platform="tpu", **options)


def test_a_scale_that_would_round_queries_is_refused():
    def ask(head_size, dtype, score=None):
        x = jax.ShapeDtypeStruct((1, 256, 2, head_size), dtype)
        options = dict(implementation="splash", platform="tpu")
        return explain(x, x, x, score=score, **options).implementation

    for taken in ((64, jnp.bfloat16), (128, jnp.float32)):
        assert ask(*taken) == "splash"
    learned = scores.scaled_dot(jnp.float32(0.5))
    for refused in ((128, jnp.bfloat16), (64, jnp.bfloat16, learned)):
        with pytest.raises(NotImplementedError, match="no power of two.*bfloat16"):
            ask(*refused)


def test_x64_mode():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)
    ask = lambda: explain(x, x, x, implementation="splash", platform="tpu")
    with (
        jax.enable_x64(True),
        pytest.raises(NotImplementedError, match="jax_enable_x64"),
    ):
        ask()
    assert ask().implementation == "splash"


def test_lengths_and_types():
    x = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.float16)
    with pytest.raises(NotImplementedError) as refused:
        explain(x, x, x, implementation="splash", platform="tpu")
    assert "lengths must be multiples of 128" in str(refused.value)
    assert "not float16" in str(refused.value)
