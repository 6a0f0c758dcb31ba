"""What loading has to say of a checkpoint reaches who started the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

import tiny_gemma4
from draftwerk.cli.main import app

TEXT = tiny_gemma4.dense_k_eq_v(seed=1)


@pytest.mark.parametrize(("model", "lines"), [(TEXT, 0), (tiny_gemma4.multimodal(TEXT), 1)], ids=["text", "multimodal"])
def test_that_only_the_text_part_is_taken_is_said_once(
    tmp_path: Path, model: transformers.PreTrainedModel, lines: int
) -> None:
    arguments = [
        "--model",
        str(tiny_gemma4.save(model, tmp_path / "model")),
        "--prompt-ids",
        "2,5",
        "--max-tokens",
        "1",
    ]
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["generate", *arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("is multimodal: only its text model is loaded") == lines
