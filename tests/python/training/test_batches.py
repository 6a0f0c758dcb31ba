"""Text that is cut into batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from draftwerk.training.batches import Batch, Batches
from draftwerk.training.errors import TrainingError

BOS = 2


def sequences(count: int, longest: int, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    """Texts of all lengths, no token of which comes twice but the first."""
    rng = np.random.default_rng(seed)
    ids = np.arange(100, 100 + count * longest, dtype=np.int32).reshape(count, longest)
    return [np.concatenate([[BOS], row[: rng.integers(0, longest)]]).astype(np.int32) for row in ids]


def epoch(batches: Batches, number: int = 0) -> list[Batch]:
    return [batches[number * batches.first_epoch + index] for index in range(batches.first_epoch)]


def tokens_of(batch: Batch) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(batch.token_ids.numpy(), batch.lengths.tolist(), strict=True)]


def test_every_token_comes_once_in_an_epoch() -> None:
    texts = sequences(200, 60)
    batches = Batches(texts, length=20, tokens_per_batch=100, seed=1)
    seen: Counter[int] = Counter()
    for batch in epoch(batches):
        assert batch.token_ids.numel() <= 100
        assert batch.tokens == sum(map(len, tokens_of(batch)))
        for row, length, padded in zip(tokens_of(batch), batch.lengths, batch.token_ids, strict=True):
            assert 3 <= len(row) <= 20
            assert row[0] == BOS
            assert np.array_equal(np.diff(row[1:]), np.ones(len(row) - 2))
            assert (padded[length:] == 0).all()
            seen.update(row[1:])
    # The last piece of a text may be too short to start a chain in.
    assert set(seen.values()) == {1}
    missing = sum(text.size - 1 for text in texts) - len(seen)
    assert 0 < missing < len(texts)
    assert batches.tokens == sum(batch.tokens for batch in epoch(batches))


def test_sequences_of_a_batch_are_about_equally_long() -> None:
    batches = Batches(sequences(400, 100), length=100, tokens_per_batch=400, seed=1)
    padded = sum(batch.token_ids.numel() for batch in epoch(batches))
    assert batches.tokens > 0.9 * padded


def test_the_order_is_that_of_the_seed_and_the_epoch() -> None:
    texts = sequences(50, 30)

    def order(seed: int, number: int) -> list[list[list[int]]]:
        batches = Batches(texts, length=30, tokens_per_batch=60, seed=seed)
        return [tokens_of(batch) for batch in epoch(batches, number)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    batches = Batches(texts, length=30, tokens_per_batch=60, seed=1)
    assert tokens_of(batches[3 * batches.first_epoch]) == order(1, 3)[0]


def test_the_fingerprint_is_that_of_the_text_and_how_it_is_cut() -> None:
    texts = sequences(5, 30)
    sizes = {"length": 30, "tokens_per_batch": 60, "seed": 1}
    same = Batches(texts, **sizes).fingerprint
    assert Batches([text.copy() for text in texts], **sizes).fingerprint == same
    changed = [text.copy() for text in texts]
    changed[3][-1] += 1
    others = [Batches(texts, **{**sizes, name: value + 1}) for name, value in sizes.items()]
    assert same not in {other.fingerprint for other in [*others, Batches(changed, **sizes)]}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 5}, "length = 5: must be 6 to 1048576"),
        ({"length": 1 << 21}, "length = 2097152: must be 6 to 1048576"),
        ({"tokens_per_batch": 29}, "tokens_per_batch = 29: must be at least length = 30"),
    ],
)
def test_sizes_out_of_range(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(TrainingError) as refused:
        Batches(sequences(5, 30), **{"length": 30, "tokens_per_batch": 60, "seed": 1, **sizes})
    assert str(refused.value) == message


@pytest.mark.parametrize("texts", [[], [np.array([BOS, 5], np.int32)], [np.zeros(0, np.int32)]])
def test_there_is_no_text(texts: list[npt.NDArray[np.int32]]) -> None:
    with pytest.raises(TrainingError, match=rf"no text to train on: {len(texts)} sequences, none of 3 tokens or more"):
        Batches(texts, length=30, tokens_per_batch=60, seed=1)
