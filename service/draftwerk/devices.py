"""Where a model computes: on the processor or on a GPU."""

from __future__ import annotations

import importlib
import logging
import os
import re
from pathlib import Path

from draftwerk import _core

LIBRARY_VARIABLE = "DRAFTWERK_CUDA_LIBRARY"
"""Environment variable: the file of the CUDA backend, if it is not that of the package draftwerk-cuda."""

_PACKAGE = "draftwerk_cuda"

_log = logging.getLogger(__name__)


class DeviceError(ValueError):
    """A device that is not there, or cannot be used."""


def find_gpu(device: str) -> _core.Gpu | None:
    """The GPU that a device stands for; ``None``: the processor.

    Args:
        device: "cpu"; "cuda" (the first GPU) or "cuda:N"; "auto" (the first GPU if there is one, else the processor).

    Raises:
        DeviceError: there is no such device, or it cannot be used; says why, and what would work.
    """
    if device == "cpu":
        return None
    if device == "auto":
        try:
            return _gpus()[0]
        except DeviceError as error:
            _log.debug("computing on the processor: %s", error)
            return None
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise DeviceError(f"device = {device!r}: must be auto, cpu, cuda or cuda:N")
    number = int(match[1] or 0)
    gpus = _gpus()
    if number >= len(gpus):
        there = ", ".join(f"cuda:{gpu.number} ({gpu.name})" for gpu in gpus)
        raise DeviceError(f"device = {device!r}: there is no such GPU; there is {there}")
    return gpus[number]


def _gpus() -> list[_core.Gpu]:
    library = os.environ.get(LIBRARY_VARIABLE)
    if not library:
        try:
            library = str(importlib.import_module(_PACKAGE).LIBRARY)
        except ModuleNotFoundError:
            raise DeviceError(
                "the CUDA backend is not installed: install it by pip install 'draftwerk[cuda]', or use --device cpu"
            ) from None
    if not Path(library).exists():
        raise DeviceError(f"there is no CUDA backend: {library} is missing; use --device cpu")
    try:
        return _core.gpus(library)
    except RuntimeError as error:
        raise DeviceError(str(error)) from None
