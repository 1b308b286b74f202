"""Modifiers: additive bias and soft cap."""

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src import arguments
from attnlab._src.types import Array, ArrayLike, Modifier, Operand, Tile, pytree


@pytree
class Bias(Modifier):
    """``logits + array``, an array that broadcasts to ``[B, N, T, S]``."""

    array: ArrayLike

    def operands(self) -> tuple[Operand, ...]:
        """See :class:`attnlab.Modifier`."""
        return (Operand(self.array),)

    def apply(self, logits: Array, tile: Tile, *operands: Array) -> Array:
        """See :class:`attnlab.Modifier`."""
        return logits + operands[0].astype(logits.dtype)


@pytree
class SoftCap(Modifier):
    """``cap * tanh(logits / cap)``."""

    flops_per_pair = 3

    cap: jax.typing.ArrayLike

    def operands(self) -> tuple[Operand, ...]:
        """See :class:`attnlab.Modifier`."""
        return (Operand(jnp.asarray(self.cap)),)

    def apply(self, logits: Array, tile: Tile, *operands: Array) -> Array:
        """See :class:`attnlab.Modifier`."""
        cap = operands[0].astype(logits.dtype)
        return cap * jnp.tanh(logits / cap)


def bias(array: ArrayLike) -> Modifier:
    """Adds an array to the logits; -inf hides a pair, unless a soft cap follows.

    Args:
        array: floating, broadcasts to ``[B, N, T, S]``. Its gradient is computed only
            where it is asked for.

    Raises:
        TypeError: if the array is not floating.
    """
    if getattr(array, "dtype", None) == jnp.bool_:
        raise TypeError(
            "bias: expected a floating array, got bool; a boolean array is a mask: "
            "pass it as mask="
        )
    return Bias(arguments.floating("bias", array))


def soft_cap(cap: jax.typing.ArrayLike) -> Modifier:
    """Keeps logits within ``(-cap, cap)`` smoothly: ``cap * tanh(logits / cap)``.

    Args:
        cap: a positive number, or an array that broadcasts to ``[B, N, T, S]``.

    Raises:
        TypeError: if it is no real number, nor an array of them.
        ValueError: if it is not traced, and not positive or not finite.

    References:
        Gemma Team, "Gemma 2", 2024, section 2 (logit soft-capping).
    """
    known = arguments.values(arguments.real("cap", cap))
    if known is not None and not ((known > 0) & (known < np.inf)).all():
        raise ValueError(f"cap: expected a positive finite number, got {cap}")
    return SoftCap(cap)
