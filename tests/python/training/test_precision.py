"""What training computes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import OPTIONS, Notes, begin, run

from draftwerk.loading import Checkpoint
from draftwerk.training.errors import TrainingError
from draftwerk.training.precision import choose_precision
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import RunOptions, read_options
from draftwerk.training.target import FrozenTarget


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "f32"),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx2": True, "amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": True}, "bf16"),
        ({"neon": True}, "f32"),
    ],
)
def test_a_processor_computes_in_what_it_multiplies_by_itself(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", torch.device("cpu")) == expected
    assert [choose_precision(name, torch.device("cpu")) for name in ("bf16", "f32")] == ["bf16", "f32"]


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "f32")])
def test_a_gpu_does_too(has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of one without such units PyTorch says that it has them, unless it is asked for more.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(TrainingError, match="precision = f16: must be auto, bf16 or f32"):
        RunOptions(model="tiny", tokens=1, precision="f16")


def test_a_run_goes_on_in_what_it_began_with(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed_in: list[torch.dtype] = []

    class Watched(FrozenTarget):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            computed_in.append(self.dtype)

    monkeypatch.setattr("draftwerk.training.run.FrozenTarget", Watched)
    for chosen in ("f32", "bf16"):  # by the machine that it is gone on with
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda chosen=chosen: {"bf16": chosen == "bf16"})
        notes = Notes()
        run(target, tmp_path, notes=notes, stop=lambda notes=notes: bool(notes.steps))
    assert computed_in == [torch.float32, torch.float32]
    assert json.loads((tmp_path / "run.json").read_text())["precision"] == "f32"


def test_a_run_that_was_begun_before_there_was_a_choice_computes_in_bf16(tmp_path: Path) -> None:
    begin(tmp_path, OPTIONS)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["options"]["precision"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert read_options(RunDirectory(tmp_path)).precision == "bf16"
