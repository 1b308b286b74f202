"""Adam with clipped gradients, warm-up and decay of the learning rate."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import optax

from benchmarks.studies.machinery.record import Json

Decay = Literal["cosine", "inverse_sqrt"]


class Optimiser(NamedTuple):
    """An optimiser, and its settings for the config of a run.

    Attributes:
        transform: the optax transformation.
        rate: the learning rate of each step, for the log.
        settings: JSON, what distinguishes it from other optimisers.
    """

    transform: optax.GradientTransformation
    rate: optax.Schedule
    settings: Json


def schedule(
    rate: float, *, steps: int, warmup: int, decay: Decay = "cosine"
) -> optax.Schedule:
    """A learning rate that rises linearly from 0 to ``rate``, then decays.

    Args:
        rate: the highest rate.
        steps: steps of the whole run.
        warmup: steps until the highest rate.
        decay: ``cosine``: to 0 at ``steps``; ``inverse_sqrt``: ``rate * sqrt(warmup /
            step)``.

    References:
        Vaswani et al., 2017, equation 3 (inverse square root); Loshchilov and Hutter,
        "SGDR", 2017, equation 5 (cosine).
    """
    if not 1 <= warmup < steps:
        raise ValueError(f"warmup: expected 1 to steps - 1 = {steps - 1}, got {warmup}")
    rising = optax.linear_schedule(0.0, rate, warmup)
    if decay == "cosine":
        falling = optax.cosine_decay_schedule(rate, steps - warmup)
    elif decay == "inverse_sqrt":
        # It is also evaluated during the warm-up, where its value is not used.
        falling = lambda after: rate * jnp.sqrt(warmup / jnp.maximum(warmup + after, 1))
    else:
        raise ValueError(f"decay: expected cosine or inverse_sqrt, got {decay!r}")
    return optax.join_schedules([rising, falling], [warmup])


def adam(
    rate: float,
    *,
    steps: int,
    warmup: int,
    decay: Decay = "cosine",
    clip: float = 1.0,
    b2: float = 0.98,
) -> Optimiser:
    """Adam, gradients clipped by their global norm.

    Args:
        rate: the highest learning rate.
        steps: see :func:`schedule`.
        warmup: see :func:`schedule`.
        decay: see :func:`schedule`.
        clip: the greatest norm of a gradient; longer ones are scaled down.
        b2: decay of the second moments.

    References:
        Kingma and Ba, "Adam", 2015; Pascanu et al., "On the difficulty of training
        recurrent neural networks", 2013, algorithm 1 (clipping).
    """
    rates = schedule(rate, steps=steps, warmup=warmup, decay=decay)
    transform = optax.chain(
        optax.clip_by_global_norm(clip), optax.adam(rates, b2=b2, eps=1e-9)
    )
    settings: Json = {
        "name": "adam",
        "rate": rate,
        "steps": steps,
        "warmup": warmup,
        "decay": decay,
        "clip": clip,
        "b2": b2,
    }
    return Optimiser(transform, rates, settings)
