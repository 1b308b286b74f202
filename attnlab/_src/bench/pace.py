"""Divides a time budget among the groups that are still to be measured."""

import time
from collections.abc import Sequence

from attnlab._src.bench.timing import Repeats


class Pace:
    """Decides what there is time for, from how long groups have taken so far.

    It estimates the time of a group's own implementations, and of each dense
    implementation or peer measured beside them, as means over the groups done.
    """

    def __init__(self, budget: float | None, repeats: Repeats, groups: int):
        self._end = None if budget is None else time.perf_counter() + budget
        self._repeats = repeats
        self._left = groups
        self._alone: list[float] = []
        self._beside: list[float] = []

    def _typical(self) -> float:
        # The default is a guess for two idle cores.
        return _mean(self._alone, 4.0)

    def _spare(self) -> float:
        """Seconds left after the remaining groups' own implementations are measured."""
        if self._end is None:
            return float("inf")
        return self._end - time.perf_counter() - self._left * self._typical()

    def allows(self) -> bool:
        """Whether there is time for another group."""
        return self._spare() + (self._left - 1) * self._typical() > 0

    def allows_beside(self, count: int) -> bool:
        """Whether there is time for ``count`` more contenders in the next group."""
        return self._spare() > count * _mean(self._beside, 3.0)

    def repeats(self) -> Repeats:
        """How often to repeat in the next group."""
        if self._end is None:
            return self._repeats
        share = self._spare() / max(self._left, 1)
        return self._repeats._replace(seconds=min(self._repeats.seconds, share))

    def record(self, seconds: float, beside: int) -> None:
        """Records a group as done: its time, and how many contenders ran beside it."""
        self._left -= 1
        if beside:
            self._beside.append(max(seconds - self._typical(), 0.0) / beside)
        else:
            self._alone.append(seconds)


def _mean(values: Sequence[float], guess: float) -> float:
    return sum(values) / len(values) if values else guess
