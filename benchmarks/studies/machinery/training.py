"""One training run; interrupted and resumed, it gives the same numbers."""

import dataclasses
import datetime as dt
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from attnlab._src.bench.machine import machine_line, versions
from benchmarks.common import command
from benchmarks.studies.machinery.checkpoints import Checkpoint, Checkpoints, room_for
from benchmarks.studies.machinery.errors import Diverged, Interrupted, StudyError
from benchmarks.studies.machinery.interrupts import Interrupts
from benchmarks.studies.machinery.losses import Loss
from benchmarks.studies.machinery.optimisers import Optimiser
from benchmarks.studies.machinery.progress import Bar
from benchmarks.studies.machinery.record import Json, Record
from benchmarks.studies.machinery.step import State, Step

#: Version of the files on disk; runs of another version are not continued.
FORMAT = 1

#: ``measure(model, log)``: numbers of a finished run.
Measure = Callable[[nnx.Module, list[Json]], Json]


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that affects the result of a training run.

    Attributes:
        name: name of its folder; ``GROUP/NAME`` makes it part of a group.
        config: JSON, what distinguishes this run from others: sizes, rates, the data's
            fingerprint. A run on disk is continued only if its config is the same.
        make_model: makes the untrained model, always the same one, with dropout on.
        loss: ``(model, batch, rng) -> (sum of losses, number of target tokens)``.
            The model's dropout is seeded already; ``rng`` is for other random numbers.
        batch_at: the batch of a step, a pure function of the step's number.
        optimiser: see ``adam``.
        steps: number of updates.
        evaluate: returns numbers, by name, of a model with dropout off.
        evaluate_every: steps between evaluations, each of which saves a checkpoint.
        best: name of the number that determines the best checkpoint.
        higher_is_better: whether a higher number is better.
        seed: seed of dropout.
        begin: changes a new model before its first step, for instance copies the
            parameters of another run, which ``config`` must identify.
        batches_by_devices: whether the batches depend on the number of devices.
        measure: computes numbers from the best model and the log, which are kept in
            the ``Ledger``, for a page that needs no model. None: the page needs it.
    """

    name: str
    config: Json
    make_model: Callable[[], nnx.Module]
    loss: Loss
    batch_at: Callable[[int], Any]
    optimiser: Optimiser
    steps: int
    evaluate: Callable[[nnx.Module], dict[str, float]]
    evaluate_every: int
    best: str = "loss"
    higher_is_better: bool = False
    seed: int = 0
    begin: Callable[[nnx.Module], None] | None = None
    batches_by_devices: bool = False
    measure: Measure | None = None

    def parameters(self) -> str:
        """A hash of the names and shapes of the model's parameters."""
        made = nnx.state(nnx.eval_shape(self.make_model), nnx.Param)
        shapes = [(path, x.shape) for path, x in nnx.to_flat_state(made)]
        return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]

    def identity(self, mesh: Mesh) -> Json:
        """A run on disk is continued only if all of this is the same."""
        return {
            "format": FORMAT,
            "name": self.name,
            "config": self.config,
            "steps": self.steps,
            "evaluate_every": self.evaluate_every,
            "best": self.best,
            "higher_is_better": self.higher_is_better,
            "optimiser": self.optimiser.settings,
            "parameters": self.parameters(),
            "seed": self.seed,
            "devices": mesh.size,
        }


class Trained(NamedTuple):
    """A finished run.

    Attributes:
        summary: content of ``summary.json``; ``measured`` is from ``Run.measure``.
        model: with the parameters of the best evaluation, dropout off; None if the run
            has a ``measure``.
        log: lines of every step and evaluation; empty if there is no model.
    """

    summary: Json
    model: Any
    log: list[Json]


class Place(NamedTuple):
    """Where a run is trained; none of it changes the numbers, rounding excepted.

    Attributes:
        folder: folder of this run.
        mesh: devices that share a batch.
        console: for progress and messages.
        resume: True: continue the run in the folder; False: start anew.
        keep: how many of the last checkpoints to keep, besides the best.
    """

    folder: Path
    mesh: Mesh
    console: Console
    resume: bool = False
    keep: int = 2


def finished(run: Run, place: Place) -> Json | None:
    """The summary of a finished run of the same config; None if not finished."""
    record = Record(place.folder)
    summary = record.summary()
    return summary if summary and record.check(run.identity(place.mesh)) else None


def train(run: Run, place: Place) -> Trained:
    """Trains a run to its end, or reads it if it is finished.

    Args:
        run: the run.
        place: where it is trained.

    Raises:
        StudyError: if there is another run of that name, or the disk is full or
            cannot be written to. Earlier checkpoints are kept.
        Diverged: if the loss becomes infinite or NaN.
        Interrupted: on Ctrl-C, after a checkpoint.
    """
    record, identity = Record(place.folder), run.identity(place.mesh)
    checkpoints = Checkpoints(record.checkpoints, place.keep)
    if not (place.resume and record.check(identity)):
        record.begin(identity)
    model, summary = run.make_model(), record.summary()
    if summary is None and run.begin is not None:
        run.begin(model)
    step = Step(model, run.loss, run.optimiser, run.seed, place.mesh)
    if summary is None:
        room_for(place.folder, step.state, place.keep + 2)
        try:
            summary = _Training(run, step, record, checkpoints, place.console).run()
        finally:
            record.close()
    try:
        best = checkpoints.load(summary["best"]["step"], step.state)
    except StudyError as error:
        raise StudyError(
            f"{run.name}: the best checkpoint cannot be read: {error}; train the run "
            f"anew, without --resume and with --only {run.name}"
        ) from error
    return Trained(summary, step.model(best.state.params), list(record.lines()))


