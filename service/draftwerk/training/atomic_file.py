"""Files that are there as a whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends, and is gone if it ends with an exception.

    Raises:
        OSError: it cannot be written, because the disk is full for instance; `path` is what it was. Names `path`.
    """
    temporary: Path | None = None
    try:
        # Beside the path, so that the rename stays on one file system.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Removes what a process that was killed while it wrote has left in a directory of atomic files."""
    for path in directory.glob(".*.*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Makes a rename last: until then it is in memory only."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
