"""What a study is given: options, a place to train, data."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from attnlab._src.bench.timing import Repeats, interleave
from benchmarks.studies.machinery.data.addresses import Addresses, load_addresses
from benchmarks.studies.machinery.data.batches import Batches, Example
from benchmarks.studies.machinery.data.corpus import Corpus, load_corpus
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.ledger import Ledger
from benchmarks.studies.machinery.parallel import make_mesh
from benchmarks.studies.machinery.record import Json
from benchmarks.studies.machinery.step import Step
from benchmarks.studies.machinery.training import (
    Measure,
    Place,
    Run,
    Trained,
    finished,
    train,
)


@dataclasses.dataclass
class Context:
    """What the command line says, and what follows from it.

    Attributes:
        name: of the study.
        out: folder of the results.
        mesh: of devices.
        console: for those who wait.
        quick: tiny sizes, to see that everything runs.
        resume: go on with runs that are there, and do not repeat those that are done.
        only: names of runs, or of groups of them; empty: all.
        pairs: a table of sentence pairs; None: the verses.
        text: a folder of long documents; None: the addresses.
        seen: names of the runs that the study asked for.
        best: of the runs that are done, by name, what their best evaluation found.
    """

    name: str
    out: Path
    mesh: Mesh
    console: Console
    quick: bool = False
    resume: bool = False
    only: Sequence[str] = ()
    pairs: Path | None = None
    text: Path | None = None
    seen: list[str] = dataclasses.field(default_factory=list)
    best: dict[str, Json] = dataclasses.field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of what the study's runs leave."""
        return self.out / "runs" / self.name

    @property
    def ledger(self) -> Ledger:
        """Of the study's runs that are done."""
        return Ledger(self.out / f"{self.name}.runs.jsonl")

    def shared(self, name: str) -> "Context":
        """The same for runs that several studies share."""
        return dataclasses.replace(self, name=name)

    def wants(self, name: str) -> bool:
        """Whether a run, or the group before its ``/``, is asked for."""
        return not self.only or any(
            name == wanted or name.startswith(f"{wanted}/") for wanted in self.only
        )

    def expect_only(self) -> None:
        """To be asked once all runs are known.

        Raises:
            StudyError: if ``--only`` names a run that the study does not have.
        """
        for name in self.only:
            if not any(s == name or s.startswith(f"{name}/") for s in self.seen):
                raise StudyError(
                    f"--only: expected runs of {self.name} "
                    f"({', '.join(self.seen)}), got {name!r}"
                )

    def train(self, run: Run) -> Trained | None:
        """Trains a run, or reads it where it is done and need not be repeated.

        Returns:
            The run; None where ``--only`` leaves it out and it is not done yet.

        Raises:
            StudyError: see ``train``.
        """
        self.seen.append(run.name)
        measure = run.measure
        trained = self._measure(run, measure) if measure else self._train(run)
        if trained is not None:
            self.best[run.name] = trained.summary["best"]
        return trained

    def _measure(self, run: Run, measure: Measure) -> Trained | None:
        """The numbers of a run alone, from the ledger if they are there."""
        # What cannot be kept is better known before hours of training.
        identity, ledger = run.identity(self.mesh), self.ledger
        wanted, summary = self.wants(run.name), None
        if self.resume or not wanted:
            try:
                summary = ledger.find(identity, any_devices=not run.batches_by_devices)
            except StudyError as error:
                if wanted:
                    raise
                self.say(f"{run.name} is left out: {error}")
                return None
        if summary is None:
            trained = self._train(run)
            if trained is None:
                return None
            measured = measure(trained.model, trained.log)
            summary = {**trained.summary, "measured": measured}
            ledger.keep(identity, summary)
        return Trained(summary, None, [])

    def _train(self, run: Run) -> Trained | None:
        place = Place(self.folder / run.name, self.mesh, self.console, self.resume)
        if self.wants(run.name):
            return train(run, place)
        try:
            done = finished(run, place)
        except StudyError as error:
            self.say(f"{run.name} is left out: {error}")
            return None
        return train(run, place._replace(resume=True)) if done else None

    def model(self, run: Run) -> nnx.Module:
        """The model of a run that others begin with.

        The run is trained where it is not done, or where its folder was lost.
        """
        place = Place(self.folder / run.name, self.mesh, self.console, resume=True)
        return train(run, place).model

    def train_all(self, runs: Iterable[Run]) -> dict[str, Trained] | None:
        """Trains runs one after another.

        Returns:
            By name; None where ``--only`` leaves some out that are not done yet.
        """
        found = {run.name: self.train(run) for run in runs}
        done = {name: trained for name, trained in found.items() if trained is not None}
        return done if len(done) == len(found) else None

    def step_seconds(self, runs: Iterable[Run]) -> dict[str, float]:
        """Of a training step of each run, one beside the other: the machine varies.

        Returns:
            Medians, by name of the run.

        Raises:
            StudyError: see :meth:`expect_only`.
        """
        self.expect_only()
        calls = {}
        for run in runs:
            step = Step(run.make_model(), run.loss, run.optimiser, run.seed, self.mesh)
            calls[run.name] = functools.partial(step, run.batch_at(0), 0)
        rounds = Repeats(3, 3) if self.quick else Repeats(7, 7)
        return {name: t.median for name, t in interleave(calls, rounds).items()}

    def corpus(self, **options: Any) -> Corpus:
        """Parallel text: the table of ``--pairs``, or the verses.

        Args:
            **options: as of ``load_corpus``.
        """
        return load_corpus(self.pairs, self.out / "runs", say=self.say, **options)

    def batches(self, examples: Sequence[Example], **options: Any) -> Batches:
        """Batches that the devices can share.

        Args:
            examples: of a corpus.
            **options: as of ``Batches``.
        """
        return Batches(examples, devices=self.mesh.size, **options)

    def dividing(self, rows: int) -> "Context":
        """The same with as many devices as share so many rows evenly.

        What a run learns from must not depend on who trains it.
        """
        mesh = make_mesh(math.gcd(rows, self.mesh.size))
        return dataclasses.replace(self, mesh=mesh)

    def addresses(self, **options: Any) -> Addresses:
        """Long documents: the folder of ``--text``, or the addresses.

        Args:
            **options: as of ``load_addresses``.
        """
        return load_addresses(self.out / "runs", folder=self.text, **options)

    def say(self, message: str) -> None:
        """Tells those who wait."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)
