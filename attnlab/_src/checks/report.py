"""What a check found."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class LawBroken(AssertionError):
    """A class does not keep what its protocol promises; the text says what and how."""


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: the law, in words.
        passed: whether nothing speaks against it.
        note: what was found.
        skipped: whether it could not be looked at, for the reason in the note.
    """

    what: str
    passed: bool
    note: str = ""
    skipped: bool = False

    def __str__(self) -> str:
        mark = "ok    " if self.passed else "BROKEN"
        mark = "skip  " if self.skipped else mark
        return f"{mark}  {self.what}" + (f": {self.note}" if self.note else "")


class Report(NamedTuple):
    """What :func:`attnlab.extend.check` returns; ``str`` of it is a readable list.

    Attributes:
        subject: what was checked.
        findings: everything that was looked at.
    """

    subject: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {x}" for x in self.findings)])


class Checker:
    """Collects findings; an exception of a law is its finding.

    Args:
        subject: what is checked.
    """

    def __init__(self, subject: str):
        self.subject = subject
        self.findings: list[Finding] = []

    @contextlib.contextmanager
    def law(self, what: str, may_refuse: bool = False) -> Iterator[list[str]]:
        """The body asserts; what it appends to the list is the note.

        Args:
            what: the law, in words.
            may_refuse: whether ``NotImplementedError`` is an answer, and no fault.
        """
        notes: list[str] = []
        try:
            yield notes
        except Exception as error:
            if may_refuse and isinstance(error, NotImplementedError):
                self.skip(what, str(error))
                return
            said = str(error).strip() or "no message"
            found = f"{type(error).__name__}: {said}"
            found = said if isinstance(error, AssertionError) else found
            self.findings.append(Finding(what, False, found))
        else:
            self.findings.append(Finding(what, True, "; ".join(notes)))

    def skip(self, what: str, why: str) -> None:
        """Notes a law that cannot be looked at."""
        self.findings.append(Finding(what, True, why, skipped=True))

    def report(self) -> Report:
        """The findings.

        Raises:
            LawBroken: if one of them is bad.
        """
        made = Report(self.subject, tuple(self.findings))
        if not all(x.passed for x in self.findings):
            raise LawBroken(str(made))
        return made
