"""Moves a checkpoint's tensors into the native model, a few megabytes at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from draftwerk import _core
from draftwerk.loading import CheckpointError, open_checkpoint

if TYPE_CHECKING:
    import os

    from draftwerk.loading import Checkpoint, TensorView

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""

WEIGHT_CHOICES = ("auto", "int8", "f32", "f16", "bf16")

_FLOAT_TYPES = {"f32", "f16", "bf16"}
_CHUNK_BYTES = 4 << 20
_SAMPLE_BYTES = 4 << 10
_ROW_GROUP = 16  # the native model repacks whole groups of this many rows


def open_model(model: str | os.PathLike[str], progress: Progress | None = None) -> Checkpoint:
    """Opens a checkpoint, reporting to `progress` if a built-in model has to be put together first."""
    if progress is None:
        return open_checkpoint(model)
    report = progress
    return open_checkpoint(model, progress=lambda done, total: report("preparing the built-in model", done, total))


def load_model(
    checkpoint: Checkpoint,
    *,
    weights: str = "auto",
    threads: int = 0,
    max_step_rows: int = 512,
    progress: Progress | None = None,
) -> _core.Model:
    """Builds the native model of a checkpoint.

    The file's pages are given back as soon as their rows are repacked, so that the process never holds the weights
    twice.

    Args:
        weights: "auto" computes in the checkpoint's own types. "int8" quantises float matrices to int8 in blocks of 32
            (GGUF's Q8_0) and leaves quantised ones as they are; "f32", "f16" and "bf16" convert float matrices.

    Raises:
        CheckpointError: the core does not support the model's sizes.
        ValueError: `weights` does not fit the checkpoint, or a tensor is missing.
    """
    if weights not in WEIGHT_CHOICES:
        raise ValueError(f"weights = {weights!r}: must be one of {', '.join(WEIGHT_CHOICES)}")
    try:
        model = _core.Model(dataclasses.asdict(checkpoint.config), threads=threads, max_step_rows=max_step_rows)
    except ValueError as error:
        if str(error).startswith("model config: "):
            raise CheckpointError(checkpoint.path, str(error)) from None
        raise
    tensors = list(checkpoint.tensors())
    total = sum(tensor.data.nbytes for tensor in tensors)
    done = 0
    for tensor in tensors:
        if len(tensor.shape) == 1:
            model.set_vector(tensor.name, _vector(tensor))
            done += tensor.data.nbytes
        else:
            for chunk_bytes in _upload_matrix(model, tensor, _stored_type(tensor, weights)):
                done += chunk_bytes
                if progress is not None:
                    progress("loading weights", done, total)
    model.finish()
    return model


def fingerprint(checkpoint: Checkpoint, weights: str, arithmetic: str) -> int:
    """64 bits that identify a model as it computes, whatever its file is called.

    Of the configuration, the end tokens, the arithmetic, and of each tensor name, shape, types, and the first and last
    4 KiB. No more of the file is read: a change in the middle of a tensor alone is not seen.

    Args:
        weights: as for load_model().
        arithmetic: the backend and its instruction set, such as "cpu avx512": others round differently.
    """
    digest = hashlib.blake2b(digest_size=8)
    about = {
        "config": dataclasses.asdict(checkpoint.config),
        "end_token_ids": list(checkpoint.eos_token_ids),
        "arithmetic": arithmetic,
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for tensor in checkpoint.tensors():
        vector = len(tensor.shape) == 1
        stored = tensor.dtype if vector else _stored_type(tensor, weights)
        digest.update(json.dumps([tensor.name, tensor.dtype, stored, tensor.shape]).encode())
        digest.update(tensor.data[:_SAMPLE_BYTES].tobytes() + tensor.data[-_SAMPLE_BYTES:].tobytes())
        tensor.release(0, tensor.data.nbytes)  # reading a page makes its neighbours resident as well
    return int.from_bytes(digest.digest(), "little")


def _stored_type(tensor: TensorView, weights: str) -> str:
    if weights == "auto":
        return tensor.dtype
    if weights == "int8":
        return "q8_0" if tensor.dtype in _FLOAT_TYPES else tensor.dtype
    if tensor.dtype not in _FLOAT_TYPES:
        raise ValueError(f"weights = {weights!r}: tensor {tensor.name} is quantised already ({tensor.dtype})")
    return weights


def _vector(tensor: TensorView) -> npt.NDArray[np.float32]:
    if tensor.dtype != "f32":
        raise ValueError(f"tensor {tensor.name}: a vector must be f32, not {tensor.dtype}")
    return np.frombuffer(tensor.data, dtype=np.float32)


def _upload_matrix(model: _core.Model, tensor: TensorView, stored_type: str) -> Iterator[int]:
    """Uploads all rows; yields the bytes of each chunk once it is in the model."""
    rows, columns = tensor.shape
    model.create_weight(tensor.name, stored_type, rows, columns)
    row_bytes = tensor.data.nbytes // rows
    step = max(1, _CHUNK_BYTES // row_bytes // _ROW_GROUP) * _ROW_GROUP
    for first in range(0, rows, step):
        count = min(step, rows - first)
        begin, end = first * row_bytes, (first + count) * row_bytes
        model.upload_rows(tensor.name, first, tensor.dtype, count, tensor.data[begin:end])
        tensor.release(0, end)  # from the start: a page shared by two chunks is given back with the second
        yield end - begin
