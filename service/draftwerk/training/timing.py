"""Speed from the times at which the tokens of steps arrived."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from draftwerk.measurement import StreamRecord
from draftwerk.training.rounds import whole_rounds

_LEAST_TIMED = 8  # tokens; what ended sooner has no speed


@dataclass(frozen=True)
class Pace:
    """Speed with and without drafts, medians over prompts. Tokens per second behind the first token of a text.

    Attributes:
        prompts: that were timed.
        plain: without drafts.
        drafted: with.
        speedup: the median of the quotients, which is not the quotient of the medians.
    """

    prompts: int
    plain: float
    drafted: float
    speedup: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float | None, float | None]]) -> Pace | None:
        """From the speeds without and with drafts of each prompt, where it has them; None if none has."""
        both = [(plain, drafted) for plain, drafted in pairs if plain is not None and drafted is not None]
        if not both:
            return None
        return cls(
            prompts=len(both),
            plain=statistics.median(plain for plain, _ in both),
            drafted=statistics.median(drafted for _, drafted in both),
            speedup=statistics.median(drafted / plain for plain, drafted in both),
        )


def tokens_per_second(record: StreamRecord, until: int | None = None) -> float | None:
    """Speed from the first step to the last one that ends within so many tokens; None if those are too few."""
    if not record.arrivals:
        return None
    first, done = record.arrivals[0]
    tokens, last = 0, first
    for at, count in record.arrivals[1:]:
        if until is not None and done + tokens + count > until:
            break
        tokens, last = tokens + count, at
    return tokens / (last - first) if tokens >= _LEAST_TIMED and last > first else None


def step_seconds(record: StreamRecord, drafts: int, max_tokens: int) -> float | None:
    """Mean seconds of a step with so many drafts; None if there was none, or they came faster than they were read.

    Args:
        record: of a text with a fixed number of drafts a step.
        drafts: that number.
        max_tokens: that were allowed for it.
    """
    steps = len(whole_rounds([count for _, count in record.arrivals], drafts, max_tokens, max_tokens))
    if not steps:
        return None
    spent = record.arrivals[steps][0] - record.arrivals[0][0]
    return spent / steps if spent > 0 else None
