"""Speeds of records whose times are known."""

from __future__ import annotations

import pytest

from draftwerk.measurement import BenchPrompt, StreamRecord
from draftwerk.results import GenerationStats
from draftwerk.training.timing import Pace, step_seconds, tokens_per_second


def record(*arrivals: tuple[float, int]) -> StreamRecord:
    tokens = range(sum(count for _, count in arrivals))
    return StreamRecord(BenchPrompt("", "", ""), tuple(tokens), GenerationStats(), 0.0, arrivals)


def test_speed_is_that_behind_the_first_step() -> None:
    assert tokens_per_second(record((5.0, 1), (6.0, 4), (7.0, 4), (8.0, 4))) == 4.0


def test_speed_up_to_a_token_is_that_of_the_steps_within() -> None:
    text = record((0.0, 1), (1.0, 8), (2.0, 2), (3.0, 2))
    assert tokens_per_second(text, 13) == 4.0
    assert tokens_per_second(text, 11) == 5.0
    assert tokens_per_second(text, 10) == 8.0


@pytest.mark.parametrize("arrivals", [(), ((1.0, 1),), ((1.0, 1), (2.0, 7)), ((1.0, 1), (1.0, 9))])
def test_what_is_too_short_has_no_speed(arrivals: tuple[tuple[float, int], ...]) -> None:
    assert tokens_per_second(record(*arrivals)) is None


def test_a_steps_time_is_that_of_the_steps_with_all_drafts() -> None:
    # The last step drafts fewer, in less time.
    assert step_seconds(record((0.0, 1), (2.0, 3), (4.0, 1), (4.5, 2)), 2, max_tokens=7) == 2.0


@pytest.mark.parametrize("arrivals", [(), ((1.0, 1),), ((1.0, 1), (1.0, 3), (1.0, 3))])
def test_steps_without_time_have_none(arrivals: tuple[tuple[float, int], ...]) -> None:
    assert step_seconds(record(*arrivals), 2, max_tokens=7) is None


def test_pace_is_the_median_over_prompts() -> None:
    pairs = [(10.0, 20.0), (20.0, 30.0), (None, 99.0), (40.0, 20.0), (99.0, None)]
    assert Pace.of(pairs) == Pace(prompts=3, plain=20.0, drafted=20.0, speedup=1.5)
    assert Pace.of([(None, 1.0)]) is None
