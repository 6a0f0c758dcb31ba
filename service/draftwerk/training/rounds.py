"""How many drafts were accepted, counted from the tokens that each step of the engine brought."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Acceptance:
    """Of a fixed number of drafts a step.

    Attributes:
        rounds: steps that it was counted in.
        tokens_per_step: tokens that such a step brings on average: the accepted drafts and one of the target's own.
        by_position: draft position to the share of rounds that accepted the draft there, and so all before it.
    """

    rounds: int
    tokens_per_step: float
    by_position: tuple[float, ...]

    @classmethod
    def of(cls, rounds: Iterable[int], draft_length: int) -> Acceptance:
        """From the tokens that each round brought, 1 to draft_length + 1."""
        tokens = list(rounds)
        count = max(1, len(tokens))
        by_position = tuple(sum(brought > i + 1 for brought in tokens) / count for i in range(draft_length))
        return cls(len(tokens), 1.0 + sum(by_position), by_position)


def whole_rounds(step_tokens: Sequence[int], draft_length: int, max_tokens: int, until: int) -> list[int]:
    """The tokens of the rounds of a text that were neither cut short by its end nor without drafts.

    Args:
        step_tokens: tokens that each step brought; the first one is that of the prompt, which drafts nothing.
        draft_length: drafts of a step.
        max_tokens: that were allowed for the text. A step drafts at most one less than are left.
        until: rounds that end behind so many tokens do not count.
    """
    rounds = []
    done = step_tokens[0] if step_tokens else 0
    ended = sum(step_tokens) < max_tokens  # by an end token, perhaps in the middle of the last round's drafts
    for tokens in step_tokens[1 : len(step_tokens) - ended]:
        if done + tokens > until or max_tokens - done <= draft_length:
            break
        rounds.append(tokens)
        done += tokens
    return rounds
