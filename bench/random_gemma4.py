"""Writes Gemma 4 checkpoints of the published sizes with random weights, and their MTP drafters: what speed and memory
need of a model, without its text.

    python bench/random_gemma4.py E2B DIR        writes DIR/E2B and DIR/E2B-assistant (10 GB and 0.2 GB)

Sizes are those of the published configurations; of the drafter's layers only hidden size, number and head are published
facts here, its heads (4) and MLP (2,048) are chosen to give the published 78 million parameters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SLIDING, FULL = "sliding_attention", "full_attention"
VOCABULARY = 262_144
_CHUNK = 1 << 24  # values that are made at a time
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
TARGETS: dict[str, dict[str, Any]] = {
    "E2B": {
        "num_hidden_layers": 35,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCABULARY,
        "full_every": 5,
    },
    "E4B": {
        "num_hidden_layers": 42,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCABULARY,
        "full_every": 6,
    },
    "12B": {
        "num_hidden_layers": 48,
        "hidden_size": 3840,
        "intermediate_size": 15_360,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "full_every": 6,
    },
    "26B-A4B": {
        "num_hidden_layers": 30,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "full_every": 6,
    },
    "31B": {
        "num_hidden_layers": 60,
        "hidden_size": 5376,
        "intermediate_size": 21_504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "sliding_window": 1024,
        "full_every": 6,
    },
}


def target_config(size: str) -> dict[str, Any]:
    """config.json of a target."""
    values = dict(TARGETS[size])
    every, layers = values.pop("full_every"), values["num_hidden_layers"]
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **_SHARED,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        **values,
        "layer_types": [FULL if (index + 1) % every == 0 else SLIDING for index in range(layers)],
    }


def assistant_config(size: str) -> dict[str, Any]:
    """config.json of its drafter."""
    target = target_config(size)
    small = target["hidden_size_per_layer_input"] > 0
    text = {
        "model_type": "gemma4_text",
        **_SHARED,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "hidden_size": 256 if small else 1024,
        "intermediate_size": 2048 if small else 4096,
        "num_attention_heads": 4 if small else target["num_attention_heads"],
        "num_key_value_heads": target["num_key_value_heads"],
        "num_global_key_value_heads": target.get("num_global_key_value_heads"),
        "sliding_window": target["sliding_window"],
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "attention_k_eq_v": target["attention_k_eq_v"],
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "final_logit_softcapping": None,
    }
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": small,
        "num_centroids": 2048,
        "centroid_intermediate_top_k": 32,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def layer_tensors(config: dict[str, Any], index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of one layer."""
    prefix, hidden = f"model.layers.{index}.", config["hidden_size"]
    full = config["layer_types"][index] == FULL
    head = config["global_head_dim"] if full else config["head_dim"]
    kv_heads = (full and config.get("num_global_key_value_heads")) or config["num_key_value_heads"]
    shared = index >= config["num_hidden_layers"] - config["num_kv_shared_layers"]
    queries, keys = config["num_attention_heads"] * head, kv_heads * head
    mlp = config["intermediate_size"] * (2 if shared and config["use_double_wide_mlp"] else 1)
    yield prefix + "self_attn.q_proj.weight", (queries, hidden)
    yield prefix + "self_attn.q_norm.weight", (head,)
    if not shared:
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        if not (full and config["attention_k_eq_v"]):
            yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.k_norm.weight", (head,)
    yield prefix + "self_attn.o_proj.weight", (hidden, queries)
    yield prefix + "mlp.gate_proj.weight", (mlp, hidden)
    yield prefix + "mlp.up_proj.weight", (mlp, hidden)
    yield prefix + "mlp.down_proj.weight", (hidden, mlp)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{prefix}{norm}_layernorm.weight", (hidden,)
    yield prefix + "layer_scalar", (1,)
    if per_layer := config["hidden_size_per_layer_input"]:
        yield prefix + "per_layer_input_gate.weight", (per_layer, hidden)
        yield prefix + "per_layer_projection.weight", (hidden, per_layer)
        yield prefix + "post_per_layer_input_norm.weight", (hidden,)
    if config["enable_moe_block"]:
        experts, wide = config["num_experts"], config["moe_intermediate_size"]
        yield prefix + "router.proj.weight", (experts, hidden)
        yield prefix + "router.scale", (hidden,)
        yield prefix + "router.per_expert_scale", (experts,)
        yield prefix + "experts.gate_up_proj", (experts, 2 * wide, hidden)
        yield prefix + "experts.down_proj", (experts, hidden, wide)
        for norm in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            yield f"{prefix}{norm}.weight", (hidden,)


