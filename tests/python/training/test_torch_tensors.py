"""Tensors of checkpoints in torch, whatever files hold them in."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from draftwerk.loading import TensorView
from draftwerk.training import torch_tensors
from draftwerk.training.torch_tensors import torch_tensor

VALUES = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)


@pytest.fixture(autouse=True)
def several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tensors, "_ROWS_AT_ONCE", 3)


def view(dtype: str, data: bytes, shape: tuple[int, ...] = VALUES.shape) -> TensorView:
    return TensorView("some.weight", dtype, shape, (np.frombuffer(data, np.uint8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_stay_as_they_are(dtype: torch.dtype) -> None:
    expected = torch.from_numpy(VALUES).to(dtype)
    name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    stored = view(name, expected.view(torch.uint8).numpy().tobytes())
    assert torch.equal(torch_tensor(stored), expected)
    assert torch_tensor(stored).dtype == dtype
    assert torch.equal(torch_tensor(stored, torch.float32), expected.float())


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_blocks_are_dequantised(kind: gguf.GGMLQuantizationType) -> None:
    blocks = gguf.quants.quantize(VALUES, kind)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    stored = view(kind.name.lower(), blocks.tobytes())
    assert torch.equal(torch_tensor(stored, torch.float32), expected)
    assert torch.equal(torch_tensor(stored), expected.to(torch.bfloat16))


def test_vectors_are_float32_unless_something_else_is_wanted() -> None:
    stored = view("f32", VALUES[0].tobytes(), (64,))
    assert torch.equal(torch_tensor(stored), torch.from_numpy(VALUES[0]))
    assert torch_tensor(stored, torch.bfloat16).dtype == torch.bfloat16
