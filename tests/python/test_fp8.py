"""FP8 checkpoints as a whole: quantised by torch, against the same weights in other forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_fp8_files import QUANTISATION

import tiny_checkpoint
import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.loading import open_checkpoint
from draftwerk.training.torch_tensors import torch_tensor
from draftwerk.weights import fingerprint, load_model
from test_gemma4_parity import prompt
from tested_device import GPU, relative_error

FAMILIES = {"gemma3": tiny_checkpoint.tiny_model, **tiny_gemma4.FAMILIES}


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and a scale for each row, as compressed-tensors makes them."""
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def save_as_fp8(directory: Path, target: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of transformers with the linear layers of its layers in FP8, experts as linear layers too.

    Returns:
        The values of what is FP8 there, by name, in float32.
    """
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, torch.Tensor] = {}

    def add(name: str, weight: torch.Tensor) -> None:
        tensors[name], tensors[f"{name}_scale"] = quantised(weight)
        values[name] = tensors[name].float() * tensors[f"{name}_scale"]

    for name, tensor in load_file(directory / "model.safetensors").items():
        if tensor.dim() == 3:
            prefix, part = name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            for expert, matrix in enumerate(tensor):
                for of_part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                    add(f"{prefix}.{expert}.{of_part}.weight", rows.contiguous())
        elif tensor.dim() == 2 and ".layers." in name and "router" not in name:
            add(name, tensor)
        else:
            tensors[name] = tensor
    write(target, directory, tensors, {"quantization_config": QUANTISATION})
    return values


def write(target: Path, like: Path, tensors: dict[str, torch.Tensor], fields: dict[str, object]) -> None:
    target.mkdir()
    config = json.loads((like / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    save_file(tensors, target / "model.safetensors")


def logits(path: Path, *, weights: str = "auto", chunk: int = 0, gpu: bool = False) -> npt.NDArray[np.float32]:
    model = load_model(open_checkpoint(path), weights=weights, threads=1, gpu=GPU if gpu else None)
    return model.logits(prompt(40), chunk=chunk)


needs_gpu = pytest.mark.skipif(GPU is None, reason="needs a GPU or its emulation (make test-cuda)")


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_gemma4.save(FAMILIES[request.param](seed=5), tmp_path / "bf16", dtype=torch.bfloat16)


def test_the_processor_computes_with_its_values_rounded_to_bfloat16(directory: Path, tmp_path: Path) -> None:
    values = save_as_fp8(directory, tmp_path / "fp8")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in values.items()}
    others = {name: tensor for name, tensor in load_file(directory / "model.safetensors").items() if tensor.dim() < 3}
    write(tmp_path / "rounded", directory, others | rounded, {})
    got = logits(tmp_path / "fp8")
    assert np.array_equal(got, logits(tmp_path / "rounded"))
    assert not np.array_equal(got, logits(directory))


def test_converting_makes_the_same_weights(directory: Path, tmp_path: Path) -> None:
    """As torch: of layers; what is around them becomes int8."""
    save_as_fp8(directory, tmp_path / "fp8")
    converted = logits(directory, weights="fp8")
    assert np.array_equal(converted, logits(tmp_path / "fp8", weights="int8"))
    with pytest.raises(ValueError, match=r"is quantised already \(f8_e4m3\)"):
        logits(tmp_path / "fp8", weights="f32")


@needs_gpu
def test_a_gpu_computes_with_its_values(directory: Path, tmp_path: Path) -> None:
    save_as_fp8(directory, tmp_path / "fp8")
    got = logits(tmp_path / "fp8", gpu=True)
    assert relative_error(got, torch.from_numpy(logits(tmp_path / "fp8"))) < 0.05
    for chunk in (1, 9):
        assert np.array_equal(logits(tmp_path / "fp8", gpu=True, chunk=chunk), got), f"in chunks of {chunk}"
    # Converted on loading it holds the same layers.
    converted = logits(directory, weights="fp8", gpu=True)
    assert np.array_equal(converted, logits(tmp_path / "fp8", weights="int8", gpu=True))


@needs_gpu
def test_a_gpu_holds_a_byte_for_each_weight(tmp_path: Path) -> None:
    directory = tiny_gemma4.save(tiny_checkpoint.tiny_model(seed=1), tmp_path / "bf16", dtype=torch.bfloat16)
    values = save_as_fp8(directory, tmp_path / "fp8")
    bytes_of = [load_model(open_checkpoint(path), gpu=GPU).weight_bytes for path in (directory, tmp_path / "fp8")]
    saved = sum(tensor.numel() for tensor in values.values())
    padding = sum(64 * tensor.shape[0] + 4 * (tensor.shape[0] + 15) for tensor in values.values())
    assert saved - padding < bytes_of[0] - bytes_of[1] <= saved


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_drafts_change_no_token(device: str, tmp_path: Path) -> None:
    directory = tiny_gemma4.save(tiny_checkpoint.tiny_model(seed=2), tmp_path / "bf16", dtype=torch.bfloat16)
    save_as_fp8(directory, tmp_path / "fp8")
    params = SamplingParams(max_tokens=16, ignore_eos=True, temperature=1.0, top_k=20, seed=3)
    found = []
    for drafter in ("none", "random"):
        with Engine(tmp_path / "fp8", device=device, drafter=drafter, kv_memory="16MiB") as engine:
            found.append([c.token_ids for c in engine.generate([prompt(12), prompt(30, 1)], params)])
    assert found[0] == found[1]


def test_a_scale_shows_in_the_fingerprint(tmp_path: Path) -> None:
    directory = tiny_gemma4.save(tiny_checkpoint.tiny_model(seed=2), tmp_path / "bf16", dtype=torch.bfloat16)
    save_as_fp8(directory, tmp_path / "fp8")
    found = {fingerprint(open_checkpoint(directory), weights, "cpu") for weights in ("auto", "fp8", "int8")}
    found.add(fingerprint(open_checkpoint(tmp_path / "fp8"), "auto", "cpu"))
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"][0] *= 2
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    found.add(fingerprint(open_checkpoint(tmp_path / "fp8"), "auto", "cpu"))
    assert len(found) == 5


def test_torch_has_its_values(tmp_path: Path) -> None:
    directory = tiny_gemma4.save(FAMILIES["moe"](seed=2), tmp_path / "bf16", dtype=torch.bfloat16)
    values = save_as_fp8(directory, tmp_path / "fp8")
    seen = 0
    for view in open_checkpoint(tmp_path / "fp8").tensors():
        if view.name in values:
            seen += 1
            assert torch.equal(torch_tensor(view, torch.float32), values[view.name])
            assert torch.equal(torch_tensor(view), values[view.name].to(torch.bfloat16))
        elif ".experts." in view.name:
            seen += 1
            parts = ("gate_proj", "up_proj") if view.name.endswith("gate_up_proj") else ("down_proj",)
            prefix = view.name.rsplit(".", 1)[0]
            count = sum(name.startswith(prefix) for name in values) // 3
            joined = [values[f"{prefix}.{expert}.{part}.weight"] for expert in range(count) for part in parts]
            assert torch.equal(torch_tensor(view, torch.float32), torch.cat(joined))
    assert seen > 20
