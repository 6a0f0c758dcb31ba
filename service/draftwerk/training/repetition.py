"""Where a text begins to go round in circles, as greedy text of base models does.

A loop is drafted by looking it up; a drafter that learned on loops would learn that and little else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

GRAM = 8
"""Tokens that have to come back together."""

TIMES = 3
"""Occurrences of them, overlapping ones included, that make a loop."""


class LoopWatch:
    """Sees the tokens of a text as they come, and finds the first loop."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque(maxlen=GRAM)
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._tokens = 0

    def push(self, token_id: int) -> int | None:
        """Takes the next token. If it completes a loop: how many tokens there were before its last round."""
        self._latest.append(token_id)
        self._tokens += 1
        if len(self._latest) < GRAM:
            return None
        gram = tuple(self._latest)
        self._seen[gram] += 1
        return self._tokens - GRAM if self._seen[gram] == TIMES else None


def length_before_loop(token_ids: Iterable[int]) -> int:
    """How many tokens of a text there are before its first loop goes into its last round; all if it has none."""
    watch = LoopWatch()
    length = 0
    for token_id in token_ids:
        length += 1
        kept = watch.push(token_id)
        if kept is not None:
            return kept
    return length
