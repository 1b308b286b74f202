"""The derivatives of the reference, against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attnlab import attention_with_stats, masks, modifiers, scores
from tests.grid import few

SCORES = {
    "scaled_dot": lambda rng: scores.scaled_dot(),
    "bilinear": lambda rng: scores.bilinear.init(rng, 3, num_heads=2),
    "cosine": lambda rng: scores.cosine.init(rng, num_heads=2, temperature=2.0),
    "additive": lambda rng: scores.additive.init(rng, 3, hidden_size=2),
    "mlp": lambda rng: scores.mlp.init(
        rng, 3, hidden_sizes=(3, 2), activation=jnp.tanh
    ),
}


@pytest.mark.parametrize("name", few(SCORES, "additive"))
def test_gradients_match_finite_differences(name):
    with jax.enable_x64(True):
        score = SCORES[name](jax.random.key(1))
        score = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), score)
        draw = np.random.default_rng(0)
        q, k, v = (draw.normal(size=(1, n, h, 3)) for n, h in ((3, 2), (4, 1), (4, 1)))
        bias, sinks = draw.normal(size=(2, 3, 4)), draw.normal(size=2)

        @jax.jit
        def run(q, k, v, score, bias, sinks):
            found = attention_with_stats(
                q,
                k,
                v,
                score=score,
                mask=masks.sliding_window(1, 1),
                modifiers=[modifiers.bias(bias), modifiers.soft_cap(2.0)],
                sinks=sinks,
                implementation="reference",
            )
            return found.output, found.lse

        arrays = tuple(jnp.asarray(x) for x in (q, k, v))
        check_grads(
            run,
            (*arrays, score, jnp.asarray(bias), jnp.asarray(sinks)),
            order=2,
            modes=["rev"],
            atol=1e-6,
            rtol=1e-6,
        )
