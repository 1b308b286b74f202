"""The types that numbers are computed in, under every mode of promotion."""

import jax
import jax.numpy as jnp
import numpy as np


def promoted(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays in the type of JAX's standard promotion, in strict mode, too."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays)
    return [x.astype(dtype) for x in arrays]


def accumulation_dtype(*dtypes: np.dtype) -> np.dtype:
    """The type of sums of these types: float64 if one of them is, else float32."""
    return np.result_type(np.float32, *(d for d in dtypes if d == np.float64))
