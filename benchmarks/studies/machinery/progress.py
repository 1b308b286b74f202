"""Progress of a run in the terminal: a bar, and a line for each evaluation."""

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
    """A progress bar: steps, loss, tokens per second, time left.

    The bar is shown on a terminal only; lines are printed above it in any case.
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
        """Updates the bar after a step."""
        self._progress.update(self._task, completed=done, loss=loss, rate=rate)

    def say(self, step: int, numbers: dict[str, float], rate: float) -> None:
        """Prints a line with the numbers of an evaluation."""
        found = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._progress.console.print(
            f"{self._name}: step {step:,} of {self._steps:,}: {found} "
            f"({rate:,.0f} tokens/s)",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
