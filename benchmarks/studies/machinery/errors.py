"""What a study ends with: messages for whoever started it, never a traceback."""


class StudyError(Exception):
    """Something that the user can put right; the message says how."""


class Diverged(StudyError):
    """The loss is no number any more."""


class Interrupted(StudyError):
    """Someone asked to stop; what was trained is kept.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal
