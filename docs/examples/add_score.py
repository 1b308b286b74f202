"""A score of your own: similarity falls with the distance of two vectors.

It has a learned parameter for each head, and works with every mask. Kernels evaluate it
tile by tile: the array of differences, ``[T, S, H]``, is never in memory as a whole.
"""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab import attention, extend, masks


@extend.pytree
class Distance(extend.Score):
    """``-weight[head] * |q - k|``, the sum of absolute differences.

    Attributes:
        weight: ``[N]`` or ``[1]``, learned.
    """

    weight: Any

    def pair_params(self):
        """The arrays that ``compare`` needs; the first axis is N or 1."""
        return self.weight

    def compare(self, params, query, key):
        """``[q, P], [k, P] -> [q, k]``; ``params`` is the weight of one head."""
        return -params * jnp.abs(query[:, None, :] - key[None, :, :]).sum(-1)


def main() -> None:
    score = Distance(jnp.full(4, 0.5))
    print(extend.check(score, num_heads=4))

    x = jax.random.normal(jax.random.key(0), (2, 64, 4, 8))

    def loss(score):
        return (attention(x, x, x, score=score, mask=masks.causal()) ** 2).sum()

    print("gradient of the weights:", jax.grad(loss)(score).weight)


if __name__ == "__main__":
    main()
