"""Tensors of a checkpoint: where each lies, whether they are those that the configuration asks for, their bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from draftwerk.loading.config import Shapes
from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.gguf import BLOCK_TYPES
from draftwerk.loading.mapped_file import ByteArray, MappedFile

_ELEMENT_SIZES = {"f32": 4, "f16": 2, "bf16": 2}
_FP8 = "f8_e4m3"
_SCALE_BYTES = 4  # float32, in front of every row of _FP8
_NAN = 0x7F  # of e4m3, with either sign


class FileRange(NamedTuple):
    """Bytes of a mapped file."""

    file: MappedFile
    offset: int
    size: int

    def bytes(self) -> ByteArray:
        return self.file.bytes[self.offset : self.offset + self.size]


class RowScales(NamedTuple):
    """What consecutive rows of a matrix are multiplied by: a number for each of them, or one for all."""

    range: FileRange
    dtype: str
    rows: int

    def values(self) -> npt.NDArray[np.float32]:
        """One for each row."""
        return np.broadcast_to(_to_float32(self.range.bytes(), self.dtype), self.rows)


@dataclass(frozen=True)
class Source:
    """Where the bytes of one tensor lie.

    Attributes:
        stored: what its file calls it; of several, what the first one is called.
        dtype: as in :class:`TensorView`.
        shape: slowest dimension first; experts have three.
        ranges: its bytes; where there are several, rows come from each in turn, ``run`` at a time.
        run: see there.
        scales: of the rows of ``f8_e4m3``.
    """

    stored: str
    dtype: str
    shape: tuple[int, ...]
    ranges: tuple[FileRange, ...]
    run: int = 0
    scales: tuple[RowScales, ...] = ()

    @property
    def path(self) -> str:
        """The file that it is in; of several, that of the first one."""
        return self.ranges[0].file.path


@dataclass(frozen=True, eq=False)
class TensorView:
    """One tensor of a checkpoint.

    Attributes:
        name: canonical (Hugging Face) name, e.g. ``model.layers.3.self_attn.q_proj.weight``.
        dtype: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0``, ``q5_0``, ``q4_k``, ``q6_k`` or ``f8_e4m3``, whose rows
            begin with their scale, a float32, wherever the file has it.
        shape: ``(rows, columns)`` or ``(n,)``; the rows of all experts of a layer follow each other.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    _parts: tuple[ByteArray, ...]
    _ranges: tuple[FileRange, ...] = field(default=(), repr=False)  # empty: nothing of it is mapped
    _run: int = field(default=0, repr=False)
    _scales: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return sum(part.size for part in self._parts) + (0 if self._scales is None else self._scales.nbytes)

    @property
    def data(self) -> ByteArray:
        """All bytes, row after row, flat uint8, aligned to the element: a read-only view of the mapped file where the
        rows lie together and aligned there, else a copy. Errors as of :meth:`rows`."""
        return self.rows(0, self._row_count())

    def rows_bytes(self) -> int:
        """Bytes of one row."""
        return self._stored_row_bytes() + (0 if self._scales is None else _SCALE_BYTES)

    def rows(self, first: int, last: int) -> ByteArray:
        """The bytes of the rows ``[first, last)``; see :attr:`data`.

        Raises:
            CheckpointError: ``f8_e4m3`` that is not a number.
        """
        stored = self._stored_rows(first, last)
        return stored if self._scales is None else self._scaled(stored, self._scales[first:last])

    def rows_at(self, indices: npt.NDArray[np.integer]) -> ByteArray:
        """A copy of the bytes of these rows, in this order. Of a tensor whose rows lie together. Errors as of
        :meth:`rows`."""
        stored: ByteArray = self._parts[0].reshape(-1, self._stored_row_bytes())[indices].reshape(-1)
        return stored if self._scales is None else self._scaled(stored, self._scales[indices])

    def _scaled(self, stored: ByteArray, scales: npt.NDArray[np.float32]) -> ByteArray:
        """Rows with their scales in front."""
        values = stored.reshape(len(scales), self.shape[-1])
        if ((values & _NAN) == _NAN).any():
            raise CheckpointError(self._ranges[0].file.path, "holds a value that is not a number", tensor=self.name)
        rows = np.empty((len(scales), self.rows_bytes()), dtype=np.uint8)
        rows[:, :_SCALE_BYTES] = scales.astype("<f4").view(np.uint8).reshape(-1, _SCALE_BYTES)
        rows[:, _SCALE_BYTES:] = values
        return rows.reshape(-1)

    def _stored_row_bytes(self) -> int:
        if self._scales is not None:
            return self.shape[-1]
        block = BLOCK_TYPES[self.dtype]
        return self.shape[-1] // block.block_size * block.block_bytes

    def _stored_rows(self, first: int, last: int) -> ByteArray:
        width = self._stored_row_bytes()
        if len(self._parts) == 1:
            found = self._parts[0][first * width : last * width]
            return found.copy() if found.ctypes.data % _ELEMENT_SIZES.get(self.dtype, 1) else found
        pieces = []
        while first < last:
            turn, row = divmod(first, self._run)
            begin = turn // len(self._parts) * self._run + row
            count = min(self._run - row, last - first)
            pieces.append(self._parts[turn % len(self._parts)][begin * width : (begin + count) * width])
            first += count
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint8)

    def release(self, first_byte: int, last_byte: int) -> None:
        """Drops the resident pages behind ``data[first_byte:last_byte]``: call it with what has been repacked.

        The bytes stay readable (they would be fetched again). Nothing happens for data that is not mapped.
        """
        # Of several parts each has about its share of the bytes, and a page that is dropped too early is fetched again.
        parts = len(self._ranges)
        for part in self._ranges:
            first, last = max(first_byte, 0) // parts, min(-(-last_byte // parts), part.size)
            part.file.release(part.offset + first, part.offset + last)

    def _row_count(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1


class FoundTensors:
    """The tensors that files hold, by canonical name.

    Args:
        path: names the checkpoint where a tensor is missing.
        stored_name: how the files would call a tensor that is missing.
    """

    def __init__(self, path: str, stored_name: Callable[[str], str]) -> None:
        self._path = path
        self._stored_name = stored_name
        self._sources: dict[str, Source] = {}
        self._known: dict[str, Source] = {}  # those that were taken, joined or matched too

    def add(self, name: str, source: Source) -> None:
        """Adds a tensor.

        Raises:
            CheckpointError: there is one of this name already.
        """
        if name in self._sources:
            other = printable(self._sources[name].stored)
            raise CheckpointError(source.path, f"the same tensor as {other}", tensor=source.stored)
        self._sources[name] = self._known[name] = source

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def take(self, name: str) -> Source | None:
        """Removes a tensor; ``None`` if there is none of this name."""
        return self._sources.pop(name, None)

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor another canonical name; it keeps that in the files."""
        self._sources[new] = self._known[new] = self._sources.pop(name)

    def error(self, name: str, reason: str) -> CheckpointError:
        """An error about a tensor, as the files call it."""
        source = self._known.get(name)
        if source is None:
            return CheckpointError(self._path, reason, tensor=self._stored_name(name))
        return CheckpointError(source.path, reason, tensor=source.stored)

    def attach_scales(self) -> None:
        """Gives every matrix of ``f8_e4m3`` the scales that lie beside it as ``NAME_scale``, and leaves out those of
        activations (``MODULE.input_scale``).

        Raises:
            CheckpointError: a matrix has none, or they are of another shape or an unsupported type.
        """
        for name, source in list(self._sources.items()):
            if name.endswith(".input_scale"):
                del self._sources[name]
                continue
            if source.dtype != _FP8:
                continue
            if len(source.shape) != 2:
                raise self.error(name, f"{_FP8} of shape {list(source.shape)} is not supported: only matrices are")
            found = self._sources.get(f"{name}_scale")
            if found is None:
                raise self.error(name, f"is {_FP8}, but {printable(f'{name}_scale')} is missing")
            rows = source.shape[0]
            if found.shape not in ((rows, 1), (1,)):
                raise self.error(f"{name}_scale", f"has shape {list(found.shape)}, neither [{rows}, 1] nor [1]")
            if found.dtype not in _ELEMENT_SIZES:
                raise self.error(f"{name}_scale", f"type {found.dtype} is not supported for scales")
            del self._sources[f"{name}_scale"]
            scales = RowScales(found.ranges[0], found.dtype, rows)
            self._sources[name] = replace(source, scales=(scales,))

    def join_experts(self, names: Sequence[str], experts: int, into: str) -> None:
        """Makes one tensor of matrices, one below the other: as many of each expert.

        Raises:
            CheckpointError: some are missing, or they differ in shape or type.
        """
        matrices: list[Source] = []
        for name in names:
            source = self._sources.get(name)
            if source is None:
                raise self.error(name, "is missing")
            matrices.append(source)
            first = matrices[0]
            if (source.shape, source.dtype) != (first.shape, first.dtype) or len(source.shape) != 2:
                raise self.error(
                    name,
                    f"is {list(source.shape)} of {source.dtype}, but experts must be matrices of one shape and type, "
                    f"as {printable(first.stored)}: {list(first.shape)} of {first.dtype}",
                )
        rows, columns = first.shape
        ranges = tuple(part for source in matrices for part in source.ranges)
        scales = tuple(part for source in matrices for part in source.scales)
        shape = (experts, len(names) // experts * rows, columns)
        self.add(into, Source(first.stored, first.dtype, shape, ranges, rows, scales))
        for name in names:
            del self._sources[name]

    def interleave(self, names: tuple[str, str], run: int, into: str) -> None:
        """Makes one tensor of two: rows from each in turn, ``run`` at a time. Nothing happens where there is neither.

        Raises:
            CheckpointError: there is only one of the two, or they differ in shape or type.
        """
        found = [self._sources.get(name) for name in names]
        if found == [None, None]:
            return
        first, second = found
        if first is None or second is None:
            raise self.error(names[0] if first is None else names[1], "is missing")
        if (first.shape, first.dtype) != (second.shape, second.dtype) or len(first.shape) != 3:
            raise self.error(
                names[1],
                f"is {list(second.shape)} of {second.dtype}, but {printable(first.stored)} is "
                f"{list(first.shape)} of {first.dtype}",
            )
        experts, rows, columns = first.shape
        if rows != run:
            raise self.error(names[0], f"has {rows} rows for each expert, but the configuration asks for {run}")
        for name in names:
            del self._sources[name]
        shape, ranges = (experts, 2 * rows, columns), first.ranges + second.ranges
        self.add(into, Source(first.stored, first.dtype, shape, ranges, run))

    def match(self, expected: Shapes, ignored: Iterable[str], what: str) -> dict[str, Source | None]:
        """The tensors of the model in its own order, each with the shape and a type that the engine reads.

        Args:
            expected: what the configuration asks for.
            ignored: names of tensors that may be there and are left out.
            what: describes the model in errors.

        Returns:
            ``None`` for what may be missing: a layer's scalar, which then is 1.

        Raises:
            CheckpointError: a tensor is missing, or too many, or of another shape or an unsupported type.
        """
        for name in ignored:
            self._sources.pop(name, None)
        for name in self._sources:
            if name not in expected:
                raise self.error(name, f"is not part of this model ({what})")
        matched: dict[str, Source | None] = {}
        for name, shape in expected.items():
            source = self._sources.get(name)
            if source is None:
                if not name.endswith(".layer_scalar"):
                    raise self.error(name, "is missing")
            else:
                if source.shape != shape:
                    raise self.error(
                        name, f"has shape {list(source.shape)}, but the configuration asks for {list(shape)}"
                    )
                supported = _ELEMENT_SIZES if len(shape) == 1 else BLOCK_TYPES
                if source.dtype not in supported and not source.scales:
                    raise self.error(
                        name,
                        f"type {source.dtype} is not supported here (supported: {', '.join(sorted(supported))})",
                    )
            matched[name] = source
        return matched


def views(sources: Mapping[str, Source | None], *, add_one: bool) -> Iterator[TensorView]:
    """Every tensor once.

    Vectors become float32. Matrices are left as the files hold them and are not looked at, but for the scales of rows.

    Args:
        sources: as FoundTensors.match() returns them.
        add_one: vectors are stored as ``w`` and their factor is ``1 + w``.

    Raises:
        CheckpointError: a vector holds a value that is not finite, or scales one that is negative or not finite.
    """
    for name, source in sources.items():
        if source is None:
            yield TensorView(name, "f32", (1,), (np.ones(1, dtype=np.float32).view(np.uint8),))
        elif len(source.shape) == 1:
            factor = _to_float32(source.ranges[0].bytes(), source.dtype)
            if not np.isfinite(factor).all():
                raise CheckpointError(source.path, "holds a value that is not finite", tensor=source.stored)
            factor += np.float32(add_one)
            yield TensorView(name, "f32", source.shape, (factor.view(np.uint8),))
        else:
            shape = (int(np.prod(source.shape[:-1])), source.shape[-1])
            parts = tuple(part.bytes() for part in source.ranges)
            yield TensorView(name, source.dtype, shape, parts, source.ranges, source.run, _row_scales(name, source))


def _row_scales(name: str, source: Source) -> npt.NDArray[np.float32] | None:
    if not source.scales:
        return None
    for part in source.scales:
        values = part.values()
        if not (np.isfinite(values) & (values >= 0)).all():
            raise CheckpointError(part.range.file.path, "has a scale that is negative or not finite", tensor=name)
    return np.concatenate([part.values() for part in source.scales])


def histogram(sources: Mapping[str, Source | None]) -> dict[str, int]:
    """Type name to number of tensors stored so, the most frequent one first."""
    return dict(Counter(source.dtype for source in sources.values() if source is not None).most_common())


def _to_float32(data: ByteArray, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bf16":
        # bfloat16 is the upper half of a float32.
        bits = np.frombuffer(data.tobytes(), dtype="<u2").astype(np.uint32) << np.uint32(16)
        halves: npt.NDArray[np.float32] = bits.view(np.float32)
        return halves
    return np.frombuffer(data.tobytes(), dtype="<f4" if dtype == "f32" else "<f2").astype(np.float32)
