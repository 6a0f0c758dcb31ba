"""The one error that reading a model can end in."""

from __future__ import annotations

import os


class CheckpointError(ValueError):
    """A model that cannot be loaded: a damaged, hostile or unsupported file.

    ``str()`` is one line, ``PATH: tensor NAME: REASON`` or ``PATH: REASON``.

    Attributes:
        path: the file, directory or built-in name at fault.
        tensor: the tensor at fault, or ``None`` when the whole file is.
        reason: what is wrong, and what would be right.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, *, tensor: str | None = None) -> None:
        self.path = os.fspath(path)
        self.tensor = tensor
        self.reason = reason
        where = self.path if tensor is None else f"{self.path}: tensor {printable(tensor)}"
        super().__init__(_one_line(f"{where}: {reason}"))


def printable(text: str, limit: int = 80) -> str:
    """``text`` from an untrusted file, cut to ``limit`` characters and without control characters."""
    shown = text if len(text) <= limit else text[: limit - 3] + "..."
    return _one_line(shown)


def printable_name(name: str) -> str:
    """What a model calls itself, or its file, in a form that terminals, logs and messages of the API can take."""
    return printable(name, 255)  # no file's name is longer


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
