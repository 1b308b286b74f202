"""Chooses a learning rate by short runs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.studies.machinery.context import Context
from benchmarks.studies.machinery.errors import Diverged
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.training import Run, Trained

#: How many rates are tried beyond those given, while the best is the lowest or highest.
FURTHER = 3


class Sweep(NamedTuple):
    """What a sweep found.

    Attributes:
        rate: the best rate.
        found: the number that decides, by rate; None if the run diverged.
        summaries: of the runs, for their cost.
    """

    rate: float
    found: dict[float, float | None]
    summaries: list[Json]


def sweep(
    context: Context, make_run: Callable[[float], Run], rates: Sequence[float]
) -> Sweep | None:
    """Trains a run at each rate.

    Args:
        context: of the study.
        make_run: a short run at a rate; it is named ``NAME/rate-RATE`` here, and its
            config gets the rate.
        rates: at least one; a single rate is returned untried. While the best is the
            lowest or the highest, half or twice that is tried, too, at most ``FURTHER``
            times.

    Returns:
        The best rate; None if ``--only`` left out a rate whose run is not finished.

    Raises:
        Diverged: if the runs of all rates diverge.
    """
    found: dict[float, float | None] = {}
    if len(rates) == 1:
        return Sweep(rates[0], found, [])
    summaries: list[Json] = []
    lower_is_better = True

    def best() -> float | None:
        kept = {r: v for r, v in found.items() if v is not None and math.isfinite(v)}
        choose = min if lower_is_better else max
        return choose(kept, key=lambda rate: kept[rate], default=None)

    waiting = list(rates)
    while waiting:
        rate = waiting.pop(0)
        run = make_run(rate)
        config: Json = {**run.config, "rate": rate}
        name = f"{run.name}/rate-{rate:g}"
        lower_is_better = not run.higher_is_better
        try:
            trained = context.train(dataclasses.replace(run, name=name, config=config))
        except Diverged as error:
            context.say(str(error))
            found[rate] = None
        else:
            if trained is None:
                return None
            summaries.append(trained.summary)
            found[rate] = trained.summary["best"][run.best]
        if not waiting and len(found) < len(rates) + FURTHER:
            top = best()
            if top is not None and top == max(found):
                waiting.append(top * 2)
            elif top is not None and top == min(found):
                waiting.append(top / 2)
    chosen = best()
    if chosen is None:
        raise Diverged(f"every rate of {', '.join(map(str, rates))} diverges")
    return Sweep(chosen, found, summaries)


class Chosen(NamedTuple):
    """A run at its best rate.

    Attributes:
        trained: the run.
        rate: its rate.
        sweep: the short runs.
        whole: the number that decides of the whole runs, by rate.
        summaries: of all short and whole runs.
    """

    trained: Trained
    rate: float
    sweep: Sweep
    whole: dict[float, float]
    summaries: list[Json]


def train_at_best_rate(
    context: Context,
    make_run: Callable[[float, bool], Run],
    rates: Sequence[float],
) -> Chosen | None:
    """Sweeps, then trains whole runs at the best rate and at the next lower one.

    A rate that is best for short runs may be too high for whole runs.

    Args:
        context: of the study.
        make_run: ``make_run(rate, short)``: a short run for the sweep, or a whole one,
            which is named ``NAME/whole-RATE`` here.
        rates: see :func:`sweep`.

    Returns:
        The better of the two; None if ``--only`` left out a run that is not finished.
    """
    swept = sweep(context, lambda rate: make_run(rate, True), rates)
    if swept is None:
        return None
    lower = [rate for rate in swept.found if rate < swept.rate]
    found: dict[float, Trained] = {}
    for rate in (swept.rate, *sorted(lower)[-1:]):
        run = make_run(rate, False)
        name = f"{run.name}/whole-{rate:g}"
        trained = context.train(dataclasses.replace(run, name=name))
        if trained is not None:
            found[rate] = trained
    if len(found) < 1 + bool(lower):
        return None
    run = make_run(swept.rate, False)
    whole = {rate: trained.summary["best"][run.best] for rate, trained in found.items()}
    choose = max if run.higher_is_better else min
    rate = choose(whole, key=lambda rate: whole[rate])
    summaries = [*swept.summaries, *(t.summary for t in found.values())]
    return Chosen(found[rate], rate, swept, whole, summaries)
