"""GGUF files: header, metadata and tensor directory, each count and length checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Nothing here knows
a model architecture; :mod:`draftwerk.loading.config` and :mod:`draftwerk.loading.checkpoint` do.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from array import array
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from draftwerk.loading import byte_spans
from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.mapped_file import MappedFile

SUPPORTED_VERSIONS = (2, 3)
# Far above any real file; a hostile one is turned away before the reader spends time or memory in proportion.
MAX_METADATA_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = 1 << 10
MAX_STRING_ARRAY = 1 << 22
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[struct.Struct, str]] = {
    0: (struct.Struct("<B"), "<u1"),
    1: (struct.Struct("<b"), "<i1"),
    2: (struct.Struct("<H"), "<u2"),
    3: (struct.Struct("<h"), "<i2"),
    4: (struct.Struct("<I"), "<u4"),
    5: (struct.Struct("<i"), "<i4"),
    6: (struct.Struct("<f"), "<f4"),
    _BOOL: (struct.Struct("<B"), "<u1"),
    10: (struct.Struct("<Q"), "<u8"),
    11: (struct.Struct("<q"), "<i8"),
    12: (struct.Struct("<d"), "<f8"),
}


class BlockType(NamedTuple):
    """A ggml tensor type: ``block_bytes`` hold ``block_size`` consecutive elements of a row."""

    name: str
    block_size: int
    block_bytes: int


TENSOR_TYPES: dict[int, BlockType] = {
    0: BlockType("f32", 1, 4),
    1: BlockType("f16", 1, 2),
    2: BlockType("q4_0", 32, 18),
    6: BlockType("q5_0", 32, 22),
    8: BlockType("q8_0", 32, 34),
    12: BlockType("q4_k", 256, 144),
    14: BlockType("q6_k", 256, 210),
    26: BlockType("i32", 1, 4),
    27: BlockType("i64", 1, 8),
    30: BlockType("bf16", 1, 2),
}
# Those that weights may have.
BLOCK_TYPES: dict[str, BlockType] = {
    block.name: block for block in TENSOR_TYPES.values() if not block.name.startswith("i")
}
# Names of types that exist but that the engine has no kernels for: an error can say which one it was.
_OTHER_TYPES = {
    3: "q4_1", 7: "q5_1", 9: "q8_1", 10: "q2_k", 11: "q3_k", 13: "q5_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs",
    18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16",
    28: "f64", 29: "iq1_m", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4",
    40: "nvfp4", 41: "q1_0",
}  # fmt: skip
# What users choose by: the names that files have of these types and mixtures of them.
_FILES_READ = "BF16, F16, Q8_0, Q6_K, Q4_K_M and Q4_0"


class StringArray:
    """An array of strings left where it lies in the file: only the position of each one is held.

    A vocabulary of 262,144 pieces would take 20 MB as Python objects and is read only once.
    """

    def __init__(self, data: memoryview, starts: array[int]) -> None:
        self._data = data
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        start = self._starts[index]
        (length,) = _LENGTH.unpack_from(self._data, start)
        return bytes(self._data[start + 8 : start + 8 + length])

    def joined(self) -> bytes:
        """All strings, joined as :mod:`draftwerk.loading.byte_spans` does it.

        Raises:
            ValueError: one of them is not UTF-8. (Not all that are not: see there.)
        """
        starts = np.frombuffer(self._starts, dtype=np.int64) + 8
        if starts.size == 0:
            return b""
        # The strings lie back to back: each ends where the length of the next one begins.
        lengths = np.diff(starts, append=starts[-1] + len(self[-1]) + 8) - 8
        return byte_spans.join(np.frombuffer(self._data, dtype=np.uint8), starts, lengths)


Value: TypeAlias = "bool | int | float | str | npt.NDArray[np.generic] | StringArray"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor directory; its bytes are known to lie inside the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # (rows, columns) or (n,): slowest dimension first, the reverse of the file's order
    offset: int  # from the start of the file, in bytes
    size: int  # bytes


class GgufFile:
    """A parsed GGUF file.

    Attributes:
        file: the mapping; tensors are slices of ``file.bytes``.
        version: 2 or 3.
        metadata: key to value; numeric arrays are views of the file.
        tensors: name to :class:`GgufTensor`, in the file's order.

    Raises:
        CheckpointError: anything about the file is wrong or unsupported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = MappedFile(path)
        self.path = self.file.path
        self._data = self.file.view
        self._at = 0
        self._what = "header"

        magic = bytes(self._data[:4])
        if magic != b"GGUF":
            raise self._error(f"not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        self._at = 4
        self.version = self._read(4)
        if self.version not in SUPPORTED_VERSIONS:
            big_endian = int.from_bytes(self.version.to_bytes(4, "little"), "big") in SUPPORTED_VERSIONS
            found = "a big-endian file" if big_endian else f"version {self.version}"
            raise self._error(f"GGUF {found} is not supported (little-endian versions 2 and 3 are)")
        tensor_count = self._read(10)
        key_count = self._read(10)
        # 13 bytes: an empty key, its type, a one-byte value. 32: a name of one byte, one dimension, type and offset.
        self._check_count(key_count, 13, MAX_METADATA_KEYS, "metadata keys")
        self._check_count(tensor_count, 32, MAX_TENSORS, "tensors")

        self.metadata: dict[str, Value] = {}
        for _ in range(key_count):
            self._read_key()
        self.alignment = self._read_alignment()
        self.tensors: dict[str, GgufTensor] = {}
        self._read_tensors(tensor_count)

    def release_directory(self) -> None:
        """Drops the resident pages of header, metadata and directory: they are needed once, and hold the vocabulary."""
        self.file.release(0, self._at)

    # Typed access to the metadata.

    def integer(self, key: str) -> int | None:
        """The integer under ``key``; ``None`` if there is none."""
        value = self.metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self._error(f"metadata {printable(key)} is not an integer")
        return value

    def number(self, key: str) -> float | None:
        """The finite number under ``key``; ``None`` if there is none."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._error(f"metadata {printable(key)} is not a finite number")
        return float(value)

    def string(self, key: str) -> str | None:
        """The string under ``key``; ``None`` if there is none."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self._error(f"metadata {printable(key)} is not a string")
        return value

    def strings(self, key: str) -> StringArray | None:
        """The array of strings under ``key``; ``None`` if there is none."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, StringArray):
            raise self._error(f"metadata {printable(key)} is not an array of strings")
        return value

    def numbers(self, key: str) -> npt.NDArray[np.generic] | None:
        """The numeric array under ``key``, a view of the file; ``None`` if there is none."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise self._error(f"metadata {printable(key)} is not an array of numbers")
        return value

    # Parsing. Each read checks the bytes that are left first.

    def _error(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self.path, reason, tensor=tensor)

    def _take(self, size: int) -> int:
        """Advances over ``size`` bytes and returns where they start."""
        at = self._at
        if size > self.file.size - at:
            raise self._error(
                f"truncated or corrupt: {self._what} at byte {at} needs {size} bytes, {self.file.size - at} are left"
            )
        self._at = at + size
        return at

    def _read(self, value_type: int) -> int:
        scalar = _SCALARS[value_type][0]
        value: int = scalar.unpack_from(self._data, self._take(scalar.size))[0]
        return value

    def _check_count(self, count: int, bytes_each: int, limit: int, what: str) -> None:
        left = self.file.size - self._at
        if count > limit or count * bytes_each > left:
            most = min(limit, left // bytes_each)
            raise self._error(f"truncated or corrupt: it claims {count} {what} (at most {most} are possible)")

    def _read_string(self, limit: int) -> str:
        length = self._read(10)
        if length > limit:
            raise self._error(f"corrupt: {self._what} claims a string of {length} bytes (at most {limit} are accepted)")
        start = self._take(length)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise self._error(f"corrupt: {self._what} holds a string that is not UTF-8") from None

    def _read_key(self) -> None:
        self._what = "metadata key"
        key = self._read_string(MAX_NAME_BYTES)
        if key in self.metadata:
            raise self._error(f"corrupt: metadata {printable(key)} appears twice")
        self._what = f"metadata {printable(key)}"
        value_type = self._read(4)
        if value_type == _STRING:
            self.metadata[key] = self._read_string(MAX_STRING_BYTES)
        elif value_type == _ARRAY:
            self.metadata[key] = self._read_array()
        elif value_type in _SCALARS:
            value = self._read(value_type)
            self.metadata[key] = bool(value) if value_type == _BOOL else value
        else:
            raise self._error(f"corrupt: {self._what} has unknown value type {value_type}")

    def _read_array(self) -> npt.NDArray[np.generic] | StringArray:
        element_type = self._read(4)
        count = self._read(10)
        if element_type in _SCALARS:
            dtype = np.dtype(_SCALARS[element_type][1])
            self._check_count(count, dtype.itemsize, self.file.size, f"elements in {self._what}")
            start = self._take(count * dtype.itemsize)
            elements = self.file.bytes[start : self._at].view(dtype)
            return elements.view(np.bool_) if element_type == _BOOL and bool((elements <= 1).all()) else elements
        if element_type != _STRING:
            kind = "a nested array" if element_type == _ARRAY else f"unknown element type {element_type}"
            raise self._error(f"corrupt or unsupported: {self._what} is {kind}")
        self._check_count(count, 8, MAX_STRING_ARRAY, f"strings in {self._what}")
        starts = array("q", bytes(8 * count))
        data, unpack, size, at = self._data, _LENGTH.unpack_from, self.file.size, self._at
        for i in range(count):
            if at + 8 > size:
                break
            starts[i] = at
            at += 8 + unpack(data, at)[0]
        if at > size or (count and starts[-1] == 0):  # 0: the loop ended early, no string starts there
            raise self._error(f"truncated or corrupt: a string in {self._what} reaches beyond the end of the file")
        self._at = at
        return StringArray(data, starts)

    def _read_alignment(self) -> int:
        alignment = self.integer("general.alignment")
        if alignment is None:
            return DEFAULT_ALIGNMENT
        if not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._error(f"metadata general.alignment is {alignment}, not a power of two up to 65536")
        return alignment

    def _read_tensors(self, count: int) -> None:
        directory: list[tuple[str, BlockType, tuple[int, ...], int, int]] = []
        for index in range(count):
            self._what = f"tensor directory entry {index}"
            name = self._read_string(MAX_NAME_BYTES)
            self._what = f"tensor directory entry {printable(name)}"
            dimension_count = self._read(4)
            if not 1 <= dimension_count <= MAX_DIMENSIONS:
                raise self._error(f"has {dimension_count} dimensions (1 to {MAX_DIMENSIONS} are possible)", name)
            shape = tuple(self._read(10) for _ in range(dimension_count))[::-1]
            type_id = self._read(4)
            offset = self._read(10)
            block = TENSOR_TYPES.get(type_id)
            if block is None:
                supported = ", ".join(sorted(BLOCK_TYPES))
                shown = _OTHER_TYPES.get(type_id, f"number {type_id}")
                raise self._error(
                    f"type {shown} is not supported (supported: {supported}); files called {_FILES_READ} can be read",
                    name,
                )
            elements = math.prod(shape)
            if elements == 0:
                raise self._error(f"has an empty dimension: {list(shape)}", name)
            if shape[-1] % block.block_size:
                raise self._error(f"rows of {shape[-1]} are no multiple of {block.name}'s {block.block_size}", name)
            directory.append((name, block, shape, offset, elements // block.block_size * block.block_bytes))

        data_start = -(-self._at // self.alignment) * self.alignment
        for name, block, shape, offset, size in directory:
            if name in self.tensors:
                raise self._error("appears twice in the tensor directory", name)
            if offset % self.alignment:
                raise self._error(f"offset {offset} is no multiple of the alignment {self.alignment}", name)
            if data_start + offset + size > self.file.size:
                raise self._error(
                    f"its {size} bytes at offset {offset} reach beyond the end of the file "
                    f"({max(self.file.size - data_start, 0)} bytes of tensor data): truncated or corrupt",
                    name,
                )
            self.tensors[name] = GgufTensor(name, block, shape, data_start + offset, size)
        in_order = sorted(self.tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(in_order):
            if before.offset + before.size > after.offset:
                raise self._error(f"overlaps tensor {printable(before.name)}", after.name)
