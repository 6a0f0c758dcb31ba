"""Files that are there as a whole or not at all, whatever happens while they are written; and lines added to a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """An empty file to write to that takes the place of `path` when the block ends, and is gone if it ends with an
    exception.

    Raises:
        OSError: it cannot be written, because the disk is full for instance; `path` is what it was. Names `path`.
    """
    temporary: Path | None = None
    try:
        with _named(path):
            # Beside the path, so that the rename stays on one file system.
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            temporary = Path(name)
            yield temporary
            _sync(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
            temporary = None
            _sync(path.parent)  # the rename is in memory only until then
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """atomic_path(), opened."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file, and brings it to the disk. If a kill cuts it off, it has no end of line.

    Raises:
        OSError: it cannot be written, because the disk is full for instance; nothing of it is there. Names `path`.
    """
    with _named(path):
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(line.encode() + b"\n")
            _sync(path)
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise


def remove_leftovers(directory: Path) -> None:
    """Removes what a process that was killed while it wrote has left in a directory of atomic files."""
    for path in directory.glob(".*.*"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """A write that fails names no file, or a temporary one: what it raises shall name this one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _sync(path: Path) -> None:
    """Brings a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
