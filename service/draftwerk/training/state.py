"""States of a training run on disk: whole or not at all, and always one to go on from.

A state is a safetensors file, ``step-00001234.safetensors``; what is not a tensor is JSON in its metadata. The last two
are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from draftwerk.training.atomic_file import atomic_file, remove_leftovers
from draftwerk.training.errors import TrainingError, WriteError

_KEPT = 2
_KEY = "draftwerk"


def save_state(directory: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Writes a state and removes those before the last one.

    Raises:
        WriteError: it cannot be written; the states that were there still are.
    """
    path = directory / f"step-{step:08d}.safetensors"
    contents = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        with atomic_file(path) as file:
            file.write(save(contents, metadata={_KEY: json.dumps(about, sort_keys=True)}))
    except OSError as error:
        kept = _states(directory)
        left = f"{kept[-1].name} is still there" if kept else "there is no earlier state"
        raise WriteError(f"{path}: the state cannot be written ({error.strerror}); {left}", error) from error
    for old in _states(directory)[:-_KEPT]:
        old.unlink()
    return path


def last_step(directory: Path) -> int:
    """The step of the last state; 0 if there is none."""
    found = _states(directory)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors of the last state and what was saved about it; ``None`` if there is none.

    Raises:
        TrainingError: it cannot be read.
    """
    found = _states(directory)
    if not found:
        return None
    try:
        with safetensors.safe_open(found[-1], framework="pt") as file:
            about = json.loads(file.metadata()[_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a mapping)
    except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
        raise TrainingError(
            f"{found[-1]}: the state cannot be read ({error}); remove it to go on from the one before"
        ) from error


def _states(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.safetensors"))
