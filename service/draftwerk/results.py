"""What a user gets: pieces of a running generation, the finished completion, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""stop: an end token, stop token or stop string; length: max_tokens or the context; cancelled; error."""


class GenerationError(RuntimeError):
    """A request that was accepted and then failed inside the engine."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a generated token, and the most probable alternatives (token id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GenerationStats:
    """What one request cost. Times are in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were there already: cached prefixes, and what a conversation keeps."""
    generated_tokens: int = 0
    steps: int = 0
    """Passes of the model in which this request received tokens."""
    drafted: int = 0
    """Drafts that the model verified; several of them may have been for one position."""
    accepted: int = 0
    drafted_by_position: tuple[int, ...] = ()
    """[i]: steps that drafted more than i tokens ahead."""
    accepted_by_position: tuple[int, ...] = ()
    """[i]: steps that accepted more than i drafts."""
    queue_time: float = 0.0
    """From submission to the first step that worked on this request."""
    time_to_first_token: float = 0.0
    """From submission."""
    decode_time: float = 0.0
    """From the first token to the last."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further figures of the engine, by its own names."""

    @property
    def tokens_per_step(self) -> float:
        """Tokens generated per pass of the model; 1.0 without drafting."""
        return self.generated_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that the model accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token; 0.0 when there was only one."""
        return (self.generated_tokens - 1) / self.decode_time if self.decode_time > 0 else 0.0

    @classmethod
    def from_native(cls, values: Mapping[str, Any]) -> GenerationStats:
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        names = {f.name for f in fields(cls)} - {"extra"}
        for name, value in values.items():
            if name in names:
                known[name] = tuple(value) if isinstance(value, list) else value
            else:
                extra[name] = value
        return cls(**known, extra=extra)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the derived figures included."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        values.update(
            tokens_per_step=self.tokens_per_step,
            acceptance_rate=self.acceptance_rate,
            decode_tokens_per_second=self.decode_tokens_per_second,
        )
        values.update(self.extra)
        return values


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step of the engine added to one generation.

    `text` may lag behind the tokens: half a character, or text that may turn out to begin a stop string, is held back
    until it is certain. The texts of all chunks joined are the completion's text.
    """

    text: str
    token_ids: tuple[int, ...]
    drafted: tuple[bool, ...]
    """Per token: True if it was drafted and accepted, False if the model chose it itself."""
    position: int
    """Absolute position of the first of `token_ids` in the sequence (the prompt starts at 0)."""
    received_at: float
    """time.perf_counter() when the step's events arrived."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
    """In the last chunk only."""


@dataclass(frozen=True)
class Completion:
    """A finished generation."""

    text: str
    """Empty if the checkpoint has no tokenizer. Ends before a stop string, which `token_ids` may contain."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    drafted: tuple[bool, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_token_ids: tuple[int, ...]
    stats: GenerationStats
