"""What a forward pass keeps for the backward pass, by name, for policies of remat.

The log-sum-exp is kept without its -inf: jax.debug_infs looks at what is kept.
"""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnlab._src.types import Array


def keep(output: Array, lse: Array) -> tuple[Array, Array]:
    """The output, and the log-sum-exp with the least finite number instead of -inf."""
    finite = jnp.where(jnp.isneginf(lse), jnp.finfo(lse.dtype).min, lse)
    output = checkpoint_name(output, "attnlab_output")
    return output, checkpoint_name(finite, "attnlab_lse")


def with_inf(kept: Array) -> Array:
    """The log-sum-exp that :func:`keep` was given."""
    return jnp.where(kept == jnp.finfo(kept.dtype).min, -jnp.inf, kept)
