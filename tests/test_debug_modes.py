"""JAX's debug modes: checks of jaxprs, of NaN, and of leaked tracers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import attention, masks, modifiers, nn
from tests.grid import NATIVE, few
from tests.implementations import interpreted

MODES = {
    "checks": lambda: jax.enable_checks(True),
    "nans": lambda: jax.debug_nans(True),
    "leaks": jax.checking_leaks,
}
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.normal(size=(2, 6, 2, 4)).astype("f") for _ in range(3))
#: The last query of one example may attend to no key.
LENGTHS = np.array([6, 5])


def loss(q, k, v, implementation):
    output = attention(
        q,
        k,
        v,
        mask=masks.causal() & masks.lengths(query=LENGTHS, key=LENGTHS),
        modifiers=[modifiers.soft_cap(9.0)],
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
        implementation=implementation,
    )
    return (output * output).sum()


@pytest.mark.parametrize(
    ("implementation", "mode"),
    few(
        itertools.product(["reference", "tiled", NATIVE, interpreted.NAME], MODES),
        ("tiled", "nans"),
        (NATIVE, "checks"),
        (NATIVE, "leaks"),
    ),
)
def test_attention(implementation, mode, monkeypatch):
    interpreted.register(monkeypatch)
    with MODES[mode]():
        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
        found = run(QUERY, KEY, VALUE, implementation)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_trains_a_step(mode):
    with MODES[mode]():
        model = nn.Decoder.standard(
            12,
            num_layers=1,
            features=8,
            num_heads=2,
            hidden_features=8,
            rngs=nnx.Rngs(0),
        )
        tokens = jnp.array([[1, 2, 3, 0], [4, 5, 0, 0]])

        @nnx.jit
        def step(model, tokens):
            def loss(model):
                return jnp.square(model(tokens)).mean()

            return nnx.value_and_grad(loss)(model)

        value, gradients = step(model, tokens)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
