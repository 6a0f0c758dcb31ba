"""Accepted drafts, counted from the tokens of steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from draftwerk.training.rounds import Acceptance, whole_rounds


def test_acceptance_is_counted_by_position() -> None:
    acceptance = Acceptance.of([1, 2, 4, 4, 3], draft_length=3)
    assert acceptance == Acceptance(5, 14 / 5, (4 / 5, 3 / 5, 2 / 5))


def test_nothing_is_no_acceptance() -> None:
    assert Acceptance.of([], draft_length=2) == Acceptance(0, 1.0, (0.0, 0.0))


def test_the_first_step_drafts_nothing() -> None:
    assert whole_rounds([1, 3, 2], 2, max_tokens=6, until=6) == [3]


def test_a_round_is_whole_if_it_had_room_for_all_its_drafts() -> None:
    # 1 + 4 + 2 tokens: 4 are left for the third round, which drafts 3 of them.
    assert whole_rounds([1, 4, 2, 4], 3, max_tokens=11, until=11) == [4, 2, 4]
    assert whole_rounds([1, 4, 3, 3], 3, max_tokens=11, until=11) == [4, 3]


def test_the_round_that_ended_a_text_does_not_count() -> None:
    assert whole_rounds([1, 4, 2], 3, max_tokens=100, until=7) == [4]


def test_rounds_that_end_behind_a_loops_beginning_do_not_count() -> None:
    assert whole_rounds([1, 3, 3, 3], 2, max_tokens=10, until=7) == [3, 3]
    assert whole_rounds([1, 3, 3, 3], 2, max_tokens=10, until=6) == [3]


def test_a_text_without_tokens_has_no_rounds() -> None:
    assert whole_rounds([], 3, max_tokens=10, until=0) == []


@given(st.lists(st.integers(1, 5), max_size=40), st.integers(0, 100))
def test_rounds_are_those_of_a_beginning(steps: list[int], until: int) -> None:
    rounds = whole_rounds([1, *steps], 4, max_tokens=1 + sum(steps), until=until)
    assert rounds == steps[: len(rounds)]
    assert not rounds or 1 + sum(rounds) <= until
    acceptance = Acceptance.of(rounds, 4)
    assert list(acceptance.by_position) == sorted(acceptance.by_position, reverse=True)
    if rounds:
        assert abs(acceptance.tokens_per_step - sum(rounds) / len(rounds)) < 1e-9
