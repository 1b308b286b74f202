"""The files of a run: its config, a log of its steps, and a summary at the end."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab._src.files import write_atomically
from benchmarks.studies.machinery.errors import StudyError

Json = dict[str, Any]


def as_json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def fingerprint(*trees: Any) -> str:
    """A hash of every array in ``trees``, for the config of a run."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        secret = jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if secret else leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def same_run(found: Json, identity: Json, where: str) -> None:
    """Checks that a run on disk is the run that is wanted.

    Args:
        found: the identity of the run on disk.
        identity: the identity that is wanted.
        where: the place of the run on disk, for the message.

    Raises:
        StudyError: if they differ.
    """
    wanted = json.loads(as_json(identity))
    if found == wanted:
        return
    changed = list(_differences(found, wanted))
    differences = "; ".join(
        f"{name} was {_short(old)}, is {_short(new)}" for name, old, new in changed
    )
    if [name for name, *_ in changed] == ["devices"]:
        # Another number of devices sums in another order: not the same bits.
        remedy = f"give --devices {found['devices']} to continue it"
    else:
        remedy = "run without --resume to train it anew, or give another --out"
    raise StudyError(f"{where} holds a run of another config ({differences}); {remedy}")


def gradient_norm(log: Iterable[Json], share: float) -> float:
    """Median gradient norm over a share of the steps of a run.

    Args:
        log: lines of the run's log.
        share: 0.1: the first tenth of the steps; -0.1: the last tenth.
    """
    norms = [line["gradient_norm"] for line in log if "gradient_norm" in line]
    count = max(int(abs(share) * len(norms)), 1)
    return float(np.median(norms[:count] if share > 0 else norms[-count:]))


class Record:
    """The folder of one run.

    Attributes:
        folder: folder of the run.
        log: path of the log: JSON lines, one for each step and each evaluation.
    """

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log.jsonl"
        self._file: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    def begin(self, identity: Json) -> None:
        """Starts a new run; the files of an earlier run of this name are removed.

        Raises:
            StudyError: if the folder cannot be written to.
        """
        try:
            # The config first: without it the other files are ignored.
            (self.folder / "config.json").unlink(missing_ok=True)
            (self.folder / "summary.json").unlink(missing_ok=True)
            self.log.unlink(missing_ok=True)
            if self.checkpoints.is_dir():
                shutil.rmtree(self.checkpoints)
            write_atomically(self.folder / "config.json", as_json(identity).encode())
        except OSError as error:
            raise StudyError(
                f"{self.folder} cannot be written to ({error.strerror}); give another "
                "--out"
            ) from error

    def check(self, identity: Json) -> bool:
        """Whether the folder has a run that can be continued.

        Raises:
            StudyError: if it has a run with another config.
        """
        found = read_json(self.folder / "config.json")
        if found is None:
            return False
        same_run(found, identity, str(self.folder))
        return True

    def summary(self) -> Json | None:
        """The summary of a finished run; None if it is not finished."""
        return read_json(self.folder / "summary.json")

    def finish(self, summary: Json) -> None:
        """Writes the summary, which marks the run as finished."""
        self.close()
        self._guard(
            lambda: write_atomically(
                self.folder / "summary.json", as_json(summary).encode()
            )
        )

    def open(self, step: int) -> None:
        """Opens the log to continue it; lines of later steps are removed.

        Args:
            step: number of steps that are done.
        """
        kept = [json.dumps(line) for line in self.lines() if line["step"] <= step]
        text = "".join(line + "\n" for line in kept)
        self._guard(lambda: write_atomically(self.log, text.encode()))
        self._file = self.log.open("a")

    def write(self, line: Json) -> None:
        """Adds a line to the log, and flushes it."""
        if self._file is None:
            raise ValueError("the log is not open")
        file = self._file
        text = json.dumps(line, allow_nan=False) + "\n"
        self._guard(lambda: (file.write(text), file.flush()))

    def close(self) -> None:
        """Closes the log."""
        if self._file is not None:
            file, self._file = self._file, None
            self._guard(file.close)

    def lines(self) -> Iterator[Json]:
        """The lines of the log; an incomplete last line is left out."""
        if not self.log.exists():
            return
        for text in self.log.read_text(errors="replace").splitlines():
            try:
                yield json.loads(text)
            except ValueError:
                return

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise StudyError(
                f"{self.folder} cannot be written to ({error.strerror}); what is in "
                f"{self.checkpoints} is kept: make room and continue with --resume"
            ) from error


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            below = f"{name}.{key}" if name else key
            yield from _differences(old.get(key), new.get(key), below)
    elif old != new:
        yield name, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
