"""States of a run on disk: the last two, whole, whatever happens while one is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from full_disk import full_disk

from draftwerk.training.errors import TrainingError, WriteError
from draftwerk.training.state import last_step, load_state, save_state

TENSORS = {"one": torch.arange(50_000.0), "other": torch.ones(3, 5)}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_last_one_is_read_and_two_are_kept(tmp_path: Path) -> None:
    assert load_state(tmp_path / "states") is None
    assert last_step(tmp_path / "states") == 0
    for step in (5, 10, 15):
        path = save_state(
            tmp_path / "states", step, {**TENSORS, "step": torch.tensor([step])}, {"run": "x", "at": step}
        )
    assert last_step(tmp_path / "states") == 15
    assert names(tmp_path / "states") == ["step-00000010.safetensors", "step-00000015.safetensors"]
    assert path == tmp_path / "states" / "step-00000015.safetensors"
    found = load_state(tmp_path / "states")
    assert found is not None
    tensors, about = found
    assert about == {"run": "x", "at": 15}
    assert tensors.keys() == {*TENSORS, "step"}
    assert int(tensors["step"]) == 15
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_full_disk_leaves_the_states_that_were_there(tmp_path: Path) -> None:
    with (
        full_disk(),
        pytest.raises(WriteError, match=r"step-00000001\.safetensors: .*\(File too large\); .*no earl"),
    ):
        save_state(tmp_path, 1, TENSORS, {})
    assert names(tmp_path) == []
    save_state(tmp_path, 2, TENSORS, {"at": 2})
    with full_disk(), pytest.raises(WriteError, match=r"step-00000002\.safetensors is still there") as refused:
        save_state(tmp_path, 3, TENSORS, {"at": 3})
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == ["step-00000002.safetensors"]
    found = load_state(tmp_path)
    assert found is not None
    assert found[1] == {"at": 2}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.safetensors.abcd1234").write_bytes(b"half of it")
    assert load_state(tmp_path) is None
    save_state(tmp_path, 1, TENSORS, {})
    assert names(tmp_path) == ["step-00000001.safetensors"]


def test_a_place_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"the state cannot be written \(File exists\)"):
        save_state(tmp_path / "file", 1, TENSORS, {})


@pytest.mark.parametrize("damage", ["cut", "not ours", "no safetensors"])
def test_a_damaged_state_is_not_gone_on_from(tmp_path: Path, damage: str) -> None:
    path = save_state(tmp_path, 1, TENSORS, {"at": 1})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "not ours":
        path.write_bytes(path.read_bytes().replace(b'"draftwerk"', b'"something"'))
    else:
        path.write_bytes(b"text")
    with pytest.raises(TrainingError, match="remove it to go on from the one before") as refused:
        load_state(tmp_path)
    assert str(refused.value).startswith(f"{path}: the state cannot be read (")
    assert "\n" not in str(refused.value)
