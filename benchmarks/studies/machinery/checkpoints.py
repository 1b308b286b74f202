"""Checkpoints of a run with Orbax, written atomically and verified when read."""

import contextlib
import hashlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from attnlab._src.files import write_atomically
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import as_json, read_json

#: The SHA-256 of every file, written last; without it a checkpoint is incomplete.
FILES = "files.json"


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        state: a pytree of host arrays.
        record: JSON: the step, counters, and the best evaluation so far.
    """

    state: Any
    record: dict[str, Any]


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by path: a flat dict can be read without knowing the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences absl's logging: the errors that it reports are raised as StudyError."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, except of ``FILES``."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILES
    }


class Checkpoints:
    """The checkpoints of one run, a folder each; keeps the best and the last few."""

    def __init__(self, folder: Path, keep: int = 2):
        """A folder of checkpoints.

        Args:
            folder: the folder.
            keep: how many of the last checkpoints to keep, besides the best.
        """
        self.folder, self.keep = folder.absolute(), keep
        self._orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def save(self, checkpoint: Checkpoint, best: int) -> None:
        """Writes a checkpoint, then removes those that need not be kept.

        Args:
            checkpoint: its record has the ``step``.
            best: step of the best checkpoint so far, which is kept.

        Raises:
            StudyError: if it cannot be written; earlier ones are unchanged.
        """
        step = checkpoint.record["step"]
        arrays = jax.tree.map(np.asarray, _named(checkpoint.state))
        path = self.folder / str(step)
        try:
            with _quiet():
                self._orbax.save(
                    path,
                    ocp.args.Composite(
                        state=ocp.args.StandardSave(arrays),
                        record=ocp.args.JsonSave(checkpoint.record),
                    ),
                    force=True,
                )
            write_atomically(path / FILES, as_json(_hashes(path)).encode())
        # Tensorstore reports a full disk as a ValueError.
        except (OSError, ValueError) as error:
            raise StudyError(
                f"the checkpoint of step {step} cannot be written to {self.folder} "
                f"({_first_line(error)}); those of steps {self.steps()} are kept: make "
                "room and continue with --resume"
            ) from error
        # Damaged checkpoints of later steps do not count as the last ones.
        before = [s for s in self.steps() if s <= step]
        for old in before[: -self.keep]:
            if old != best:
                shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def load(self, step: int, like: Any) -> Checkpoint:
        """Reads the checkpoint of a step.

        Args:
            step: one of :meth:`steps`.
            like: a pytree of arrays of the same shapes and dtypes.

        Raises:
            StudyError: if it is damaged.
        """
        names = _named(like)
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in names.items()}
        empty = {n: np.zeros(x.shape, x.dtype) for n, x in shapes.items()}
        path = self.folder / str(step)
        expected = read_json(path / FILES)
        if expected is None:
            raise StudyError(f"{path} is damaged (it was not written to the end)")
        found = _hashes(path)
        wrong = [n for n, digest in expected.items() if found.get(n) != digest]
        if wrong:
            raise StudyError(f"{path} is damaged (in {wrong[0]})")
        # Files of another version of Orbax may raise any exception.
        try:
            with _quiet():
                read = self._orbax.restore(
                    path,
                    ocp.args.Composite(
                        state=ocp.args.StandardRestore(empty),
                        record=ocp.args.JsonRestore(),
                    ),
                )
            record = dict(read.record)
            leaves = [np.asarray(read.state[name]) for name in names]
        except Exception as error:
            raise StudyError(f"{path} cannot be read ({_first_line(error)})") from error
        return Checkpoint(jax.tree.unflatten(jax.tree.structure(like), leaves), record)

    def newest(self, like: Any) -> Checkpoint | None:
        """The newest checkpoint that can be read; warns of each that cannot.

        Args:
            like: a pytree of arrays of the same shapes and dtypes.
        """
        for step in reversed(self.steps()):
            try:
                return self.load(step, like)
            except StudyError as error:
                # It is overwritten when its step is reached again.
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
        return None


def room_for(folder: Path, state: Any, checkpoints: int) -> None:
    """Checks that the disk has space for a number of checkpoints of a state.

    Raises:
        StudyError: if it has not.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    needed, free = size * checkpoints, shutil.disk_usage(folder).free
    if free < needed:
        raise StudyError(
            f"{folder}: {checkpoints} checkpoints need {needed / 1e6:,.0f} MB, but "
            f"{free / 1e6:,.0f} MB are free; make room or give another --out"
        )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
