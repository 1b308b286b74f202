"""What a mutant is."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """A fault in one place.

    Attributes:
        name: short, one of its own.
        file: the file, from the folder ``attnlab/_src`` on.
        old: text that occurs in it exactly once.
        new: what takes its place.
        fault: a sentence: what is wrong then.
        tests: node ids, from the repository on; one of them must fail.
    """

    name: str
    file: str
    old: str
    new: str
    fault: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: if the old text does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(
                f"{self.name}: expected {self.old!r} once in attnlab/_src/{self.file}, "
                f"found it {count} times"
            )
        return text.replace(self.old, self.new)
