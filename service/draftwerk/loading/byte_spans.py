"""Many short byte strings in one buffer, handled by array operations: a vocabulary has 262,144 of them.

Joined strings stand each behind a `SEPARATOR`, a byte that UTF-8 never uses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from draftwerk.loading.mapped_file import ByteArray

SEPARATOR = b"\xff"

IntArray = npt.NDArray[np.int64]


def gather(data: ByteArray, starts: IntArray, lengths: IntArray) -> ByteArray:
    """``data[starts[i] : starts[i] + lengths[i]]`` for every i, one after the other; all must lie inside ``data``."""
    return data[positions(starts, lengths)]


def positions(starts: IntArray, lengths: IntArray) -> IntArray:
    """The indices ``starts[i]``, ``starts[i] + 1``, ... (``lengths[i]`` of them) for every i."""
    ends = np.cumsum(lengths)
    index = np.repeat(starts - (ends - lengths), lengths)
    index += np.arange(index.size)
    return index


def join(data: ByteArray, starts: IntArray, lengths: IntArray) -> bytes:
    """The strings at these places of ``data``, each behind a separator; each ``starts[i]`` is at least 1.

    Raises:
        ValueError: a string holds a separator, so it is not UTF-8.
    """
    joined = gather(data, starts - 1, lengths + 1)  # with the byte before it, whatever that is
    begins = np.cumsum(lengths + 1) - (lengths + 1)
    joined[begins] = 0
    inside = np.flatnonzero(joined == SEPARATOR[0])
    if inside.size:
        raise ValueError(f"string {int(np.searchsorted(begins, inside[0])) - 1} is not UTF-8")
    joined[begins] = SEPARATOR[0]
    return joined.tobytes()


def split(joined: bytes) -> tuple[ByteArray, IntArray, IntArray]:
    """The bytes of joined strings as an array, and where in it each one starts and how long it is."""
    data = np.frombuffer(joined, dtype=np.uint8)
    separators = np.flatnonzero(data == SEPARATOR[0])
    return data, separators + 1, np.diff(separators, append=data.size) - 1
