"""The result of ``check``."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class LawBroken(AssertionError):
    """An object breaks a law of its protocol; the message lists all findings."""


class Finding(NamedTuple):
    """The result for one law.

    Attributes:
        what: the law, in words.
        passed: False if the law is broken.
        note: details; what is wrong if it is broken, the reason if it is skipped.
        skipped: whether the law could not be checked.
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
        findings: the result for each law.
    """

    subject: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {x}" for x in self.findings)])


class Checker:
    """Collects findings; an exception in the check of a law becomes its finding.

    Args:
        subject: what is checked.
    """

    def __init__(self, subject: str):
        self.subject = subject
        self.findings: list[Finding] = []

    @contextlib.contextmanager
    def law(self, what: str, may_refuse: bool = False) -> Iterator[list[str]]:
        """Checks one law: the body asserts it, and may append notes to the list.

        Args:
            what: the law, in words.
            may_refuse: whether ``NotImplementedError`` skips the law, not breaks it.
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
        """Records a law that cannot be checked."""
        self.findings.append(Finding(what, True, why, skipped=True))

    def report(self) -> Report:
        """The findings.

        Raises:
            LawBroken: if a law is broken.
        """
        made = Report(self.subject, tuple(self.findings))
        if not all(x.passed for x in self.findings):
            raise LawBroken(str(made))
        return made
