"""How many tokens a drafter can draft, and in how many clusters."""

from __future__ import annotations

from dataclasses import dataclass

from draftwerk.training.errors import TrainingError

_CLUSTER_SIZE = 32
_LEAST_CLUSTERED = 8_192  # fewer tokens are scored one by one in little time
MOST_COMPARED = 16_384
"""Tokens that distributions are compared over in training."""


@dataclass(frozen=True)
class HeadSizes:
    """Of a reduced head.

    Attributes:
        tokens: that can be drafted, whole clusters.
        clusters: of them, all of the same size, which are scored first; 0: every token is scored.
        chosen: clusters whose tokens are scored; 0 without clusters.
    """

    tokens: int
    clusters: int
    chosen: int

    @classmethod
    def of(cls, tokens: int, clusters: int | None, chosen: int, *, vocabulary: int, needed: int = 1) -> HeadSizes:
        """The sizes that come closest to what is wanted.

        Args:
            tokens: at most so many; those that make no whole cluster are left out.
            clusters: so many; ``None``: of 32 tokens each if there are 8,192 or more, else none.
            chosen: so many of them, or all if there are fewer.
            vocabulary: the target's.
            needed: tokens that there have to be, such as the target's end tokens.

        Raises:
            TrainingError: a size is out of range.
        """
        if clusters is None:
            clusters = tokens // _CLUSTER_SIZE if tokens >= _LEAST_CLUSTERED else 0
        for name, value, least, most in (
            ("draft_vocab_size", tokens, needed, vocabulary),
            ("clusters", clusters, 0, tokens),
            ("chosen_clusters", chosen, 1, 1 << 20),
        ):
            if not least <= value <= most:
                raise TrainingError(f"{name} = {value}: must be {least} to {most}")
        if not clusters:
            return cls(tokens, 0, 0)
        return cls(tokens - tokens % clusters, clusters, min(chosen, clusters))
