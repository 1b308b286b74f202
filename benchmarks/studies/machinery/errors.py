"""Errors that the command line reports as a message without a traceback."""


class StudyError(Exception):
    """An error that the user can correct; the message says how."""


class Diverged(StudyError):
    """The loss became infinite or NaN."""


class Interrupted(StudyError):
    """The run was interrupted, after a checkpoint was saved.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
