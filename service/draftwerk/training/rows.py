"""The rows of one draft step: at which positions of which sequences it drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SPAN = 256  # rows that attend together: few enough that they see about the same keys


@dataclass(frozen=True)
class Span:
    """Rows of one sequence that follow each other.

    Attributes:
        sequence: the sequence.
        first, last: the rows are ``[first, last)``.
        least, most: the positions of the first and of the last of them.
    """

    sequence: int
    first: int
    last: int
    least: int
    most: int


class Rows:
    """Rows sorted by sequence, then by position. A row at position n starts a chain of drafts of the tokens behind n.

    Attributes:
        sequence: [R] int64, ascending.
        position: [R] int64, positive; ascending within a sequence.
        spans: all rows, cut where a sequence ends and after 256 of them.
    """

    def __init__(self, sequence: Tensor, position: Tensor) -> None:
        self.sequence = sequence
        self.position = position
        self.spans = tuple(_spans(sequence.tolist(), position.tolist()))

    def __len__(self) -> int:
        return self.position.shape[0]

    @classmethod
    def from_starts(cls, starts: Tensor, lengths: Tensor) -> Rows:
        """Every position of sequences of these lengths [B] from these [B] on.

        Args:
            starts: positive, as the first position has no state before it, and at most the length.
            lengths: in tokens.
        """
        counts = lengths - starts
        sequence = torch.repeat_interleave(counts)
        begin = torch.cumsum(counts, 0) - counts
        position = torch.arange(sequence.shape[0], device=lengths.device) - (begin - starts)[sequence]
        return cls(sequence, position)

    def those(self, index: Tensor) -> Rows:
        """The rows at ``index`` [r], which is ascending."""
        return Rows(self.sequence[index], self.position[index])


def _spans(sequence: list[int], position: list[int]) -> Iterator[Span]:
    first = 0
    for row in range(1, len(sequence) + 1):
        if row == len(sequence) or sequence[row] != sequence[first] or row - first == _SPAN:
            yield Span(sequence[first], first, row, position[first], position[row - 1])
            first = row
