"""Residuals of the forward pass, with names for the policies of ``jax.checkpoint``.

The log-sum-exp is kept without -inf, because ``jax.debug_infs`` checks residuals.
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
    """The log-sum-exp, -inf included, from what :func:`keep` made of it."""
    return jnp.where(kept == jnp.finfo(kept.dtype).min, -jnp.inf, kept)
