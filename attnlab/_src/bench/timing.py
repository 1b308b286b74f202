"""Times calls side by side: warm, waited for, and interleaved."""

import math
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
        settle: seconds that a call has to itself, in every round, before it is timed
            for as long again. Without it a call pays for its neighbour: threads that
            still spin, gigabytes still being given back.
    """

    least: int = 3
    most: int = 15
    seconds: float = 5.0
    settle: float = 0.0


def summarise(samples: list[float]) -> Timing:
    """Median and 20 / 80 % quantiles of samples in seconds."""
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(float(median), float(low), float(high), len(samples))


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _turn(call: Callable[[], Any], settle: float, least: float) -> list[float]:
    """Seconds of calls one after another; of one where ``settle`` is shorter.

    Args:
        call: what is timed.
        settle: see :class:`Repeats`.
        least: seconds that it has taken so far: what its neighbour left makes the first
            call of a turn look longer than it is.
    """
    first = timed(call)
    if min(first, least) >= 2 * settle:
        return [first]
    end = time.perf_counter() + settle
    while time.perf_counter() < end:
        timed(call)
    end = time.perf_counter() + settle
    samples = [timed(call)]
    while time.perf_counter() < end:
        samples.append(timed(call))
    return samples


def interleave(
    calls: Mapping[_K, Callable[[], Any]],
    repeats: Repeats,
    *,
    warm: bool = False,
) -> dict[_K, Timing]:
    """Times calls in rounds, each in its turn, so that all see the same machine.

    Every other round is that before it in reverse, and the order is turned by one every
    two rounds: no contender always follows the same one.

    Args:
        calls: by name.
        repeats: how many rounds.
        warm: whether every call has already run once.
    """
    names = list(calls)
    samples: dict[_K, list[float]] = {name: [] for name in names}
    least = {name: math.inf if warm else timed(call) for name, call in calls.items()}
    rounds, done = repeats.least, 0
    while done < rounds:
        start = time.perf_counter()
        turn = done // 2 % max(len(names), 1)
        order = names[turn:] + names[:turn]
        for name in order[:: -1 if done % 2 else 1]:
            samples[name] += _turn(calls[name], repeats.settle, least[name])
            least[name] = min(least[name], *samples[name])
        done += 1
        if done == 1:
            spent = time.perf_counter() - start
            fitting = int(repeats.seconds / max(spent, 1e-9))
            rounds = min(max(fitting, repeats.least), repeats.most)
    return {name: summarise(s) for name, s in samples.items()}
