"""Text that is cut into batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import text

from draftwerk.training.batches import Batch, Batches
from draftwerk.training.errors import TrainingError
from draftwerk.training.shards import Text

BOS = 2


def texts_of(count: int, longest: int, seed: int = 0) -> list[Text]:
    """Of all lengths, with nothing but <bos> before them; no token comes twice but that."""
    rng = np.random.default_rng(seed)
    ids = np.arange(100, 100 + count * longest, dtype=np.int32).reshape(count, longest)
    return [text(np.concatenate([[BOS], row[: rng.integers(0, longest)]])) for row in ids]


def epoch(batches: Batches, number: int = 0) -> list[Batch]:
    return [batches[number * batches.first_epoch + index] for index in range(batches.first_epoch)]


def tokens_of(batch: Batch) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(batch.token_ids.numpy(), batch.lengths.tolist(), strict=True)]


def test_every_token_comes_once_in_an_epoch() -> None:
    texts = texts_of(200, 60)
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
    missing = sum(len(its.token_ids) - 1 for its in texts) - len(seen)
    assert 0 < missing < len(texts)
    assert batches.tokens == sum(batch.tokens for batch in epoch(batches))


def test_sequences_of_a_batch_are_about_equally_long() -> None:
    batches = Batches(texts_of(400, 100), length=100, tokens_per_batch=400, seed=1)
    padded = sum(batch.token_ids.numel() for batch in epoch(batches))
    assert batches.tokens > 0.9 * padded


def test_the_order_is_that_of_the_seed_and_the_epoch() -> None:
    texts = texts_of(50, 30)

    def order(seed: int, number: int) -> list[list[list[int]]]:
        batches = Batches(texts, length=30, tokens_per_batch=60, seed=seed)
        return [tokens_of(batch) for batch in epoch(batches, number)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)
    batches = Batches(texts, length=30, tokens_per_batch=60, seed=1)
    assert tokens_of(batches[3 * batches.first_epoch]) == order(1, 3)[0]


def test_the_fingerprint_is_that_of_the_text_and_how_it_is_cut() -> None:
    texts = texts_of(5, 30)
    sizes = {"length": 30, "tokens_per_batch": 60, "seed": 1}
    same = Batches(texts, **sizes).fingerprint
    assert Batches(texts_of(5, 30), **sizes).fingerprint == same
    changed = texts_of(5, 30)
    changed[3].token_ids[-1] += 1
    prompted = [text(its.token_ids, 2) for its in texts]
    others = [Batches(texts, **{**sizes, name: value + 1}) for name, value in sizes.items()]
    others += [Batches(changed, **sizes), Batches(prompted, **sizes)]
    assert same not in {other.fingerprint for other in others}


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
        Batches(texts_of(5, 30), **{"length": 30, "tokens_per_batch": 60, "seed": 1, **sizes})
    assert str(refused.value) == message


@pytest.mark.parametrize("texts", [[], [text(np.array([BOS, 5]))], [text(np.zeros(0))], [text(np.arange(9), 8)]])
def test_there_is_no_text(texts: list[Text]) -> None:
    message = f"no text to train on: {len(texts)} texts, none with two tokens of the model's own"
    with pytest.raises(TrainingError, match=message):
        Batches(texts, length=30, tokens_per_batch=60, seed=1)


@given(st.integers(0, 90), st.integers(0, 90), st.integers(6, 40))
def test_chains_start_at_what_the_target_wrote(prompt_length: int, generated: int, length: int) -> None:
    """Each of its tokens but the last of a sequence, once; of a long prompt half of a sequence is kept before them."""
    its = text(np.concatenate([[BOS], 100 + np.arange(prompt_length + generated)]), 1 + prompt_length)
    own = list(range(100 + prompt_length, 100 + prompt_length + generated))
    try:
        batches = Batches([its], length=length, tokens_per_batch=length, seed=1)
    except TrainingError:
        assert generated < 2
        return
    rows, starts, prompts = [], [], []
    for batch in epoch(batches):
        (row,), start = tokens_of(batch), int(batch.starts[0])
        assert row[0] == BOS
        assert len(row) - start >= 2
        rows.append(row)
        starts += row[start:]
        prompts += row[1:start]
    last = len(own) - len(starts)  # what is left over at the end may be too short for a chain
    assert last <= 1
    assert sorted(starts) == own[: len(starts)]
    kept = len(prompts)
    whole = 1 + prompt_length + generated <= length
    assert sorted(prompts) == list(range(100 + prompt_length - kept, 100 + prompt_length))
    assert kept == (prompt_length if whole else min(prompt_length, length // 2))
