"""One training run: killed, interrupted or not, it ends with the same numbers."""

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

#: Of what is on disk; another one is another config.
FORMAT = 1

#: ``measure(model, log)``, of a run that is done.
Measure = Callable[[nnx.Module, list[Json]], Json]


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides how a training goes.

    Attributes:
        name: of its folder; a ``/`` makes it one of a group.
        config: JSON, all that tells this run from others: sizes, rates, the data's
            fingerprint. A run on disk is gone on with only if its config is the same.
        make_model: a new model, always the same one, dropout on.
        loss: ``(model, batch, rng) -> (sum of losses, number of target tokens)``.
            Dropout of the model is seeded already; ``rng`` is for anything else.
        batch_at: the batch of a step, a pure function of the step's number.
        optimiser: see ``adam``.
        steps: how many.
        evaluate: numbers of a model whose dropout is off.
        evaluate_every: steps between evaluations, each of which saves a checkpoint.
        best: which of the numbers says what the best checkpoint is.
        higher_is_better: whether it does so by being high.
        seed: of dropout.
        begin: changes a new model before its first step, for instance to parameters
            that another run trained; ``config`` must tell which.
        batches_by_devices: whether their number decides what is in a batch.
        measure: numbers of the best model and the log, for a page that needs no more;
            they are kept, see ``Ledger``. None: the
            page needs the model.
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
        """Names and shapes of the model's, in short."""
        made = nnx.state(nnx.eval_shape(self.make_model), nnx.Param)
        shapes = [(path, x.shape) for path, x in nnx.to_flat_state(made)]
        return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]

    def identity(self, mesh: Mesh) -> Json:
        """What must be the same for a run to be gone on with."""
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
    """A run that reached its end.

    Attributes:
        summary: as ``summary.json`` has it; ``measured`` is what ``Run.measure`` said.
        model: with the parameters of the best evaluation, dropout off; None where
            ``Run.measure`` is there, instead of it.
        log: of every step and evaluation; empty where there is no model.
    """

    summary: Json
    model: Any
    log: list[Json]


class Place(NamedTuple):
    """Where and how a run is trained, which does not change its numbers.

    Attributes:
        folder: of this run alone.
        mesh: of devices.
        console: for those who wait.
        resume: go on with what the folder holds; False: begin anew.
        keep: last checkpoints to keep, besides the best one.
    """

    folder: Path
    mesh: Mesh
    console: Console
    resume: bool = False
    keep: int = 2


def finished(run: Run, place: Place) -> Json | None:
    """The summary of a run that is done already, with the same config."""
    record = Record(place.folder)
    summary = record.summary()
    return summary if summary and record.check(run.identity(place.mesh)) else None


def train(run: Run, place: Place) -> Trained:
    """Trains a run to its end, or reads it where that was done.

    Args:
        run: what is trained.
        place: where.

    Raises:
        StudyError: if there is another run of that name, or the disk is full or
            cannot be written to. What was saved before stays.
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
            f"{run.name}: the best checkpoint is lost: {error}; train the run anew, "
            f"without --resume and with --only {run.name}"
        ) from error
    return Trained(summary, step.model(best.state.params), list(record.lines()))


class _Training:
    """The loop, and what it counts."""

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
        # Programs are compiled again by each process that goes on.
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
                f"is saved; go on with: {resuming()}",
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
    """What numbers were measured on, when, and by which command."""
    return {
        "machine": machine_line(),
        "versions": versions(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": command("studies", sys.argv[1:]),
    }


def resuming() -> str:
    """The command that goes on."""
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    return shlex.join(["python", "-m", "benchmarks.studies", *arguments, "--resume"])
