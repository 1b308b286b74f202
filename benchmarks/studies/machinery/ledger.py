"""Summaries of finished runs in one small file, so that they are not repeated."""

import json
from pathlib import Path

from filelock import FileLock

from attnlab._src.files import write_atomically
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import Json, same_run


class Ledger:
    """What a page needs of each finished run, in one line of a file per run.

    These runs need not be trained again where their folders, which hold the models, are
    lost or on another machine.

    Attributes:
        path: path of the file.
    """

    def __init__(self, path: Path):
        """Reads the file, if it exists.

        Raises:
            StudyError: if the file is damaged.
        """
        self.path, self._lines = path, _read(path)

    def find(self, identity: Json, *, any_devices: bool) -> Json | None:
        """The summary of a run, or None if it is not in the file.

        Args:
            identity: as returned by ``Run.identity``.
            any_devices: whether the number of devices may differ.

        Raises:
            StudyError: if the file has a run of that name with another config.
        """
        known = self._lines.get(identity["name"])
        if known is None:
            return None
        found = known["identity"]
        if any_devices:
            found = {**found, "devices": identity["devices"]}
        same_run(found, identity, f"{self.path}: {identity['name']}")
        return known["summary"]

    def keep(self, identity: Json, summary: Json) -> None:
        """Adds a run to the file, or replaces the one of that name.

        Lines that other processes have written meanwhile are kept.

        Raises:
            StudyError: if the file cannot be written to; it is not changed.
        """
        line = {"identity": identity, "summary": summary}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                self._lines = {**_read(self.path), identity["name"]: line}
                lines = [json.dumps(x, allow_nan=False) for x in self._lines.values()]
                write_atomically(self.path, "\n".join([*lines, ""]).encode())
        except OSError as error:
            raise StudyError(
                f"{self.path} cannot be written to ({error.strerror}); the run itself "
                "is kept: make room and continue with --resume"
            ) from error


def _read(path: Path) -> dict[str, Json]:
    """The lines of the file, by name of the run."""
    found: dict[str, Json] = {}
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            found[line["identity"]["name"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path}: line {number} is damaged; correct or remove it"
            ) from error
    return found
