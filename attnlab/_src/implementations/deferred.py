"""Applies deferred operations (zeros in dead slots, scales) to the inputs."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from attnlab._src.types import Array, AttentionInputs


def zero_dead(x: Array, living: Array | None) -> Array:
    """``x [B, L, heads, X]`` with zeros where ``living [Bp, Np, L]`` is False."""
    if living is None:
        return x
    return jnp.where(living.swapaxes(1, 2)[..., None], x, jnp.zeros((), x.dtype))


def apply_deferred(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs with zeros in dead slots, for implementations that read all slots."""
    of_query, of_key = inputs.living
    return dataclasses.replace(
        inputs,
        query=zero_dead(inputs.query, of_query),
        key=zero_dead(inputs.key, of_key),
        value=zero_dead(inputs.value, of_key),
        living=(None, None),
    )


def scaled_query(inputs: AttentionInputs, dtype: DTypeLike | None = None) -> Array:
    """The query times the scales of the logits, in its own type or in ``dtype``."""
    query = inputs.query if dtype is None else inputs.query.astype(dtype)
    if inputs.logit_scale != 1:
        query = query * inputs.logit_scale
    if inputs.head_scale is None:
        return query
    return query * inputs.head_scale.swapaxes(1, 2).astype(query.dtype)


def scaling_rounds(inputs: AttentionInputs) -> bool:
    """Whether ``scaled_query`` rounds a 16-bit query: the scale is no power of two."""
    if inputs.query.dtype.itemsize > 2:
        return False
    return inputs.head_scale is not None or math.frexp(inputs.logit_scale)[0] != 0.5
