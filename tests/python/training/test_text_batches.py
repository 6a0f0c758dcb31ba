"""Batches of text that is still being written."""

from __future__ import annotations

from collections import Counter

import numpy as np

from draftwerk.training.shards import Shard, Text
from draftwerk.training.text_batches import REPLAYED, TextBatches

SHARDS = 5


class Shards:
    """Shards of texts of all lengths; remembers which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, number: int) -> Shard:
        self.asked.append(number)
        rng = np.random.default_rng(number)
        return Shard.of(
            [
                Text(rng.integers(3, 1000, rng.integers(4, 60)).astype(np.int32), prompt_length=1, kind=0, end=0)
                for _ in range(12)
            ]
        )


def batches_of(shards: Shards, seed: int = 1) -> TextBatches:
    return TextBatches(shards, identity="x", length=32, tokens_per_batch=96, seed=seed)


def first(batches: TextBatches, count: int) -> list[bytes]:
    return [batches[index].token_ids.numpy().tobytes() for index in range(count)]


def test_a_shard_is_asked_for_when_its_first_batch_is() -> None:
    shards = Shards()
    batches = batches_of(shards)
    assert batches[0].tokens > 0
    assert set(shards.asked) == {0}
    index = 0
    while 1 not in shards.asked:
        index += 1
        batches[index]
    assert index > 2


def test_a_batch_comes_again_as_it_was() -> None:
    """So that what was computed of it can be kept."""
    shards = Shards()
    batches = batches_of(shards)
    index, seen = 0, Counter[bytes]()
    while max(shards.asked, default=0) < SHARDS:
        seen[batches[index].token_ids.numpy().tobytes()] += 1
        index += 1
    assert max(seen.values()) > 1
    # Every round has one new shard and two older ones.
    assert len(seen) < index / REPLAYED


def test_the_order_is_that_of_the_seed() -> None:
    assert first(batches_of(Shards()), 40) == first(batches_of(Shards()), 40)
    assert first(batches_of(Shards()), 40) != first(batches_of(Shards(), seed=2), 40)
    assert batches_of(Shards()).fingerprint != batches_of(Shards(), seed=2).fingerprint


def test_the_mean_is_that_of_the_first_shard() -> None:
    shards = Shards()
    batches = batches_of(shards)
    tokens, index = [], 0
    while 1 not in shards.asked:
        tokens.append(batches[index].tokens)
        index += 1
    assert batches.mean_tokens == np.mean(tokens[:-1])
