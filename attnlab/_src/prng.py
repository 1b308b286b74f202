"""PRNG keys of any generator as threefry keys, which every platform uses alike."""

import jax
import jax.numpy as jnp

from attnlab._src.types import Array


def as_threefry(rng: Array) -> Array:
    """A key of JAX's default generator, derived from every word of ``rng``.

    Numbers drawn from it depend neither on the platform nor on ``vmap``; those of "rbg"
    and "unsafe_rbg" do. Two ``fold_in`` of it are unrelated, while those of
    "unsafe_rbg" differ from each other by the same words for every key.

    Args:
        rng: one PRNG key, typed or raw, of any generator.

    Returns:
        A typed key of "threefry2x32": ``rng`` itself, if it is one.
    """
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    words = (jax.random.key_data(rng) if typed else jnp.asarray(rng)).reshape(-1)
    if words.shape[0] == 2:
        return jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.key(0, impl="threefry2x32")
    for place in range(words.shape[0]):
        key = jax.random.fold_in(key, words[place])
    return key
