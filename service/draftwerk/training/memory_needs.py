"""What training takes of memory at least: known before text is written for hours, and not when the target is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from draftwerk.loading import AssistantCheckpoint, Checkpoint
from draftwerk.loading.vocabulary_checks import HEAD
from draftwerk.memory import available_memory
from draftwerk.training.drafter import DrafterModule
from draftwerk.training.errors import TrainingError
from draftwerk.training.precision import DTYPES
from draftwerk.training.shape import DrafterShape

_BYTES_PER_WEIGHT = 20  # of the drafter, in float32: itself, its gradient, two moments and the average


@dataclass(frozen=True)
class MemoryNeeds:
    """Of a run, beside the engine that writes text. A batch comes on top.

    Attributes:
        target: bytes of the target's weights, as they are trained with.
        drafter: bytes of the drafter's, with all that an optimizer has of each.
        precision: of the target's.
    """

    target: int
    drafter: int
    precision: str

    @classmethod
    def of(cls, target: Checkpoint, drafter: DrafterShape | AssistantCheckpoint, precision: str) -> MemoryNeeds:
        """Those of a run.

        Args:
            target: an opened model.
            drafter: its sizes, or what it goes on from.
            precision: one of :data:`.precision.DTYPES`.
        """
        weights = sum(math.prod(view.shape) for view in target.tensors())
        return cls(weights * DTYPES[precision].itemsize, _BYTES_PER_WEIGHT * _trained(drafter), precision)

    def check(self, device: torch.device) -> None:
        """Refuses a device whose free memory is too small.

        Raises:
            TrainingError: it is.
        """
        on_gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
        if self.target + self.drafter <= free:
            return
        ways = ["--precision bf16"] * (self.precision == "f32") + ["--device cpu"] * on_gpu
        ways += ["--device cuda"] * (not on_gpu and torch.cuda.is_available()) + ["a machine with more"]
        raise TrainingError(
            f"training takes {_gb(self.target + self.drafter)} GB and more of {'the GPU' if on_gpu else 'memory'}, and "
            f"{_gb(free)} are free: {_gb(self.target)} are the model's in {self.precision}, {_gb(self.drafter)} the "
            f"drafter's with its optimizer; use {' or '.join(ways)}"
        )


def _trained(drafter: DrafterShape | AssistantCheckpoint) -> int:
    """Weights that an optimizer has."""
    if isinstance(drafter, AssistantCheckpoint):
        return sum(math.prod(view.shape) for view in drafter.tensors() if view.name != HEAD)
    with torch.device("meta"):
        module = DrafterModule(drafter, torch.zeros(drafter.draft_vocab_size))
    return sum(weight.numel() for weight in module.parameters())


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"
