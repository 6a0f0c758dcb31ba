"""The errors that training can end in."""

from __future__ import annotations


class TrainingError(Exception):
    """Training cannot start or go on. ``str()`` is one line: what is wrong, with its value, and what would work."""


class WriteError(TrainingError):
    """Something cannot be written, because the disk is full for instance. What was written before it is still there.

    Attributes:
        errno: of the OSError that it is due to.
    """

    def __init__(self, message: str, cause: OSError) -> None:
        super().__init__(message)
        self.errno = cause.errno
