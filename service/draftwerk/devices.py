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


class _NotInstalledError(DeviceError):
    """There is no CUDA backend."""


def find_gpu(device: str) -> _core.Gpu | None:
    """The GPU that a device stands for; ``None``: the processor.

    Args:
        device: "cpu"; "cuda" (the first GPU) or "cuda:N"; "auto" (the first GPU that can be used, if there is one, else
            the processor).

    Raises:
        DeviceError: there is no such device, or it cannot be used; says why, and what would work.
    """
    if device == "cpu":
        return None
    if device == "auto":
        return _first_usable()
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise DeviceError(f"device = {device!r}: must be auto, cpu, cuda or cuda:N")
    number = int(match[1] or 0)
    gpus = _gpus()
    if number >= len(gpus):
        there = ", ".join(f"cuda:{gpu.number} ({gpu.name})" for gpu in gpus)
        raise DeviceError(f"device = {device!r}: there is no such GPU; there is {there}")
    if gpus[number].refusal:
        raise DeviceError(f"device = {device!r}: {gpus[number].refusal}")
    return gpus[number]


def _first_usable() -> _core.Gpu | None:
    try:
        gpus = _gpus()
    except _NotInstalledError as error:
        _log.debug("computing on the processor: %s", error)
        return None
    except DeviceError as error:  # somebody has installed the backend, and will want to know
        _log.warning("computing on the processor: %s", error)
        return None
    usable = next((gpu for gpu in gpus if not gpu.refusal), None)
    if usable is None:
        _log.warning("computing on the processor: %s", gpus[0].refusal)
    return usable


def _gpus() -> list[_core.Gpu]:
    library = os.environ.get(LIBRARY_VARIABLE)
    if not library:
        try:
            library = str(importlib.import_module(_PACKAGE).LIBRARY)
        except ModuleNotFoundError:
            raise _NotInstalledError(
                "the CUDA backend is not installed: pip install ./cuda, from a checkout, or use --device cpu"
            ) from None
    if not Path(library).exists():
        raise DeviceError(f"there is no CUDA backend: {library} is missing; use --device cpu")
    try:
        return _core.gpus(library)
    except RuntimeError as error:
        raise DeviceError(str(error)) from None
