"""Moves a checkpoint's tensors into the native model, a few megabytes at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from draftwerk import _core
from draftwerk.loading import CheckpointError, open_checkpoint
from draftwerk.requests import EngineFailed

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from draftwerk.loading import AssistantCheckpoint, Checkpoint, TensorView

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes done, bytes in all)."""

WEIGHT_CHOICES = ("auto", "int8", "int4", "fp8", "f32", "f16", "bf16")

_FLOAT_TYPES = {"f32", "f16", "bf16"}
_QUANTISED = {"int8": "q8_0", "int4": "q4_0", "fp8": "f8_e4m3"}
_BLOCK = 32  # values of a row that share a scale, in q8_0 and q4_0
# Bits of a value on a GPU, scales included; every other type becomes bf16 there.
_GPU_BITS = {"q8_0": 8.5, "q4_0": 4.5, "f8_e4m3": 8.0}
_OTHER_GPU_BITS = 16.0
_CHUNK_BYTES = 4 << 20
_SAMPLE_BYTES = 4 << 10
_ROW_GROUP = 16  # the native model repacks whole groups of this many rows
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"  # Gemma's head is tied to it
_PER_LAYER_TABLE = "model.embed_tokens_per_layer.weight"
# Of few parameters, and every one counts: the rest of the layer depends on which experts it chooses.
_ROUTER = ".router.proj.weight"


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
    gpu: _core.Gpu | None = None,
    threads: int = 0,
    max_step_rows: int = 512,
    full_head: bool = False,
    progress: Progress | None = None,
) -> _core.Model:
    """Builds the native model of a checkpoint.

    The file's pages are given back as soon as their rows are repacked, so that the process never holds the weights
    twice. Per-layer embeddings stay where they are, whatever `weights` says: the model reads their rows in the mapped
    file. Only a GPU gets a copy of its own.

    Args:
        weights: "auto" computes in the checkpoint's own types. "int8" quantises float matrices to int8 in blocks of 32
            (GGUF's Q8_0). "int4" quantises those of the layers to int4 (Q4_0), "fp8" to e4m3 with a scale for each row,
            and both the others, the head among them, to int8. All three leave quantised matrices as they are; "f32",
            "f16" and "bf16" convert float matrices. Routers of experts always stay as they are.
        gpu: where it computes; None: on the processor, with so many `threads`.
        full_head: compute every logit of every step, even where the token is the same without.

    Raises:
        CheckpointError: the core does not support the model's sizes.
        ValueError: `weights` does not fit the checkpoint, or a tensor is missing.
        MemoryError: the GPU has too little memory.
        EngineFailed: the GPU has failed.
    """
    _check_choice(weights)
    with _refusals(checkpoint.path):
        model = _core.Model(
            dataclasses.asdict(checkpoint.config), gpu=gpu, threads=threads, max_step_rows=max_step_rows
        )
    tensors = list(checkpoint.tensors())
    _check_memory(model, tensors, weights)
    for table in (tensor for tensor in tensors if tensor.name == _PER_LAYER_TABLE):
        rows, columns = table.shape
        model.map_table(table.name, table.dtype, rows, columns, table.data)
    _upload(model, [tensor for tensor in tensors if tensor.name != _PER_LAYER_TABLE], weights, progress)
    model.finish(full_head)
    return model


def load_assistant(
    checkpoint: AssistantCheckpoint,
    target: Checkpoint,
    model: _core.Model,
    *,
    weights: str = "auto",
    progress: Progress | None = None,
) -> _core.MtpModel:
    """Builds the native drafter of an assistant for a model that it fits (see draftwerk.loading.check_fits).

    The rows of its head lie in the order of its tokens (AssistantCheckpoint.head_token_ids): those of a centroid
    together. A reduced head is made of rows of the target's, in the type that the model keeps them in: the same states
    give the same logits.

    Args:
        target: the checkpoint of the model.
        model: as load_model() built it, with the same `weights`.
        weights: as for load_model().

    Raises:
        CheckpointError: the core does not support the drafter's sizes.
        ValueError: `weights` does not fit the checkpoint.
    """
    _check_choice(weights)
    with _refusals(checkpoint.path):
        drafter = _core.MtpModel(model, dataclasses.asdict(checkpoint.config))
    tensors = list(checkpoint.tensors())
    reduced = checkpoint.config.draft_vocab_size > 0
    if reduced:
        embedding = next(tensor for tensor in target.tensors() if tensor.name == _EMBEDDING)
        tensors.append(dataclasses.replace(embedding, name=_HEAD))
    token_ids = checkpoint.head_token_ids
    _upload(drafter, tensors, weights, progress, token_ids)
    if token_ids is not None:
        drafter.set_indices("draft_token_ids" if reduced else "masked_embedding.token_ordering", token_ids)
    drafter.finish()
    return drafter


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
        kept = len(tensor.shape) == 1 or tensor.name == _PER_LAYER_TABLE
        stored = tensor.dtype if kept else _stored_type(tensor, weights)
        digest.update(json.dumps([tensor.name, tensor.dtype, stored, tensor.shape]).encode())
        digest.update(_sample(tensor))
        tensor.release(0, tensor.nbytes)  # reading a page makes its neighbours resident as well
    return int.from_bytes(digest.digest(), "little")


