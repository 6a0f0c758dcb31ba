"""Loops: found at the third occurrence of eight tokens, and not before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from draftwerk.training.repetition import GRAM, TIMES, LoopWatch, length_before_loop


def test_a_loop_is_cut_before_its_third_round() -> None:
    round_ = list(range(10))
    assert length_before_loop([99, 98, *round_, *round_, *round_, *round_]) == 22
    assert length_before_loop([*round_, *round_, *round_[:7]]) == 27  # seven tokens of the third round are no proof


def test_occurrences_may_be_apart_and_may_overlap() -> None:
    gram = list(range(GRAM))
    assert length_before_loop([*gram, 50, *gram, 51, 52, *gram, 53]) == 2 * GRAM + 3
    assert length_before_loop([7] * 50) == TIMES - 1


def naive(tokens: list[int]) -> int:
    for end in range(GRAM, len(tokens) + 1):
        gram = tokens[end - GRAM : end]
        if sum(tokens[i : i + GRAM] == gram for i in range(end - GRAM + 1)) == TIMES:
            return end - GRAM
    return len(tokens)


@given(st.lists(st.integers(0, 1), max_size=80))
def test_the_cut_is_that_of_the_plain_form(tokens: list[int]) -> None:
    assert length_before_loop(tokens) == naive(tokens)


def test_it_is_told_once() -> None:
    watch = LoopWatch()
    told = [watch.push(3) for _ in range(20)]
    assert [kept for kept in told if kept is not None] == [TIMES - 1]
