"""Results of parts of the keys, merged by their log-sum-exp."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from attnlab._src.types import Array

Result = tuple[Array, Array]


def merged(results: Sequence[Result]) -> Result:
    """The output ``[B, T, N, D]`` and log-sum-exp ``[B, T, N]`` of all parts.

    Dropout, which is applied after the softmax, commutes with this sum.

    Args:
        results: of disjoint sets of keys, in the accumulation type.
    """
    first, *rest = results
    for more in rest:
        first = _both(first, more)
    return first


def merged_over(result: Result, axes: tuple[str, ...]) -> Result:
    """As :func:`merged`, of what each device along some axes has for all of them."""
    output, lse = result
    most = lax.pmax(lax.stop_gradient(lse), axes)
    base = jnp.where(jnp.isneginf(most), 0, most)
    hidden = jnp.isneginf(lse)
    share = jnp.where(hidden, 0, jnp.exp(jnp.where(hidden, base, lse) - base))
    total, summed = lax.psum((share, output * share[..., None]), axes)
    sees = total > 0
    safe = jnp.where(sees, total, 1)
    return summed / safe[..., None], jnp.where(sees, base + jnp.log(safe), -jnp.inf)


def _both(one: Result, other: Result) -> Result:
    logs = jnp.stack([one[1], other[1]])
    most = lax.stop_gradient(logs.max(0, keepdims=True))
    # Without -inf, whose differences are NaN.
    base = jnp.where(jnp.isneginf(most), 0, most)
    hidden = jnp.isneginf(logs)
    shares = jnp.where(hidden, 0, jnp.exp(jnp.where(hidden, base, logs) - base))
    total = shares.sum(0, keepdims=True)
    sees = total > 0
    safe = jnp.where(sees, total, 1)
    weights = (shares / safe)[..., None]
    output = one[0] * weights[0] + other[0] * weights[1]
    return output, jnp.where(sees, base + jnp.log(safe), -jnp.inf)[0]
