"""How a model is served: what its training text is sampled like, and what its drafters are evaluated on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from draftwerk.requests import SamplingParams
from draftwerk.training.errors import TrainingError


@dataclass(frozen=True)
class Sampling:
    """A way to sample, for all requests alike.

    Attributes:
        temperature, top_k, top_p: see draftwerk.SamplingParams. The defaults are what Gemma is usually served with.

    Raises:
        TrainingError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 64
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or 1e-3 <= self.temperature <= 100.0):
            raise TrainingError(f"temperature = {self.temperature:g}: must be 0, or 0.001 to 100")
        if not 0 <= self.top_k < 1 << 31:
            raise TrainingError(f"top_k = {self.top_k}: must be 0 to {(1 << 31) - 1}")
        if not 0.0 < self.top_p <= 1.0:
            raise TrainingError(f"top_p = {self.top_p:g}: must be more than 0, and at most 1")

    @property
    def params(self) -> SamplingParams:
        """The same as the engine takes it."""
        return SamplingParams(**asdict(self))

    def __str__(self) -> str:
        """Such as "temperature 1, top_k 64, top_p 0.95"."""
        if self.temperature == 0.0:
            return "greedy"
        filters = [f"top_k {self.top_k}"] * (self.top_k > 0) + [f"top_p {self.top_p:g}"] * (self.top_p < 1.0)
        return ", ".join([f"temperature {self.temperature:g}", *filters])
