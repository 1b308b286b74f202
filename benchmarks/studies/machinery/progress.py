"""What those who wait see: a bar, and a line for each evaluation."""

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Bar:
    """Steps, loss, tokens a second, time left; on a terminal only.

    Lines are printed above it, everywhere.
    """

    def __init__(self, name: str, done: int, steps: int, console: Console):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._name, self._steps = name, steps
        self._task: TaskID = self._progress.add_task(
            name, total=steps, completed=done, loss=float("nan"), rate=0.0
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, done: int, loss: float, rate: float) -> None:
        """A step is done."""
        self._progress.update(self._task, completed=done, loss=loss, rate=rate)

    def say(self, step: int, numbers: dict[str, float], rate: float) -> None:
        """A line that stays."""
        found = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._progress.console.print(
            f"{self._name}: step {step:,} of {self._steps:,}: {found} "
            f"({rate:,.0f} tokens/s)",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