class _Training:
    """The training loop and its counters."""

    def __init__(
        self,
        run: Run,
        step: Step,
        record: Record,
        checkpoints: Checkpoints,
        console: Console,
    ):
        self._run, self._step, self._record = run, step, record
        self._checkpoints, self._console = checkpoints, console
        self._counts: Json = {"step": 0, "tokens": 0, "seconds": 0.0, "best": None}
        self._counts["compile_seconds"] = 0.0

    def run(self) -> Json:
        run, counts = self._run, self._counts
        saved = self._checkpoints.newest(self._step.state)
        if saved is not None:
            self._step.restore(saved.state)
            counts |= saved.record
        self._record.open(-1 if saved is None else counts["step"])
        # Each process that continues a run compiles again.
        compiled_before = counts["compile_seconds"]
        bar = Bar(run.name, counts["step"], run.steps, self._console)
        with Interrupts() as interrupts, bar:
            if saved is None:
                self._evaluate(bar)
            while counts["step"] < run.steps:
                self._do_step(bar)
                seconds = self._step.compile_seconds
                counts["compile_seconds"] = compiled_before + seconds
                done = counts["step"]
                if done % run.evaluate_every == 0 or done == run.steps:
                    self._evaluate(bar)
                elif interrupts.seen is not None:
                    self._save()
                if interrupts.seen is not None:
                    break
        done, summary = counts["step"], self._summary()
        if done == run.steps:
            self._record.finish(summary)
        if interrupts.seen is not None:
            raise Interrupted(
                f"{run.name}: interrupted after step {done:,} of {run.steps:,}, which "
                f"is saved; continue with: {resuming()}",
                interrupts.seen,
            )
        return summary

    def _do_step(self, bar: Bar) -> None:
        run, counts = self._run, self._counts
        number = counts["step"]
        started, compiled = time.perf_counter(), self._step.compile_seconds
        measured = self._step(run.batch_at(number), number)
        elapsed = time.perf_counter() - started
        seconds = elapsed - (self._step.compile_seconds - compiled)
        loss, tokens = float(measured.loss), int(measured.tokens)
        counts["step"] = number + 1
        counts["tokens"] += tokens
        counts["seconds"] += seconds
        if not (math.isfinite(loss) and math.isfinite(measured.gradient_norm)):
            raise Diverged(
                f"{run.name}: the loss is {loss} at step {number + 1:,} (gradient norm "
                f"{float(measured.gradient_norm)}); a lower learning rate or a longer "
                "warm-up may help"
            )
        self._record.write({
            "step": number + 1,
            "loss": loss,
            "gradient_norm": float(measured.gradient_norm),
            "learning_rate": float(measured.learning_rate),
            "tokens": counts["tokens"],
            "tokens_per_second": tokens / seconds,
        })
        bar.step(number + 1, loss, tokens / seconds)

    def _evaluate(self, bar: Bar) -> None:
        run, counts = self._run, self._counts
        numbers = {n: float(v) for n, v in run.evaluate(self._step.model()).items()}
        if run.best not in numbers:
            raise StudyError(
                f"{run.name}: best: expected one of {', '.join(numbers)}, which is "
                f"what evaluate returns, got {run.best!r}"
            )
        if not all(map(math.isfinite, numbers.values())):
            raise Diverged(
                f"{run.name}: the evaluation after step {counts['step']:,} is {numbers}"
            )
        self._record.write({"step": counts["step"], "evaluation": numbers})
        bar.say(counts["step"], numbers, self._rate())
        best = counts["best"]
        sign = -1 if run.higher_is_better else 1
        if best is None or sign * numbers[run.best] < sign * best[run.best]:
            counts["best"] = {"step": counts["step"], **numbers}
        counts["last"] = {"step": counts["step"], **numbers}
        self._save()

    def _save(self) -> None:
        state: State = jax.device_get(self._step.state)
        room_for(self._record.folder, state, 1)
        self._checkpoints.save(
            Checkpoint(state, dict(self._counts)), self._counts["best"]["step"]
        )

    def _rate(self) -> float:
        return self._counts["tokens"] / max(self._counts["seconds"], 1e-9)

    def _summary(self) -> Json:
        counts, params = self._counts, self._step.state.params
        return {
            "name": self._run.name,
            "config": json.loads(json.dumps(self._run.config)),
            "steps": counts["step"],
            "seed": self._run.seed,
            "best": counts["best"],
            "last": counts["last"],
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "tokens": counts["tokens"],
            "seconds": counts["seconds"],
            "compile_seconds": counts["compile_seconds"],
            "tokens_per_second": self._rate(),
            "devices": self._step.devices,
            **surroundings(),
        }


def surroundings() -> Json:
    """Machine, versions, date and command of a measurement."""
    return {
        "machine": machine_line(),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": command("studies", sys.argv[1:]),
    }


def resuming() -> str:
    """The command that continues this one."""
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    return shlex.join(["python", "-m", "benchmarks.studies", *arguments, "--resume"])
