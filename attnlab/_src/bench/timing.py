"""Times calls after a warm-up, until results are ready, interleaved in rounds."""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import jax
import numpy as np

_K = TypeVar("_K", bound=Hashable)


class Timing(NamedTuple):
    """How long a call takes, in seconds.

    Attributes:
        median: median of all repeats.
        low: their 20 % quantile.
        high: their 80 % quantile.
        repeats: number of repeats.
    """

    median: float
    low: float
    high: float
    repeats: int


class Repeats(NamedTuple):
    """How often calls are repeated.

    Attributes:
        least: least number of rounds.
        most: greatest number of rounds.
        seconds: time for all rounds; their number is as many as fit, within the limits.
        settle: seconds for which, in every round, a call runs untimed before it is
            timed for as long. Otherwise effects of the previous call (threads that
            still spin, memory that is still being freed) count, too.
    """

    least: int = 3
    most: int = 15
    seconds: float = 5.0
    settle: float = 0.0


def summarise(samples: list[float]) -> Timing:
    """Median and 20 / 80 % quantiles of samples in seconds."""
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8))
    return Timing(float(median), float(low), float(high), len(samples))


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _turn(call: Callable[[], object], settle: float, least: float) -> list[float]:
    """Times a call in one turn: once if it is long, else repeatedly after settling.

    Args:
        call: function without arguments.
        settle: see :class:`Repeats`; a call is long if it takes twice this time.
        least: least time of the call so far, in seconds; the first call of a turn can
            be slowed down by the previous contender.

    Returns:
        Times in seconds.
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
    calls: Mapping[_K, Callable[[], object]],
    repeats: Repeats,
    *,
    warm: bool = False,
) -> dict[_K, Timing]:
    """Times calls in rounds of one turn each, so that all run under equal conditions.

    Every second round reverses the order of the one before, and the order is rotated by
    one every two rounds: no call always follows the same other call.

    Args:
        calls: functions without arguments, by name.
        repeats: number of rounds.
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
