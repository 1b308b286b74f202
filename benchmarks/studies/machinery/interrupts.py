"""Delays Ctrl-C to the end of a training step."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """A context in which the first SIGINT or SIGTERM is only recorded.

    A second signal has its usual effect.

    Attributes:
        seen: number of the recorded signal; None: none was received.
    """

    def __init__(self) -> None:
        self.seen: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