class _Uploads(Protocol):
    """What a model and a drafter have in common."""

    def create_weight(self, name: str, type: str, rows: int, columns: int) -> None: ...
    def upload_rows(
        self, name: str, first_row: int, source_type: str, rows: int, data: npt.NDArray[np.uint8]
    ) -> None: ...
    def set_vector(self, name: str, values: npt.NDArray[np.float32]) -> None: ...


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Makes a CheckpointError of what the core says about a configuration, and says that it was the GPU that failed."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("model config: "):
            raise CheckpointError(path, str(error)) from None
        raise
    except RuntimeError as error:
        raise EngineFailed(str(error)) from None


def _check_choice(weights: str) -> None:
    if weights not in WEIGHT_CHOICES:
        raise ValueError(f"weights = {weights!r}: must be one of {', '.join(WEIGHT_CHOICES)}")


def _stored_type(tensor: TensorView, weights: str) -> str:
    if weights == "auto" or tensor.name.endswith(_ROUTER):
        return tensor.dtype
    if weights not in _QUANTISED:
        if tensor.dtype not in _FLOAT_TYPES:
            raise ValueError(f"weights = {weights!r}: tensor {tensor.name} is quantised already ({tensor.dtype})")
        return weights
    if tensor.dtype not in _FLOAT_TYPES:
        return tensor.dtype
    stored = _QUANTISED[weights if ".layers." in tensor.name else "int8"]
    if stored != "f8_e4m3" and tensor.shape[1] % _BLOCK:
        raise ValueError(
            f"weights = {weights!r}: tensor {tensor.name} has rows of {tensor.shape[1]} values, "
            f"which is no multiple of {_BLOCK}"
        )
    return stored


def _sample(tensor: TensorView) -> bytes:
    """The first and the last bytes."""
    if len(tensor.shape) == 1:
        first = last = tensor.data
    else:
        rows = -(-_SAMPLE_BYTES // tensor.rows_bytes())
        first = tensor.rows(0, min(rows, tensor.shape[0]))
        last = tensor.rows(max(tensor.shape[0] - rows, 0), tensor.shape[0])
    return first[:_SAMPLE_BYTES].tobytes() + last[-_SAMPLE_BYTES:].tobytes()


def _vector(tensor: TensorView) -> npt.NDArray[np.float32]:
    if tensor.dtype != "f32":
        raise ValueError(f"tensor {tensor.name}: a vector must be f32, not {tensor.dtype}")
    return np.frombuffer(tensor.data, dtype=np.float32)


def _check_memory(model: _core.Model, tensors: Sequence[TensorView], weights: str) -> None:
    """Says before anything is uploaded that a GPU's memory cannot do."""
    if model.memory is None:
        return
    free, total = model.memory
    bits = sum(
        tensor.data.nbytes * 8.0  # as the file has it
        if tensor.name == _PER_LAYER_TABLE
        else math.prod(tensor.shape) * _GPU_BITS.get(_stored_type(tensor, weights), _OTHER_GPU_BITS)
        for tensor in tensors
        if len(tensor.shape) > 1
    )
    if bits / 8 > free:
        raise MemoryError(
            f"the GPU has not enough memory: the weights take {bits / 8e9:.1f} GB, and {free / 1e9:.1f} of its "
            f"{total / 1e9:.1f} GB are free; use narrower weights (--weights int8 or int4) or a larger GPU"
        )


def _upload(
    model: _Uploads,
    tensors: Sequence[TensorView],
    weights: str,
    progress: Progress | None,
    head_token_ids: npt.NDArray[np.int32] | None = None,
) -> None:
    """Uploads all of them; of the head these rows, in this order, if they are given."""
    parts = [(tensor, head_token_ids if tensor.name == _HEAD else None) for tensor in tensors]
    total = sum(_bytes(tensor, rows) for tensor, rows in parts)
    done = 0
    for tensor, rows in parts:
        if len(tensor.shape) == 1:
            model.set_vector(tensor.name, _vector(tensor))
            done += tensor.nbytes
        else:
            for chunk_bytes in _upload_matrix(model, tensor, _stored_type(tensor, weights), rows):
                done += chunk_bytes
                if progress is not None:
                    progress("loading weights", done, total)


def _bytes(tensor: TensorView, rows: npt.NDArray[np.int32] | None) -> int:
    return tensor.nbytes if rows is None else len(rows) * tensor.rows_bytes()


def _upload_matrix(
    model: _Uploads, tensor: TensorView, stored_type: str, chosen: npt.NDArray[np.int32] | None
) -> Iterator[int]:
    """Uploads all rows, or those chosen; yields the bytes of each chunk once it is in the model."""
    rows, columns = tensor.shape
    if chosen is not None:
        rows = len(chosen)
    model.create_weight(tensor.name, stored_type, rows, columns)
    row_bytes = tensor.rows_bytes()
    step = max(1, _CHUNK_BYTES // row_bytes // _ROW_GROUP) * _ROW_GROUP
    for first in range(0, rows, step):
        last = min(first + step, rows)
        data = tensor.rows(first, last) if chosen is None else tensor.rows_at(chosen[first:last])
        model.upload_rows(tensor.name, first, tensor.dtype, last - first, data)
        if chosen is None:
            # From the start: a page shared by two chunks is given back with the second.
            tensor.release(0, last * row_bytes)
        yield (last - first) * row_bytes
    tensor.release(0, tensor.nbytes)
