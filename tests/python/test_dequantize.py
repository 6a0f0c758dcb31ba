"""Every stored type against the gguf package's own dequantisation, on random blocks and on the real file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from draftwerk import _core
from draftwerk.loading import open_checkpoint

gguf = pytest.importorskip("gguf")

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q5_0": gguf.GGMLQuantizationType.Q5_0,
    "q4_k": gguf.GGMLQuantizationType.Q4_K,
    "q6_k": gguf.GGMLQuantizationType.Q6_K,
}
# Byte offsets of the float16 scales in a block of ggml: random bytes there would mostly be absurd numbers.
SCALES = {"q8_0": (0,), "q4_0": (0,), "q5_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}

Bytes = npt.NDArray[np.uint8]


def random_blocks(name: str, blocks: int, rng: np.random.Generator) -> Bytes:
    """Blocks whose every bit is random but the scales, which are random numbers of either sign, zero among them."""
    elements, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
    if name in SCALES:
        data = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
        for offset in SCALES[name]:
            scales = rng.normal(scale=10.0 ** rng.uniform(-6, 2, blocks)).astype(np.float16)
            scales[rng.random(blocks) < 0.05] = 0
            data[:, offset : offset + 2] = scales[:, None].view(np.uint8)
        return data.reshape(-1)
    values = rng.normal(scale=10.0 ** rng.uniform(-6, 2, blocks * elements)).astype(np.float32)
    if name == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype({"f32": np.float32, "f16": np.float16}[name]).view(np.uint8)


def reference(name: str, data: Bytes) -> npt.NDArray[np.float32]:
    typed = data.view(np.float32) if name == "f32" else data.view(np.float16) if name == "f16" else data
    return np.asarray(gguf.quants.dequantize(typed, TYPES[name]), np.float32).reshape(-1)


def assert_same(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Bit for bit, but for the sign of zero."""
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", TYPES)
def test_random_blocks(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = random_blocks(name, 257, rng)
    expected = reference(name, data)
    assert np.isfinite(expected).all()
    assert np.unique(expected).size > 100
    assert_same(_core.dequantize(name, data, expected.size), expected)


@pytest.mark.parametrize("name", SCALES)
def test_extreme_blocks(name: str) -> None:
    """All bits clear and all bits set in what is not a scale; smallest and largest scales."""
    elements, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
    scales = np.array([0.0, 6e-8, -6e-8, 6.1e-5, 1.0, -1.0, 65504.0, -65504.0], np.float16)
    for fill in (0x00, 0xFF, 0x0F, 0xF0, 0x80, 0x7F):
        data = np.full((scales.size, size), fill, np.uint8)
        for offset in SCALES[name]:
            data[:, offset : offset + 2] = scales[:, None].view(np.uint8)
        flat = data.reshape(-1)
        assert_same(_core.dequantize(name, flat, scales.size * elements), reference(name, flat))


@pytest.mark.parametrize("name", TYPES)
def test_wrong_sizes(name: str) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[TYPES[name]]
    data = np.zeros(2 * size, np.uint8)
    for wrong in (elements, 3 * elements, -elements):
        with pytest.raises(ValueError, match="bytes do not hold"):
            _core.dequantize(name, data, wrong)


def test_rows_of_fp8() -> None:
    """Every number of e4m3, against torch's; the sign of zero too."""
    scales = np.array([1.0, 0.0, 3e-5, 0.37, 1e20], np.float32)
    rows = np.empty((scales.size, 4 + 256), np.uint8)
    rows[:, :4] = scales.view(np.uint8).reshape(-1, 4)
    rows[:, 4:] = np.arange(256)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = torch.from_numpy(scales)[:, None] * values
    got = _core.dequantize("f8_e4m3", rows.reshape(-1), 256, scales.size).reshape(scales.size, 256)
    assert_same(got, expected.numpy())
    assert np.isnan(got[:, [127, 255]]).all()
    assert not np.isnan(np.delete(got, [127, 255], axis=1)).any()
    for wrong in ((255, scales.size), (256, scales.size - 1), (256, -1), (-4, scales.size)):
        with pytest.raises(ValueError, match="bytes do not hold"):
            _core.dequantize("f8_e4m3", rows.reshape(-1), *wrong)


def test_unknown_type() -> None:
    with pytest.raises(ValueError, match="q3_k"):
        _core.dequantize("q3_k", np.zeros(110, np.uint8), 256)


def test_real_file(real_model: str) -> None:
    """A few rows of every matrix of the real file."""
    seen = set()
    for tensor in open_checkpoint(real_model).tensors():
        if len(tensor.shape) == 1:
            continue
        rows, columns = tensor.shape
        row_bytes = tensor.rows_bytes()
        for first in (0, rows // 2, rows - 3):
            data = np.array(tensor.data[first * row_bytes : (first + 3) * row_bytes])
            assert_same(_core.dequantize(tensor.dtype, data, 3 * columns), reference(tensor.dtype, data))
        seen.add(tensor.dtype)
    assert seen == {"q8_0", "q5_0", "q4_k", "q6_k"}
