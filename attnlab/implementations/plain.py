"""Inputs for implementations that read arrays as they are."""

import dataclasses

import jax.numpy as jnp

from attnlab.types import Array, AttentionInputs


def zero_dead(x: Array, living: Array | None) -> Array:
    """``[B, L, heads, X]`` with zeros in slots that ``[Bp, Np, L]`` calls dead."""
    if living is None:
        return x
    return jnp.where(living.swapaxes(1, 2)[..., None], x, jnp.zeros((), x.dtype))


def plain(inputs: AttentionInputs) -> AttentionInputs:
    """The same with queries scaled and dead slots 0, so that nobody need do either."""
    of_query, of_key = inputs.living
    query = zero_dead(inputs.query, of_query)
    return dataclasses.replace(
        inputs,
        query=query if inputs.logit_scale == 1 else query * inputs.logit_scale,
        key=zero_dead(inputs.key, of_key),
        value=zero_dead(inputs.value, of_key),
        living=(None, None),
        logit_scale=1.0,
    )
