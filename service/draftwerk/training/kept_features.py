"""What the target computed of a batch, kept on disk for the rounds in which the batch comes again.

A batch is computed once and read as often as it comes again; on a processor computing it is a fifth of the training.
On a GPU computing is faster than a disk, and nothing is kept.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from draftwerk.training.atomic_file import atomic_file, remove_leftovers
from draftwerk.training.target import Features, FrozenTarget

_MOST_BYTES = 8 << 30


class KeptFeatures:
    """Gives what :meth:`FrozenTarget.features` does, bit by bit.

    Args:
        target: that computes.
        directory: where to keep things, files of one target only; made if need be. Nothing else depends on it: it may
            be removed at any time, and a full disk costs nothing but time.
        most_bytes: that may lie there; what comes later is not kept.
    """

    def __init__(self, target: FrozenTarget, directory: Path, most_bytes: int = _MOST_BYTES) -> None:
        self._target = target
        self._directory = directory
        self._keeps = target.device.type == "cpu"
        self._most_bytes = most_bytes if self._keeps else 0
        remove_leftovers(directory)
        self._bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))

    def features(self, token_ids: Tensor) -> Features:
        """States, keys and values of a batch [B, T]."""
        digest = hashlib.blake2b(repr(tuple(token_ids.shape)).encode(), digest_size=16)
        digest.update(token_ids.cpu().numpy().tobytes())
        path = self._directory / f"{digest.hexdigest()}.safetensors"
        kept = _read(path) if self._keeps else None
        if kept is not None:
            return kept
        features = self._target.features(token_ids)
        if self._bytes < self._most_bytes:
            self._keep(path, features)
        return features

    def forget(self) -> None:
        """Removes what is kept, and keeps nothing more."""
        self._most_bytes = 0
        shutil.rmtree(self._directory, ignore_errors=True)

    def _keep(self, path: Path, features: Features) -> None:
        tensors = {"states": features.states}
        for kind in features.keys:
            tensors |= {f"keys.{kind}": features.keys[kind], f"values.{kind}": features.values[kind]}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
            self._bytes += path.stat().st_size
        except OSError:
            self.forget()  # the disk is full, or the like: states and drafter need the room


def _read(path: Path) -> Features | None:
    try:
        tensors = load_file(path)
        states = tensors.pop("states")
    except (OSError, safetensors.SafetensorError, KeyError):
        return None  # not there, or not readable: computed again, and replaced
    keys = {name.removeprefix("keys."): tensor for name, tensor in tensors.items() if name.startswith("keys.")}
    values = {name.removeprefix("values."): tensor for name, tensor in tensors.items() if name.startswith("values.")}
    return Features(states, keys, values)
