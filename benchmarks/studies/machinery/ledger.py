"""Finished runs in one small file: a table may be filled in several sittings."""

import json
from pathlib import Path

from filelock import FileLock

from attnlab._src.bench.files import write_atomically
from benchmarks.studies.machinery.errors import StudyError
from benchmarks.studies.machinery.record import Json, same_run


class Ledger:
    """What a page needs of each run that is done, a line each; no model is needed.

    Where folders of runs are lost, or were left on another machine, these runs need not
    be trained again.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path):
        """Reads what is there.

        Raises:
            StudyError: if that is not what was written.
        """
        self.path, self._lines = path, _read(path)

    def find(self, identity: Json, *, any_devices: bool) -> Json | None:
        """The summary of a run.

        Args:
            identity: see ``identity``.
            any_devices: whether it counts on however many it was trained.

        Raises:
            StudyError: if there is one of that name with another config.
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
        """Writes a run down, in the place of an earlier one of its name.

        What other processes wrote since the file was read is kept.

        Raises:
            StudyError: if the file cannot be written to; it stays as it was.
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
                "is kept: make room and go on with --resume"
            ) from error


def _read(path: Path) -> dict[str, Json]:
    """By name of the run."""
    found: dict[str, Json] = {}
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            found[line["identity"]["name"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"{path}: line {number} is not what was written there; mend or remove "
                "it"
            ) from error
    return found
