"""Times calls side by side: warm, waited for, and interleaved."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

_K = TypeVar("_K", bound=Hashable)


class Timing(NamedTuple):
    """How long a call takes, in seconds.

    Attributes:
        median: of all repeats.
        low: their 20 % quantile.
        high: their 80 % quantile.
        repeats: how many.
    """

    median: float
    low: float
    high: float
    repeats: int


class Repeats(NamedTuple):
    """How often to repeat.

    Attributes:
        least: rounds in any case.
        most: rounds at most.
        seconds: between the two, as many rounds as fit.
    """

    least: int = 3
    most: int = 15
    seconds: float = 5.0


def summarise(samples: list[float]) -> Timing:
    """Median and 20 / 80 % quantiles of samples in seconds."""
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(float(median), float(low), float(high), len(samples))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleave(
    calls: Mapping[_K, Callable[[], Any]],
    repeats: Repeats,
    *,
    warm: bool = False,
) -> dict[_K, Timing]:
    """Times calls in rounds, each once a round, so that all see the same machine.

    The order is turned by one in each round: nobody always follows the same neighbour.

    Args:
        calls: by name.
        repeats: how many rounds.
        warm: whether every call has already run once.
    """
    names = list(calls)
    samples: dict[_K, list[float]] = {name: [] for name in names}
    if not warm:
        for call in calls.values():
            timed(call)
    rounds, done = repeats.least, 0
    while done < rounds:
        turn = done % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            samples[name].append(timed(calls[name]))
        done += 1
        if done == 1:
            spent = sum(s[0] for s in samples.values())
            fitting = int(repeats.seconds / max(spent, 1e-9))
            rounds = min(max(fitting, repeats.least), repeats.most)
    return {name: summarise(s) for name, s in samples.items()}
