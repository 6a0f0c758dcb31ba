"""What a training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass

from draftwerk.training.errors import TrainingError


@dataclass(frozen=True)
class TrainingOptions:
    """Of a training run.

    Attributes:
        steps: optimizer steps of the whole run.
        draft_depth: drafts of a chain that are trained.
        learning_rate: its peak, reached after ``warmup_steps`` steps and then falling along a cosine.
        final_learning_rate: share of the peak that is left at the end.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW, for matrices.
        clip: largest norm of the gradient.
        accumulate: batches of an optimizer step.
        ema_decay: of the moving average of the weights, which is what is exported; 0.0: the weights themselves.
        seed: decides which rows of a chain go on.

    Raises:
        TrainingError: a value is out of range.
    """

    steps: int
    draft_depth: int = 6
    learning_rate: float = 5e-4
    final_learning_rate: float = 0.05
    warmup_steps: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, 1 << 30),
            ("draft_depth", 1, 32),
            ("learning_rate", 0.0, 1.0),
            ("final_learning_rate", 0.0, 1.0),
            ("warmup_steps", 0, 1 << 30),
            ("weight_decay", 0.0, 1.0),
            ("clip", 0.0, math.inf),
            ("accumulate", 1, 1 << 20),
            ("ema_decay", 0.0, 1.0),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most or (isinstance(least, int) and not isinstance(value, int)):
                raise TrainingError(f"{name} = {value}: must be {least} to {most}")

    def learning_rate_at(self, step: int) -> float:
        """Of the step with this number, the first one being 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        share = 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.learning_rate * (self.final_learning_rate + (1.0 - self.final_learning_rate) * share)

    def ema_decay_at(self, step: int) -> float:
        """Smaller at the beginning, so that the first weights are soon forgotten."""
        return min(self.ema_decay, (1 + step) / (10 + step))
