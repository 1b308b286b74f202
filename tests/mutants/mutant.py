"""The record of a mutant."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A fault in one place.

    Attributes:
        name: a short unique name.
        file: path of the file, relative to ``attnlab/_src``.
        old: text that occurs in the file exactly once.
        new: the text that replaces it.
        fault: a sentence that describes the fault.
        tests: node ids, relative to the repository; at least one of them must fail.
    """

    name: str
    file: str
    old: str
    new: str
    fault: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The text of the file with the fault.

        Raises:
            ValueError: if the old text does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.name}: expected {self.old!r} once in attnlab/_src/{self.file}, "
                f"found it {count} times"
            )
        return text.replace(self.old, self.new)
