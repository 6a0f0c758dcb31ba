"""A read-only memory mapping of a checkpoint file whose pages can be given back while weights are repacked."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from draftwerk.loading.errors import CheckpointError

ByteArray: TypeAlias = npt.NDArray[np.uint8]


class MappedFile:
    """The bytes of ``path``, mapped read-only. Arrays taken from it keep the mapping alive.

    Raises:
        CheckpointError: the file does not exist, cannot be read, is empty or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            # Checked before opening: opening a FIFO would wait for a writer for ever.
            if not stat.S_ISREG(Path(self.path).stat().st_mode):
                raise CheckpointError(self.path, "not a regular file")
            with Path(self.path).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise CheckpointError(self.path, "the file is empty")
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(self.path, error.strerror or str(error)) from error
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(self.path, f"cannot be opened: {error}") from error
        self.size = len(self._map)
        self.view = memoryview(self._map)
        self.bytes: ByteArray = np.frombuffer(self._map, dtype=np.uint8)

    def release(self, first: int, last: int) -> None:
        """Drops the resident pages that hold file bytes ``[first, last)``; reading them again fetches them again.

        The range is rounded outwards to whole pages, so that back-to-back ranges leave no page behind; a neighbour
        that shares a page merely faults it in once more.
        """
        first = max(first, 0) // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(last, self.size)
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
