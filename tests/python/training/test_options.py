"""What a training run is told: refused in one line where it cannot be, and the schedules that follow from it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import tiny_checkpoint
from draftwerk.loading.config import FULL, SLIDING, TextConfig
from draftwerk.loading.hugging_face_config import config_from_hugging_face
from draftwerk.training.errors import TrainingError
from draftwerk.training.options import TrainingOptions
from draftwerk.training.shape import DrafterShape
from draftwerk.training.vocabulary import DraftVocabulary, choose_draft_vocabulary


def target_config(**changes: Any) -> TextConfig:
    return config_from_hugging_face("config.json", tiny_checkpoint.tiny_config(**changes).to_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.5),
        ("draft_depth", 0),
        ("draft_depth", 33),
        ("learning_rate", -1e-3),
        ("learning_rate", 2.0),
        ("learning_rate", math.nan),
        ("final_learning_rate", 1.1),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("clip", -1.0),
        ("clip", math.nan),
        ("accumulate", 0),
        ("ema_decay", 1.5),
        ("seed", -1),
        ("seed", 1 << 63),
    ],
)
def test_options_out_of_range(name: str, value: float) -> None:
    with pytest.raises(TrainingError, match=rf"^{name} = {value}: must be .* to .*$"):
        TrainingOptions(**{"steps": 10, name: value})


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainingOptions(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    rates = [options.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert all(before > after for before, after in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    assert TrainingOptions(steps=1, warmup_steps=0, learning_rate=0.5).learning_rate_at(0) == 0.5
    assert TrainingOptions(steps=5, warmup_steps=50, learning_rate=0.5).learning_rate_at(4) == 0.05


def test_the_average_soon_forgets_the_first_weights() -> None:
    options = TrainingOptions(steps=1000, ema_decay=0.9)
    assert options.ema_decay_at(0) == 0.1
    assert options.ema_decay_at(1000) == 0.9
    assert TrainingOptions(steps=1, ema_decay=0.0).ema_decay_at(50) == 0.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers = 0: must be 1 to 64"),
        ({"layers": 65}, "layers = 65: must be 1 to 64"),
        ({"hidden": 0}, "hidden = 0: must be 1 to 65536"),
        ({"intermediate": 0}, "intermediate = 0: must be 1 to 262144"),
        ({"draft_vocab_size": 0}, "draft_vocab_size = 0: must be 1 to 352"),
        ({"draft_vocab_size": 353}, "draft_vocab_size = 353: must be 1 to 352"),
    ],
)
def test_sizes_out_of_range(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(TrainingError) as refused:
        DrafterShape.for_target(target_config(), **{"draft_vocab_size": 100, **sizes})
    assert str(refused.value) == message


def test_the_shape_follows_from_the_target() -> None:
    shape = DrafterShape.for_target(target_config(), draft_vocab_size=100)
    assert (shape.text.hidden_size, shape.text.intermediate_size, shape.text.num_hidden_layers) == (64, 96, 2)
    assert shape.text.layer_types == (SLIDING, FULL)
    assert list(shape.layers_of(target_config())) == [(0, 2), (1, 3)]
    narrow = DrafterShape.for_target(target_config(), draft_vocab_size=100, layers=4, hidden=32)
    assert (narrow.text.hidden_size, narrow.text.intermediate_size) == (32, 64)
    assert narrow.text.layer_types == (SLIDING, SLIDING, SLIDING, FULL)
    assert list(narrow.layers_of(target_config())) == [(0, 0), (1, 0), (2, 2), (3, 3)]
    only_full = target_config(layer_types=[FULL] * 4)
    assert DrafterShape.for_target(only_full, draft_vocab_size=100).text.layer_types == (FULL, FULL)
    with pytest.raises(TrainingError, match="no full attention layers"):
        DrafterShape.for_target(target_config(layer_types=[SLIDING] * 4), draft_vocab_size=100)


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    counts = np.zeros(352, np.int64)
    counts[[300, 7, 20, 21]] = [5, 9, 2, 2]
    chosen = choose_draft_vocabulary(target_config(), counts, 5, [1, 7])
    assert (chosen.tolist(), chosen.dtype) == ([1, 7, 20, 21, 300], np.int32)
    # The smaller ids where tokens are equally frequent.
    assert choose_draft_vocabulary(target_config(), counts, 4, [1]).tolist() == [1, 7, 20, 300]
    assert choose_draft_vocabulary(target_config(), counts, 352, []).tolist() == list(range(352))


def test_the_most_frequent_tokens_of_a_draft_vocabulary() -> None:
    vocabulary = DraftVocabulary(np.array([9, 3, 7, 5, 2], np.int32), np.array([4, 4, 0, 8, 4]))
    assert vocabulary.most_frequent(3).tolist() == [2, 3, 5]
    assert vocabulary.most_frequent(9).tolist() == [2, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("counts", "size", "always", "message"),
    [
        (351, 10, [1], "counts of [351] tokens: the vocabulary has 352"),
        (352, 10, [1, 352], "tokens 1 to 352: the vocabulary has 352"),
        (352, 10, [-1], "tokens -1 to -1: the vocabulary has 352"),
        (352, 2, [1, 2, 3], "draft_vocab_size = 2: must be 3 to 352"),
        (352, 353, [], "draft_vocab_size = 353: must be 1 to 352"),
        (352, 0, [], "draft_vocab_size = 0: must be 1 to 352"),
    ],
)
def test_draft_vocabularies_that_cannot_be(counts: int, size: int, always: list[int], message: str) -> None:
    with pytest.raises(TrainingError) as refused:
        choose_draft_vocabulary(target_config(), np.zeros(counts, np.int64), size, always)
    assert str(refused.value) == message
