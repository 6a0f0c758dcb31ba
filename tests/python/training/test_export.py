"""Drafters on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
import transformers
from full_disk import full_disk
from safetensors.torch import load_file, save_file
from tiny_training import HEADS, MODELS

import tiny_checkpoint
import tiny_gemma4
from draftwerk.loading import CheckpointError, open_assistant, open_checkpoint
from draftwerk.loading.hugging_face_config import assistant_config_from_hugging_face
from draftwerk.training.errors import TrainingError, WriteError
from draftwerk.training.export import read_drafter, write_drafter

KV = (("sliding_attention", 2, tiny_gemma4.HEAD_DIM), ("full_attention", 1, tiny_gemma4.GLOBAL_HEAD_DIM))


@pytest.mark.parametrize("family", MODELS)
def test_what_is_written(tmp_path: Path, family: str) -> None:
    target = tiny_training.frozen(MODELS[family](seed=1), tmp_path / "target")
    drafter = tiny_training.tiny_drafter(target, layers=3)
    directory = tmp_path / "drafter"
    write_drafter(drafter, dict(drafter.named_parameters()), directory, target_name="tiny", draft_length=4)
    config = json.loads((directory / "config.json").read_text())
    assert config["draft_vocab_size"] == 100
    assert open_assistant(directory).base_model == config["base_model"] == "tiny"
    assert assistant_config_from_hugging_face("config.json", config).text == drafter.shape.text
    reference = transformers.AutoConfig.from_pretrained(directory).text_config
    full = reference.per_layer_config["full_attention"]
    assert full.num_key_value_heads == target.config.num_global_key_value_heads
    assert full.head_dim == target.config.global_head_dim
    tensors = load_file(directory / "model.safetensors")
    assert torch.equal(tensors.pop("draft_token_ids"), drafter.draft_token_ids.to(torch.int32))
    expected = drafter.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    assert "tiny" in (directory / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "target"]


@pytest.mark.parametrize("family", MODELS)
def test_reading_back_is_the_identity(tmp_path: Path, family: str) -> None:
    target = tiny_training.frozen(MODELS[family](seed=1), tmp_path / "target")
    drafter = tiny_training.tiny_drafter(target, layers=3, hidden=32)
    for name, buffer in drafter.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.5)
    write_drafter(drafter, dict(drafter.named_parameters()), tmp_path / "one", target_name="tiny")
    read = read_drafter(open_assistant(tmp_path / "one"), open_checkpoint(tmp_path / "target"))
    assert read.shape == drafter.shape
    assert torch.equal(read.draft_token_ids, drafter.draft_token_ids)
    assert read.head == {}
    expected = drafter.state_dict()
    assert read.state_dict().keys() == expected.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16).float()), name
    write_drafter(read, dict(read.named_parameters()), tmp_path / "two", target_name="tiny")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("head", HEADS)
def test_the_head_that_a_drafter_came_with_is_kept(tmp_path: Path, head: str, dtype: torch.dtype) -> None:
    """What is trained is written anew, and the rest to the bit."""
    came, target = tiny_training.published(tmp_path, head, dtype)
    drafter = read_drafter(open_assistant(came), target)
    doubled = {name: 2 * weight for name, weight in drafter.named_parameters()}
    write_drafter(drafter, doubled, tmp_path / "written", target_name="tiny", started_from="a published one")
    before, after = (load_file(path / "model.safetensors") for path in (came, tmp_path / "written"))
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if name in doubled:
            assert torch.equal(tensor, (2 * before[name]).to(torch.bfloat16)), name
        elif name.endswith("layer_scalar"):
            assert torch.equal(tensor, before[name].to(torch.bfloat16)), name
        else:
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name
    opened = [open_assistant(path) for path in (came, tmp_path / "written")]
    assert opened[0].config == opened[1].config
    tokens = [drafter.head_token_ids for drafter in opened]
    assert (tokens[0] is None and tokens[1] is None) or np.array_equal(tokens[0], tokens[1])
    assert "it started from the drafter a published one" in (tmp_path / "written" / "README.md").read_text()


@pytest.mark.parametrize("head", ["own", "own, centroids"])
def test_transformers_reads_what_is_written(tmp_path: Path, head: str) -> None:
    came, target = tiny_training.published(tmp_path, head, torch.bfloat16)
    drafter = read_drafter(open_assistant(came), target)
    write_drafter(drafter, dict(drafter.named_parameters()), tmp_path / "written", target_name="tiny")
    state = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    shared = {kind: (torch.zeros(1, heads, 3, size),) * 2 for kind, heads, size in KV}
    outputs = []
    for path in (came, tmp_path / "written"):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            outputs.append(model(inputs_embeds=state, position_ids=torch.tensor([[3]]), shared_kv_states=shared))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].last_hidden_state, outputs[1].last_hidden_state)


def test_a_drafter_for_another_target_is_refused(tmp_path: Path) -> None:
    came, _ = tiny_training.published(tmp_path, "own", torch.bfloat16)
    other = tiny_checkpoint.save(tiny_checkpoint.tiny_model(hidden_size=96), tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit other: it is for hidden size 64, and the model has 96"):
        read_drafter(open_assistant(came), open_checkpoint(other))


def test_a_drafter_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    came, target = tiny_training.published(tmp_path, "own", torch.bfloat16)
    tensors = load_file(came / "model.safetensors")
    tensors["pre_projection.weight"][3, 4] = float("inf")
    save_file(tensors, came / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"pre_projection\.weight.*not finite"):
        read_drafter(open_assistant(came), target)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    target = tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path / "target")
    drafter = tiny_training.tiny_drafter(target)
    directory = tmp_path / "drafter"
    with full_disk(), pytest.raises(WriteError) as refused:
        write_drafter(drafter, dict(drafter.named_parameters()), directory, target_name="tiny")
    assert str(refused.value) == f"{directory}: the drafter cannot be written (File too large)"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    target = tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path / "target")
    drafter = tiny_training.tiny_drafter(target)
    before = sorted(path.name for path in (tmp_path / "target").iterdir())
    with pytest.raises(TrainingError, match="is not empty"):
        write_drafter(drafter, dict(drafter.named_parameters()), tmp_path / "target", target_name="tiny")
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == before
