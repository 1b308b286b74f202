"""Fine-tuning: a trained decoder learns another task by its attention layers alone.

A real run would begin with published weights: ``nn.weights.load`` reads them.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnlab import masks, nn

TOKENS = 16
#: The parameters that fine-tuning changes.
TUNED = nnx.All(nnx.Param, nnx.PathContains("attention"))


def batch(rng: jax.Array, step: int) -> jax.Array:
    """Sequences that count by ``step`` from a random number, ``[32, 24]``."""
    first = jax.random.randint(rng, (32, 1), 0, TOKENS)
    return (first + step * jnp.arange(24)) % TOKENS


def loss(model: nn.Decoder, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(model: nn.Decoder, changed: nnx.filterlib.Filter, count_by: int) -> float:
    """Updates the parameters that ``changed`` selects; returns the last loss."""
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=changed)

    @nnx.jit
    def step(
        model: nn.Decoder, optimizer: nnx.Optimizer, tokens: jax.Array
    ) -> jax.Array:
        wanted = nnx.DiffState(0, changed)
        value, gradient = nnx.value_and_grad(loss, argnums=wanted)(model, tokens)
        optimizer.update(model, gradient)
        return value

    for i in range(80):
        value = step(model, optimizer, batch(jax.random.key(i), count_by))
    return float(value)


def main() -> None:
    model = nn.Decoder.standard(
        TOKENS,
        features=32,
        num_heads=4,
        num_layers=2,
        mask=masks.causal() & masks.sliding_window(8, 0),
        position=nn.Rotary,
        residual=nn.PreNorm,
        rngs=nnx.Rngs(0),
    )
    print(f"trained to count by 1: {train(model, nnx.Param, 1):.3f} nats")
    test = batch(jax.random.key(1000), 3)
    before = float(loss(model, test))
    tuned, rest = (
        sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))
        for kind in (TUNED, nnx.All(nnx.Param, nnx.Not(TUNED)))
    )
    train(model, TUNED, 3)
    after = float(loss(model, test))
    print(f"fine-tuned to count by 3 ({tuned:,} of {tuned + rest:,} parameters):")
    print(f"{before:.3f} nats before, {after:.3f} after")
    assert after < before / 4


if __name__ == "__main__":
    main()
