"""Safetensors files: an 8-byte length, a JSON header, the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format. As strict as the reference reader: offsets start at 0, follow
each other without a gap and end with the file.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeGuard

from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.mapped_file import MappedFile

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit
MAX_DIMENSIONS = 8
# safetensors' name: (ours, bits per element). The engine reads the first three; the others may lie beside the text
# model (a vision tower's buffers, say) and are only measured.
DTYPES: dict[str, tuple[str, int]] = {
    "F32": ("f32", 32), "F16": ("f16", 16), "BF16": ("bf16", 16),
    "F64": ("f64", 64), "I64": ("i64", 64), "U64": ("u64", 64), "I32": ("i32", 32), "U32": ("u32", 32),
    "I16": ("i16", 16), "U16": ("u16", 16), "I8": ("i8", 8), "U8": ("u8", 8), "BOOL": ("bool", 8), "C64": ("c64", 64),
    "F8_E4M3": ("f8_e4m3", 8), "F8_E5M2": ("f8_e5m2", 8), "F8_E8M0": ("f8_e8m0", 8), "F4": ("f4", 4),
    "F6_E2M3": ("f6_e2m3", 6), "F6_E3M2": ("f6_e3m2", 6),
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor; its bytes are known to lie inside the file."""

    name: str
    dtype: str  # f32, f16, bf16, i64, ...
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes
    size: int  # bytes


class SafetensorsFile:
    """A parsed safetensors file.

    Attributes:
        file: the mapping; tensors are slices of ``file.bytes``.
        tensors: name to :class:`SafetensorsTensor`, in the order of their bytes.

    Raises:
        CheckpointError: anything about the file is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = MappedFile(path)
        self.path = self.file.path
        self.tensors: dict[str, SafetensorsTensor] = {}
        if self.file.size < 8:
            raise self._error(f"truncated: {self.file.size} bytes are too few for a safetensors header")
        header_size = int.from_bytes(self.file.bytes[:8].tobytes(), "little")
        left = self.file.size - 8
        if header_size > min(left, MAX_HEADER_BYTES):
            raise self._error(
                f"truncated or not a safetensors file: it claims a header of {header_size} bytes "
                f"(at most {min(left, MAX_HEADER_BYTES)} are possible)"
            )
        header = parse_json_object(self.path, self.file.bytes[8 : 8 + header_size].tobytes(), "header")
        header.pop("__metadata__", None)
        self._read_tensors(header, 8 + header_size)

    def _error(self, reason: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(self.path, reason, tensor=tensor)

    def _read_tensors(self, header: dict[str, Any], data_start: int) -> None:
        entries: list[tuple[int, int, str, str, tuple[int, ...]]] = []
        for name, entry in header.items():
            if not isinstance(entry, dict):
                raise self._error("its header entry is not an object", name)
            dtype = entry.get("dtype")
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise self._error(f"unknown dtype {printable(repr(dtype))}", name)
            shape, offsets = entry.get("shape"), entry.get("data_offsets")
            if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
                raise self._error(f"shape {printable(repr(shape))} is not a list of up to {MAX_DIMENSIONS} sizes", name)
            if not _sizes(offsets) or len(offsets) != 2:
                raise self._error(f"data_offsets {printable(repr(offsets))} is not a pair of offsets", name)
            entries.append((offsets[0], offsets[1], name, dtype, tuple(shape)))

        end = 0
        available = self.file.size - data_start
        for first, last, name, dtype, shape in sorted(entries):
            ours, bits = DTYPES[dtype]
            needed = math.prod(shape) * bits
            if first > last or last > available:
                raise self._error(
                    f"data_offsets [{first}, {last}) lie outside the file's {available} bytes of tensor data: "
                    "truncated or corrupt",
                    name,
                )
            if (last - first) * 8 != needed:
                raise self._error(f"{last - first} bytes do not hold {list(shape)} elements of {dtype}", name)
            if first != end:
                raise self._error(f"its bytes start at {first}, but those before it end at {end}", name)
            end = last
            self.tensors[name] = SafetensorsTensor(name, ours, shape, data_start + first, last - first)
        if end != available:
            raise self._error(f"corrupt: {available - end} bytes after the last tensor")


def parse_json_object(path: str, text: bytes, what: str) -> dict[str, Any]:
    """``text`` as a JSON object without duplicate keys; ``path`` and ``what`` name it in errors.

    Raises:
        CheckpointError: it is not UTF-8, not JSON, not an object, nested too deeply, or has a key twice.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(path, f"{what}: key {printable(repr(twice))} appears twice")
        return built

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except CheckpointError:
        raise
    except UnicodeDecodeError:
        raise CheckpointError(path, f"{what} is not UTF-8") from None
    except RecursionError:
        raise CheckpointError(path, f"{what} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(path, f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"{what} is not a JSON object")
    return value


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)
