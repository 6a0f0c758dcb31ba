"""Tiny checkpoints in FP8, written byte by byte in the form of compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_files as tiny

Tensors = dict[str, tuple[str, Any, bytes]]

# As llm-compressor writes it for the scheme FP8_DYNAMIC.
QUANTISATION: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "float-quantized",
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True,
                                  "type": "float"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                        "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
                        "type": "float"},
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.12.2",
}  # fmt: skip


def e4m3(shape: tuple[int, ...], seed: int) -> bytes:
    """Any numbers."""
    values = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)), dtype=np.uint8)
    values[values & 0x7F == 0x7F] = 0
    return values.tobytes()


def quantised(tensors: Tensors, *, one_scale: bool = False, dtype: str = "BF16") -> Tensors:
    """Linear layers as FP8."""
    made: Tensors = {}
    for index, (name, (kind, shape, data)) in enumerate(tensors.items()):
        if len(shape) != 2 or "embed_tokens" in name or "router" in name:
            made[name] = (kind, shape, data)
            continue
        scales = np.random.default_rng(index).uniform(1e-4, 1e-2, 1 if one_scale else shape[0]).astype(np.float32)
        made[name] = ("F8_E4M3", shape, e4m3(shape, index))
        made[f"{name}_scale"] = (dtype, (1,) if one_scale else (shape[0], 1), tiny.stored(scales, dtype))
    return made


def write(path: Path, tensors: Tensors, quantisation: Any = QUANTISATION, config: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = (config or tiny.hugging_face_config()) | {"quantization_config": quantisation}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    return path
