"""Drafters as GGUF files: read back they are what was written, and draft the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tiny_checkpoint
import tiny_gemma4
from draftwerk.loading import open_assistant, open_checkpoint
from draftwerk.loading.config import AssistantConfig
from draftwerk.training.errors import TrainingError
from draftwerk.training.gguf_export import Matrices, write_gguf
from draftwerk.weights import load_assistant, load_model
from tiny_drafters import reduced_head, save_reduced

LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
TARGETS = {
    "gemma3": lambda: tiny_checkpoint.tiny_model(seed=1),
    "gemma3, linear RoPE": lambda: tiny_checkpoint.tiny_model(seed=1, rope_parameters=LINEAR),
    "gemma4": lambda: tiny_gemma4.dense_k_eq_v(seed=1),
}
HEADS = ("own", "own, centroids", "reduced", "reduced, centroids")


def saved(directory: Path, target: str, head: str) -> Path:
    """A drafter in bfloat16 beside the model that it is for."""
    model = TARGETS[target]()
    centroids = 16 if "centroids" in head else 0
    own = head.startswith("own")
    assistant = tiny_gemma4.assistant_for(model, centroids=2 * centroids if own else 0, seed=2)
    tiny_gemma4.save(model, directory / "target", dtype=torch.bfloat16)
    if own:
        return tiny_gemma4.save(assistant, directory / "drafter", dtype=torch.bfloat16)
    reduced = reduced_head(model, 96, centroids=centroids, top_k=3)
    return save_reduced(assistant, reduced, directory / "drafter", dtype=torch.bfloat16)


def in_float32(config: AssistantConfig) -> dict[str, Any]:
    """Its fields, with numbers as GGUF has them."""

    def rounded(values: dict[str, Any]) -> dict[str, Any]:
        return {key: np.float32(value) if isinstance(value, float) else value for key, value in values.items()}

    values = dataclasses.asdict(config)
    return rounded({**values, "text": rounded(values["text"])})


def test_a_file_says_what_model_it_is_for(tmp_path: Path) -> None:
    directory = saved(tmp_path, "gemma4", "reduced")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "base_model": "a model"}))
    write_gguf(directory, tmp_path / "drafter.gguf", matrices="q8_0", name="Tiny")
    assert open_assistant(tmp_path / "drafter.gguf").base_model == "a model"


@pytest.mark.parametrize("matrices", ["bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_file_holds_what_the_directory_holds(target: str, head: str, matrices: Matrices, tmp_path: Path) -> None:
    directory = saved(tmp_path, target, head)
    path = tmp_path / "drafter.gguf"
    write_gguf(directory, path, matrices=matrices, name="Tiny", license_name="none")
    expected, found = open_assistant(directory), open_assistant(path)
    assert (found.name, found.base_model) == ("Tiny", expected.base_model)
    assert in_float32(found.config) == in_float32(expected.config)
    assert np.array_equal(found.head_token_ids, expected.head_token_ids)
    views = {view.name: view for view in found.tensors()}
    assert list(views) == [view.name for view in expected.tensors()]
    for view in expected.tensors():
        got = views[view.name]
        assert got.shape == view.shape
        if len(view.shape) == 1:
            assert (got.dtype, got.data.tobytes()) == ("f32", view.data.tobytes())
            continue
        kind = "q8_0" if matrices == "q4_0" and ".layers." not in view.name else matrices
        values = (view.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(view.shape)
        blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
        assert (got.dtype, got.data.tobytes()) == (kind, blocks.tobytes()), view.name
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["drafter.gguf"]


@pytest.mark.parametrize("head", HEADS)
def test_a_file_drafts_what_the_directory_drafts(head: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, "gemma3", head)
    write_gguf(directory, tmp_path / "drafter.gguf", matrices="bf16", name="Tiny")
    target = open_checkpoint(tmp_path / "target")
    native = load_model(target, threads=2)
    prompt = [2, *range(5, 60)]
    drafts, logits = load_assistant(open_assistant(directory), target, native).draft(prompt, 6)
    from_file, its_logits = load_assistant(open_assistant(tmp_path / "drafter.gguf"), target, native).draft(prompt, 6)
    assert from_file == drafts
    assert np.array_equal(its_logits, logits)


def test_what_cannot_be_written_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "drafter.gguf"
    path.write_bytes(b"old")
    with pytest.raises(TrainingError, match="no such file or directory"):
        write_gguf(tmp_path / "target", path, matrices="q8_0", name="Tiny")
    directory = saved(tmp_path, "gemma3", "reduced")
    with pytest.raises(TrainingError, match="is a whole model") as caught:
        write_gguf(tmp_path / "target", path, matrices="q8_0", name="Tiny")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(TrainingError, match=r"nowhere/x\.gguf: the drafter cannot be written \(No such file"):
        write_gguf(directory, tmp_path / "nowhere" / "x.gguf", matrices="q8_0", name="Tiny")
    model = TARGETS["gemma3"]()
    narrow = tiny_gemma4.assistant_for(model, hidden_size=48)
    tiny_gemma4.save(narrow, tmp_path / "narrow")
    with pytest.raises(
        TrainingError, match=r"matrices = 'q4_0': tensor .* has rows of 48 values, which is no multiple"
    ):
        write_gguf(tmp_path / "narrow", path, matrices="q4_0", name="Tiny")
    assert path.read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["drafter.gguf"]
