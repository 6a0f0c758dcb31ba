"""How many tokens in how many clusters."""

from __future__ import annotations

import pytest

from draftwerk.training.errors import TrainingError
from draftwerk.training.head_sizes import HeadSizes


@pytest.mark.parametrize(
    ("tokens", "clusters", "chosen", "expected"),
    [
        (65_536, None, 64, (65_536, 2048, 64)),
        (50_000, None, 64, (49_984, 1562, 64)),  # whole clusters
        (16_384, None, 64, (16_384, 512, 64)),
        (8_191, None, 64, (8_191, 0, 0)),
        (65_536, 0, 64, (65_536, 0, 0)),
        (100, 8, 64, (96, 8, 8)),
        (8, 8, 1, (8, 8, 1)),
    ],
)
def test_sizes(tokens: int, clusters: int | None, chosen: int, expected: tuple[int, int, int]) -> None:
    assert HeadSizes.of(tokens, clusters, chosen, vocabulary=70_000) == HeadSizes(*expected)


@pytest.mark.parametrize(
    ("tokens", "clusters", "chosen", "message"),
    [
        (0, None, 1, "draft_vocab_size = 0: must be 1 to 70000"),
        (70_001, None, 1, "draft_vocab_size = 70001: must be 1 to 70000"),
        (64, 65, 1, "clusters = 65: must be 0 to 64"),
        (64, -1, 1, "clusters = -1: must be 0 to 64"),
        (64, 8, 0, "chosen_clusters = 0: must be 1 to 1048576"),
    ],
)
def test_sizes_out_of_range(tokens: int, clusters: int | None, chosen: int, message: str) -> None:
    with pytest.raises(TrainingError) as refused:
        HeadSizes.of(tokens, clusters, chosen, vocabulary=70_000)
    assert str(refused.value) == message


def test_end_tokens_are_among_those_that_can_be_drafted() -> None:
    with pytest.raises(TrainingError, match="draft_vocab_size = 2: must be 3 to 70000"):
        HeadSizes.of(2, 0, 1, vocabulary=70_000, needed=3)
