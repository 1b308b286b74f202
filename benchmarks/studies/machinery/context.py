"""What a study gets: the options of the command line, places to train, data."""

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
from benchmarks.studies.machinery.data.addresses import (
    Addresses,
    Documents,
    load_addresses,
    read_documents,
)
from benchmarks.studies.machinery.data.batches import Batches, Example
from benchmarks.studies.machinery.data.corpus import Corpus, load_corpus, read_pairs
from benchmarks.studies.machinery.data.splits import Split
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
    """The options of a study, and methods that use them.

    Attributes:
        name: name of the study.
        out: folder of the results.
        mesh: devices that share a batch.
        console: for progress and messages.
        quick: use tiny sizes, to test that everything runs.
        resume: continue interrupted runs, and do not repeat finished ones.
        only: names of the runs, or groups of runs, to train; empty: all.
        pairs: file of sentence pairs; None: the Bible verses.
        text: folder of long documents; None: the State of the Union addresses.
        seen: names of the runs that the study asked for.
        best: the best evaluation of each finished run, by name.
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
        """Folder of the study's runs."""
        return self.out / "runs" / self.name

    @property
    def ledger(self) -> Ledger:
        """The ledger of the study's finished runs."""
        return Ledger(self.out / f"{self.name}.runs.jsonl")

    def shared(self, name: str) -> "Context":
        """A context for runs that several studies share.

        Args:
            name: names their folder.
        """
        return dataclasses.replace(self, name=name)

    def wants(self, name: str) -> bool:
        """Whether ``--only`` includes a run, by its name or its group's."""
        return not self.only or any(
            name == wanted or name.startswith(f"{wanted}/") for wanted in self.only
        )

    def expect_only(self) -> None:
        """Checks ``--only``; call it when the study has asked for all its runs.

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
        """Trains a run, or reads a finished one that is not to be repeated.

        Returns:
            The run; None if ``--only`` leaves it out and it is not finished.

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
        """The numbers of a run, without its model; from the ledger if possible."""
        # Read first: a damaged ledger must be reported before hours of training.
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
        """The model of a run that other runs start from.

        The run is trained if it is not finished, or if its folder is lost.
        """
        place = Place(self.folder / run.name, self.mesh, self.console, resume=True)
        return train(run, place).model

    def train_all(self, runs: Iterable[Run]) -> dict[str, Trained] | None:
        """Trains runs one after another.

        Returns:
            The runs by name; None if ``--only`` leaves out unfinished ones.
        """
        found = {run.name: self.train(run) for run in runs}
        done = {name: trained for name, trained in found.items() if trained is not None}
        return done if len(done) == len(found) else None

    def step_seconds(self, runs: Iterable[Run]) -> dict[str, float]:
        """Seconds of a training step of each run, all measured in turns.

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
        """Parallel text: the file of ``--pairs``, or the Bible verses.

        Args:
            **options: options of ``load_corpus``.
        """
        return load_corpus(self.pairs, self.out / "runs", say=self.say, **options)

    def split_pairs(self, **options: Any) -> Split:
        """The pairs of :meth:`corpus`, without a vocabulary.

        Args:
            **options: options of ``read_pairs``.
        """
        return read_pairs(self.pairs, say=self.say, **options)[0]

    def batches(self, examples: Sequence[Example], **options: Any) -> Batches:
        """Batches whose rows the devices share evenly.

        Args:
            examples: tokens of a corpus.
            **options: options of ``Batches``.
        """
        return Batches(examples, devices=self.mesh.size, **options)

    def dividing(self, rows: int) -> "Context":
        """This context with as many devices as can share ``rows`` evenly.

        The data of a run must not depend on the number of devices.
        """
        mesh = make_mesh(math.gcd(rows, self.mesh.size))
        return dataclasses.replace(self, mesh=mesh)

    def addresses(self, **options: Any) -> Addresses:
        """Long documents: the folder of ``--text``, or the addresses.

        Args:
            **options: options of ``load_addresses``.
        """
        return load_addresses(self.out / "runs", folder=self.text, **options)

    def documents(self, **options: Any) -> Documents:
        """The documents of :meth:`addresses`, without a vocabulary.

        Args:
            **options: options of ``read_documents``.
        """
        return read_documents(self.text, **options)

    def say(self, message: str) -> None:
        """Prints a message."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)
