"""Which tokens a batch compares distributions over."""

from __future__ import annotations

import torch

from draftwerk.training.compared_tokens import TokenChoice
from draftwerk.training.whole_blocks import whole_blocks

DRAFTED = torch.tensor([9, 3, 4, 7, *range(100, 4000)])
FREQUENT = torch.tensor([3, 7, 100, 101])
VOCABULARY = 5000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_that_can_be_drafted_in_the_order_of_the_head() -> None:
    chosen = TokenChoice(DRAFTED, None, VOCABULARY).of_batch(torch.tensor([[4999]]), generator())
    assert torch.equal(chosen.token_ids, DRAFTED)
    assert chosen.index[9] == 0
    assert chosen.index[100] == 4
    assert chosen.index[4999] == -1


def test_frequent_ones_those_of_the_text_and_some_by_chance() -> None:
    choice = TokenChoice(DRAFTED, FREQUENT, VOCABULARY)
    text = torch.tensor([[3, 9, 2500], [4999, 3999, 0]])
    chosen = choice.of_batch(text, generator())
    found = set(chosen.token_ids.tolist())
    assert {3, 7, 100, 101} | {9, 2500, 3999} <= found
    assert found <= set(DRAFTED.tolist())
    assert len(found) == whole_blocks(4 + 3 + 1024)
    assert len(found) == len(chosen.token_ids)
    assert torch.equal(chosen.index[chosen.token_ids], torch.arange(len(found)))
    assert int((chosen.index >= 0).sum()) == len(found)


def test_all_where_chance_would_take_more_than_there_are() -> None:
    drafted = torch.arange(1000)
    chosen = TokenChoice(drafted, torch.tensor([5, 1]), VOCABULARY).of_batch(torch.tensor([[1, 2]]), generator())
    assert torch.equal(chosen.token_ids, drafted)


def test_chance_is_the_generators() -> None:
    choice = TokenChoice(DRAFTED, FREQUENT, VOCABULARY)
    text = torch.tensor([3])
    once, again, other = (choice.of_batch(text, generator(seed)).token_ids for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_nothing_is_left_to_chance_where_all_is_frequent() -> None:
    choice = TokenChoice(FREQUENT, FREQUENT, VOCABULARY)
    assert choice.of_batch(torch.tensor([4]), generator()) is choice.of_batch(torch.tensor([5]), generator(1))
