"""Training a small decoder with optax to predict the next number of a sequence."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnlab import masks, nn

TOKENS = 16


def batch(rng: jax.Array) -> jax.Array:
    """Sequences that count upwards from a random number, ``[32, 24]``."""
    first = jax.random.randint(rng, (32, 1), 0, TOKENS)
    return (first + jnp.arange(24)) % TOKENS


def loss(model: nn.Decoder, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def step(model: nn.Decoder, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """Makes one update, and returns the loss before it."""
    value, gradient = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, gradient)
    return value


def main() -> None:
    model = nn.Decoder.standard(
        TOKENS,
        features=32,
        num_heads=4,
        num_layers=2,
        mask=masks.causal() & masks.sliding_window(8, 0),
        position=nn.Rotary,
        rngs=nnx.Rngs(0),
    )
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    for i in range(60):
        value = step(model, optimizer, batch(jax.random.key(i)))
        if i % 20 == 0:
            print(f"step {i}: {value:.3f} nats")
    print(f"last step: {value:.3f} nats")
    assert value < 1.0


if __name__ == "__main__":
    main()
