"""Decoding with a small model: greedy, by sampling, and by beam search.

The caches are pytrees; the step is compiled once for each shape.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab import masks, nn


def main() -> None:
    model = nn.Decoder.standard(
        64,  # tokens
        features=32,
        num_heads=4,
        num_key_heads=2,
        num_layers=2,
        mask=masks.causal() & masks.sliding_window(16, 0),
        position=nn.Rotary,
        rngs=nnx.Rngs(0),
    )
    prompt = jnp.array([[3, 14, 15, 9, 2, 6]])
    options = dict(length=10, end=0)
    start = dict(batch=1, length=prompt.shape[1] + 10)

    greedy = nn.greedy(model.decode, model.start(**start), prompt, **options)
    print("greedy:", greedy.tokens)

    sampled = nn.sample(
        model.decode,
        model.start(**start),
        prompt,
        jax.random.key(0),
        top_k=8,
        temperature=0.8,
        **options,
    )
    print("sampled:", sampled.tokens)

    found = nn.beam_search(
        model.decode, model.start(**start), prompt, beams=3, **options
    )
    print("beams:", found.tokens)


if __name__ == "__main__":
    main()
