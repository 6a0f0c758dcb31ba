"""Features of batches that are kept on disk: those that the target would compute, whatever happens to the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_training
import torch
from full_disk import full_disk
from tiny_training import MODELS, random_ids

from draftwerk.training.kept_features import KeptFeatures
from draftwerk.training.target import Features, FrozenTarget

BATCHES = [torch.from_numpy(random_ids(rows, 12 * rows)) for rows in (1, 2, 3)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path_factory.mktemp("target"))


@pytest.fixture
def computed(target: FrozenTarget, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the target was asked to compute so far."""
    asked: list[torch.Tensor] = []
    compute = target.features

    def features(token_ids: torch.Tensor) -> Features:
        asked.append(token_ids)
        return compute(token_ids)

    monkeypatch.setattr(target, "features", features)
    return asked


def assert_same(one: Features, other: Features) -> None:
    assert torch.equal(one.states, other.states)
    assert one.keys.keys() == other.keys.keys()
    assert one.values.keys() == other.values.keys()
    for kind, keys in one.keys.items():
        assert torch.equal(keys, other.keys[kind])
        assert torch.equal(one.values[kind], other.values[kind])


def test_a_batch_is_computed_once(target: FrozenTarget, computed: list[torch.Tensor], tmp_path: Path) -> None:
    kept = KeptFeatures(target, tmp_path / "features")
    first = [kept.features(batch) for batch in BATCHES]
    assert len(computed) == 3
    again = [KeptFeatures(target, tmp_path / "features").features(batch) for batch in BATCHES]
    assert len(computed) == 3
    for one, other, batch in zip(first, again, BATCHES, strict=True):
        assert_same(one, other)
        assert_same(one, target.features(batch))
    kept.forget()
    assert not (tmp_path / "features").exists()


def test_batches_of_the_same_tokens_in_another_shape_are_others(target: FrozenTarget, tmp_path: Path) -> None:
    kept = KeptFeatures(target, tmp_path)
    flat = torch.from_numpy(random_ids(1, 24))
    assert kept.features(flat).states.shape[:2] == (1, 24)
    assert kept.features(flat.view(2, 12)).states.shape[:2] == (2, 12)


def test_a_damaged_file_is_computed_again(target: FrozenTarget, computed: list[torch.Tensor], tmp_path: Path) -> None:
    kept = KeptFeatures(target, tmp_path)
    whole = kept.features(BATCHES[0])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert_same(kept.features(BATCHES[0]), whole)
    assert len(computed) == 2
    assert_same(kept.features(BATCHES[0]), whole)
    assert len(computed) == 2


def test_no_more_is_kept_than_may_be(target: FrozenTarget, computed: list[torch.Tensor], tmp_path: Path) -> None:
    kept = KeptFeatures(target, tmp_path, most_bytes=1)
    for batch in BATCHES * 2:
        kept.features(batch)
    assert len(list(tmp_path.iterdir())) == 1
    assert len(computed) == 5


def test_a_full_disk_costs_time_alone(target: FrozenTarget, computed: list[torch.Tensor], tmp_path: Path) -> None:
    kept = KeptFeatures(target, tmp_path / "features")
    kept.features(BATCHES[1])
    with full_disk(512):
        assert_same(kept.features(BATCHES[0]), target.features(BATCHES[0]))
    assert not (tmp_path / "features").exists()  # states need the room more
    kept.features(BATCHES[0])
    assert len(computed) == 4
    assert not (tmp_path / "features").exists()
