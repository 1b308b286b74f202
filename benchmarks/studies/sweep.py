"""Which learning rate? Short runs of the same config, the best by its evaluation."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.studies.context import Context
from benchmarks.studies.errors import Diverged
from benchmarks.studies.record import Json
from benchmarks.studies.training import Run, Trained


class Sweep(NamedTuple):
    """What a sweep found.

    Attributes:
        rate: the best.
        found: by rate the number that decides; None where the run diverged.
        summaries: of the runs, for what they cost.
    """

    rate: float
    found: dict[float, float | None]
    summaries: list[Json]


def sweep(
    context: Context, make_run: Callable[[float], Run], rates: Sequence[float]
) -> Sweep | None:
    """Trains at each rate, each its own run that can be gone on with.

    Args:
        context: of the study.
        make_run: a short run at a rate; it is named ``NAME/rate-RATE`` here, and its
            config gets the rate.
        rates: at least one; one alone is not tried.

    Returns:
        What was found; None where ``--only`` left out a rate that is not done yet.

    Raises:
        Diverged: if all of them do.
    """
    found: dict[float, float | None] = {}
    if len(rates) == 1:
        return Sweep(rates[0], found, [])
    summaries: list[Json] = []
    lower_is_better = True
    for rate in rates:
        run = make_run(rate)
        config: Json = {**run.config, "rate": rate}
        name = f"{run.name}/rate-{rate:g}"
        lower_is_better = not run.higher_is_better
        try:
            trained = context.train(dataclasses.replace(run, name=name, config=config))
        except Diverged as error:
            context.say(str(error))
            found[rate] = None
            continue
        if trained is None:
            return None
        summaries.append(trained.summary)
        found[rate] = trained.summary["best"][run.best]
    kept = {r: v for r, v in found.items() if v is not None and math.isfinite(v)}
    if not kept:
        raise Diverged(f"every rate of {', '.join(map(str, rates))} diverges")
    choose = min if lower_is_better else max
    return Sweep(choose(kept, key=lambda rate: kept[rate]), found, summaries)


class Chosen(NamedTuple):
    """A run at its best rate.

    Attributes:
        trained: the run.
        sweep: what chose the rate.
    """

    trained: Trained
    sweep: Sweep

    @property
    def summaries(self) -> list[Json]:
        """Of every run that it took."""
        return [*self.sweep.summaries, self.trained.summary]


def train_at_best_rate(
    context: Context,
    make_run: Callable[[float, bool], Run],
    rates: Sequence[float],
) -> Chosen | None:
    """Sweeps, then trains.

    Args:
        context: of the study.
        make_run: ``make_run(rate, short)``: a run, or a short one for the sweep.
        rates: see :func:`sweep`.

    Returns:
        None where ``--only`` left out what is not done yet.
    """
    swept = sweep(context, lambda rate: make_run(rate, True), rates)
    if swept is None:
        return None
    trained = context.train(make_run(swept.rate, False))
    return None if trained is None else Chosen(trained, swept)
