"""Opening checkpoints by path or name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from draftwerk.loading import gguf_checkpoint, hub, hugging_face_directory
from draftwerk.loading.builtin import BUILTIN_MODELS, Progress, resolve_builtin
from draftwerk.loading.checkpoint import AssistantCheckpoint, Checkpoint
from draftwerk.loading.errors import CheckpointError
from draftwerk.loading.gguf import GgufFile
from draftwerk.loading.gguf_config import is_assistant_gguf
from draftwerk.loading.hugging_face_config import ASSISTANT_TYPES


class _Place(NamedTuple):
    path: Path
    name: str | None  # of a model that was asked for by name


def open_checkpoint(model: str | os.PathLike[str], *, progress: Progress | None = None) -> Checkpoint:
    """Opens a model for reading.

    Args:
        model: a GGUF file, a Hugging Face directory, the name of a built-in model, or a name on the Hugging Face hub
            such as ``google/gemma-4-E2B-it``. A path goes first.
        progress: told (bytes done, bytes in all) while a built-in model is put together for the first time.

    Raises:
        CheckpointError: it does not exist, is damaged, or is not supported.
    """
    path, name = _find(model, progress)
    if path.is_dir():
        return hugging_face_directory.open_model(path, name)
    return gguf_checkpoint.open_model(_gguf_path(path), name)


def open_assistant(model: str | os.PathLike[str]) -> AssistantCheckpoint:
    """Opens a multi-token-prediction drafter for reading: a directory, a GGUF file or a name on the hub.

    Raises:
        CheckpointError: it does not exist, is damaged, is not supported, or is no drafter.
    """
    path, name = _find(model, None)
    if path.is_dir():
        return hugging_face_directory.open_drafter(path, name)
    return gguf_checkpoint.open_drafter(_gguf_path(path), name)


def is_assistant(model: str | os.PathLike[str]) -> bool:
    """Whether this is a drafter, by what it says of itself. What is not there or is damaged is none.

    Raises:
        CheckpointError: a name on the hub cannot be resolved.
    """
    name = os.fspath(model)
    try:
        if not (path_exists(name) or hub.is_hub_name(name)):
            return False
    except CheckpointError:
        return False
    path = _find(name, None).path
    try:
        if path.is_dir():
            return hugging_face_directory.read_config(path).get("model_type") in ASSISTANT_TYPES
        return is_assistant_gguf(GgufFile(path))
    except CheckpointError:
        return False


def _gguf_path(path: Path) -> str:
    """The path of what is no directory and so has to be a GGUF file."""
    if path.suffix == ".safetensors":
        raise CheckpointError(path, "is a file of weights, a part of a checkpoint: give its directory")
    return str(path)


def path_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or directory at this path.

    Raises:
        CheckpointError: it is too long, or a directory on the way may not be read.
    """
    try:
        return bool(os.fspath(path)) and Path(path).exists()
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from None


def _find(model: str | os.PathLike[str], progress: Progress | None) -> _Place:
    path = os.fspath(model)
    if "\0" in path:
        raise CheckpointError(path, "is not a path: it holds a NUL")
    if path_exists(path):
        return _Place(Path(path), None)
    if path in BUILTIN_MODELS:
        return _Place(resolve_builtin(path, progress), path)
    if hub.is_hub_name(path):
        return _Place(hub.checkpoint_directory(path), path)
    known = ", ".join(BUILTIN_MODELS)
    raise CheckpointError(path, f"no such file or directory, and not a built-in model ({known})")