def target_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a target."""
    hidden = config["hidden_size"]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    if per_layer := config["hidden_size_per_layer_input"]:
        packed = config["num_hidden_layers"] * per_layer
        yield "model.embed_tokens_per_layer.weight", (VOCABULARY, packed)
        yield "model.per_layer_model_projection.weight", (packed, hidden)
        yield "model.per_layer_projection_norm.weight", (per_layer,)
    for index in range(config["num_hidden_layers"]):
        yield from layer_tensors(config, index)
    yield "model.norm.weight", (hidden,)


def assistant_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a drafter."""
    text, backbone = config["text_config"], config["backbone_hidden_size"]
    hidden = text["hidden_size"]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    yield "pre_projection.weight", (hidden, 2 * backbone)
    yield "post_projection.weight", (backbone, hidden)
    if config["use_ordered_embeddings"]:
        yield "masked_embedding.centroids.weight", (config["num_centroids"], hidden)
        yield "masked_embedding.token_ordering", (VOCABULARY,)
    for index in range(text["num_hidden_layers"]):
        yield from layer_tensors(text, index)
    yield "model.norm.weight", (hidden,)


class RandomTensors:
    """Values of a size that keeps activations and logits in the range of a trained model."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._normal = self._rng.standard_normal(_CHUNK, dtype=np.float32)

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[Any]]:
        """The bytes of a tensor, in pieces."""
        count = int(np.prod(shape))
        if name.endswith("token_ordering"):
            yield self._rng.permutation(count).astype("<i8")
            return
        mean, spread = self.scale(name, shape)
        for done in range(0, count, _CHUNK):
            # The same normal numbers from elsewhere: what matters is that they are many and look random.
            part = np.roll(self._normal, int(self._rng.integers(_CHUNK)))[: min(_CHUNK, count - done)]
            yield _bfloat16(mean + spread * part)

    @staticmethod
    def scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and spread of the values of a tensor."""
        if name == "model.norm.weight":
            return 6.0, 0.6
        if name.endswith("q_norm.weight"):
            return 1.5 * shape[0] ** -0.5, 0.3 * shape[0] ** -0.5
        if len(shape) == 1:
            return 1.0, 0.1
        if name == "model.embed_tokens.weight":
            return 0.0, 0.05
        return 0.0, 0.2 if "per_layer.weight" in name else shape[-1] ** -0.5


def _bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write(directory: Path, config: dict[str, Any], tensors: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    """A checkpoint directory; an existing one is left as it is if its weights are complete."""
    header, offset = {}, 0
    for name, shape in tensors:
        integers = name.endswith("token_ordering")
        size = int(np.prod(shape)) * (8 if integers else 2)
        dtype = "I64" if integers else "BF16"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = directory / "model.safetensors"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if path.exists() and path.stat().st_size == 8 + len(text) + offset:
        return
    random = RandomTensors(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            for chunk in random.chunks(name, shape):
                file.write(memoryview(chunk).cast("B"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(TARGETS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    target, assistant = target_config(arguments.size), assistant_config(arguments.size)
    where = arguments.directory / arguments.size
    write(where, target, list(target_tensors(target)), arguments.seed)
    write(where.with_name(where.name + "-assistant"), assistant, list(assistant_tensors(assistant)), arguments.seed + 1)
    print(where)


if __name__ == "__main__":
    main()
