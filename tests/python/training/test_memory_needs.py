"""Memory that training takes, and what is said where there is less."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import tiny_training
import torch
from tiny_run import OPTIONS, Notes, run

from draftwerk.loading import Checkpoint, open_assistant
from draftwerk.training.drafter import DrafterModule
from draftwerk.training.errors import TrainingError
from draftwerk.training.export import read_drafter
from draftwerk.training.memory_needs import MemoryNeeds
from draftwerk.training.shape import DrafterShape
from draftwerk.training.target import FrozenTarget
from draftwerk.training.trainer import Trainer

CPU = torch.device("cpu")


def weights_of(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_target_and_what_an_optimizer_has(target: Checkpoint) -> None:
    sizes = {"draft_vocab_size": 96, "num_centroids": 12, "centroid_intermediate_top_k": 3}
    shape = DrafterShape.for_target(target.config, **sizes)
    needs = MemoryNeeds.of(target, shape, "bf16")
    frozen = FrozenTarget(target, dtype=torch.bfloat16)
    in_target = {view.name: math.prod(view.shape) for view in target.tensors()}
    assert all(frozen.parameter(name) is not None for name in in_target)
    assert needs.target == 2 * sum(in_target.values())
    assert needs.drafter == 20 * weights_of(DrafterModule(shape, torch.arange(96)))
    assert MemoryNeeds.of(target, shape, "f32") == MemoryNeeds(2 * needs.target, needs.drafter, "f32")


@pytest.mark.parametrize("head", tiny_training.HEADS)
def test_a_head_that_is_not_trained_needs_no_optimizer(tmp_path: Path, head: str) -> None:
    path, target = tiny_training.published(tmp_path, head)
    needs = MemoryNeeds.of(target, open_assistant(path), "f32")
    trained = weights_of(read_drafter(open_assistant(path), target))
    others = (needs.drafter - 20 * trained) / (20 * trained)
    assert 0 <= others < 0.1  # scalars of layers, and centroids of such a head


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = MemoryNeeds(target=3_000_000_000, drafter=200_000_000, precision="f32")
    monkeypatch.setattr("draftwerk.training.memory_needs.available_memory", lambda: 3_200_000_000)
    needs.check(CPU)
    monkeypatch.setattr("draftwerk.training.memory_needs.available_memory", lambda: 3_100_000_000)
    with pytest.raises(TrainingError) as refused:
        needs.check(CPU)
    assert str(refused.value) == (
        "training takes 3.2 GB and more of memory, and 3.1 are free: 3.0 are the model's in f32, 0.2 the drafter's "
        "with its optimizer; use --precision bf16 or a machine with more"
    )
    with pytest.raises(TrainingError, match="use a machine with more"):
        dataclasses.replace(needs, precision="bf16").check(CPU)


def test_it_is_said_before_text_is_written(target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwerk.training.memory_needs.available_memory", lambda: 1000)
    notes = Notes()
    with pytest.raises(TrainingError, match="training takes"):
        run(target, tmp_path / "run", notes=notes)
    assert not notes.texts


def test_memory_that_a_batch_does_not_get_is_one_line(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch(*_: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(Trainer, "_accumulate", batch)
    with pytest.raises(TrainingError, match=r"could not have 4503599\.6 GB more; free some, or begin"):
        run(target, tmp_path / "run")


def test_other_errors_are_no_lack_of_memory(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch(*_: object) -> None:
        raise RuntimeError("the engine failed")

    monkeypatch.setattr(Trainer, "_accumulate", batch)
    with pytest.raises(RuntimeError, match="the engine failed"):
        run(target, tmp_path / "run", tokens=OPTIONS.tokens)
