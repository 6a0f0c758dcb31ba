"""Tiny but complete Gemma 4 checkpoints and drafters, written byte by byte so that a test can bend any part of them.

The target has everything at once: layers that share K/V and have a wider MLP, K = V, per-layer embeddings and experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_files as tiny

SLIDING, FULL = "sliding_attention", "full_attention"
LAYER_TYPES = [SLIDING, FULL, SLIDING, FULL]
VOCAB, HIDDEN, MLP, HEADS, WINDOW = tiny.VOCAB, 32, 64, 4, 8
KV_HEADS, GLOBAL_KV_HEADS, HEAD_DIM, GLOBAL_HEAD_DIM = 2, 1, 16, 32
PER_LAYER, EXPERTS, TOP_K, EXPERT_MLP = 8, 4, 2, 16
SHARED = 2
DRAFTER_HIDDEN, DRAFTER_MLP, DRAFTER_LAYERS = 16, 24, 2
CENTROIDS = 8
DRAFT_VOCAB = 48
GGML_I32, GGML_I64 = 26, 27


def text_config() -> dict[str, Any]:
    """The ``config.json`` of the target with ``global_head_dim``, as far as it matters."""
    return {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": len(LAYER_TYPES),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_global_key_value_heads": GLOBAL_KV_HEADS,
        "head_dim": HEAD_DIM,
        "global_head_dim": GLOBAL_HEAD_DIM,
        "sliding_window": WINDOW,
        "layer_types": list(LAYER_TYPES),
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": SHARED,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": PER_LAYER,
        "vocab_size_per_layer_input": VOCAB,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": EXPERT_MLP,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
        "tie_word_embeddings": True,
        "rope_parameters": {
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


def assistant_config() -> dict[str, Any]:
    """The ``config.json`` of a drafter for it, with centroids."""
    text = text_config() | {
        "hidden_size": DRAFTER_HIDDEN,
        "intermediate_size": DRAFTER_MLP,
        "num_hidden_layers": DRAFTER_LAYERS,
        "num_kv_shared_layers": DRAFTER_LAYERS,
        "layer_types": [SLIDING, FULL],
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    return {
        "model_type": "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": HIDDEN,
        "use_ordered_embeddings": True,
        "num_centroids": CENTROIDS,
        "centroid_intermediate_top_k": 3,
        "tie_word_embeddings": True,
    }


def reduced_config() -> dict[str, Any]:
    """The same drafter with a reduced head instead of its own."""
    return assistant_config() | {"draft_vocab_size": DRAFT_VOCAB}


def text_shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape of every tensor of the target."""
    layers = len(LAYER_TYPES)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.embed_tokens_per_layer.weight": (VOCAB, layers * PER_LAYER),
        "model.per_layer_model_projection.weight": (layers * PER_LAYER, HIDDEN),
        "model.per_layer_projection_norm.weight": (PER_LAYER,),
        "model.norm.weight": (HIDDEN,),
    }
    for index, kind in enumerate(LAYER_TYPES):
        head, kv = (GLOBAL_HEAD_DIM, GLOBAL_KV_HEADS) if kind == FULL else (HEAD_DIM, KV_HEADS)
        shared = index >= layers - SHARED
        mlp = 2 * MLP if shared else MLP
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
            "pre_feedforward_layernorm.weight": (HIDDEN,), "post_feedforward_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (HEADS * head, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HEADS * head),
            "self_attn.q_norm.weight": (head,), "mlp.gate_proj.weight": (mlp, HIDDEN),
            "mlp.up_proj.weight": (mlp, HIDDEN), "mlp.down_proj.weight": (HIDDEN, mlp), "layer_scalar": (1,),
            "per_layer_input_gate.weight": (PER_LAYER, HIDDEN), "per_layer_projection.weight": (HIDDEN, PER_LAYER),
            "post_per_layer_input_norm.weight": (HIDDEN,), "post_feedforward_layernorm_1.weight": (HIDDEN,),
            "post_feedforward_layernorm_2.weight": (HIDDEN,), "pre_feedforward_layernorm_2.weight": (HIDDEN,),
            "router.proj.weight": (EXPERTS, HIDDEN), "router.scale": (HIDDEN,), "router.per_expert_scale": (EXPERTS,),
            "experts.gate_up_proj": (EXPERTS, 2 * EXPERT_MLP, HIDDEN),
            "experts.down_proj": (EXPERTS, HIDDEN, EXPERT_MLP),
        }  # fmt: skip
        if not shared:
            parts |= {"self_attn.k_proj.weight": (kv * head, HIDDEN), "self_attn.k_norm.weight": (head,)}
            if kind == SLIDING:
                parts["self_attn.v_proj.weight"] = (kv * head, HIDDEN)
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in parts.items()}
    return shapes


def assistant_shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape of every tensor of the drafter but the token ordering."""
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (DRAFTER_HIDDEN, 2 * HIDDEN),
        "post_projection.weight": (HIDDEN, DRAFTER_HIDDEN),
        "model.embed_tokens.weight": (VOCAB, DRAFTER_HIDDEN),
        "model.norm.weight": (DRAFTER_HIDDEN,),
        "masked_embedding.centroids.weight": (CENTROIDS, DRAFTER_HIDDEN),
    }
    for index, head in enumerate((HEAD_DIM, GLOBAL_HEAD_DIM)):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (DRAFTER_HIDDEN,), "post_attention_layernorm.weight": (DRAFTER_HIDDEN,),
            "pre_feedforward_layernorm.weight": (DRAFTER_HIDDEN,),
            "post_feedforward_layernorm.weight": (DRAFTER_HIDDEN,),
            "self_attn.q_proj.weight": (HEADS * head, DRAFTER_HIDDEN),
            "self_attn.o_proj.weight": (DRAFTER_HIDDEN, HEADS * head), "self_attn.q_norm.weight": (head,),
            "mlp.gate_proj.weight": (DRAFTER_MLP, DRAFTER_HIDDEN), "mlp.up_proj.weight": (DRAFTER_MLP, DRAFTER_HIDDEN),
            "mlp.down_proj.weight": (DRAFTER_HIDDEN, DRAFTER_MLP), "layer_scalar": (1,),
        }  # fmt: skip
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in parts.items()}
    return shapes


def reduced_shapes() -> dict[str, tuple[int, ...]]:
    """The same with a reduced head, without the draft tokens."""
    shapes = assistant_shapes()
    del shapes["model.embed_tokens.weight"]
    return shapes | {"masked_embedding.centroids.weight": (CENTROIDS, HIDDEN)}


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def ordering(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(VOCAB).astype(np.int64)


def draft_token_ids(seed: int = 0) -> np.ndarray:
    return ordering(seed)[:DRAFT_VOCAB].astype(np.int32)


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def text_tensors(dtype: str = "BF16", seed: int = 0) -> Tensors:
    """Name to (dtype, shape, bytes), for tiny_files.safetensors_bytes()."""
    values = weights(text_shapes(), seed)
    return {name: (dtype, value.shape, tiny.stored(value, dtype)) for name, value in values.items()}


def assistant_tensors(dtype: str = "BF16", seed: int = 1) -> Tensors:
    values = weights(assistant_shapes(), seed)
    tensors: Tensors = {name: (dtype, value.shape, tiny.stored(value, dtype)) for name, value in values.items()}
    tensors["masked_embedding.token_ordering"] = ("I64", (VOCAB,), ordering().astype("<i8").tobytes())
    return tensors


def reduced_tensors(dtype: str = "BF16", seed: int = 1) -> Tensors:
    values = weights(reduced_shapes(), seed)
    tensors: Tensors = {name: (dtype, value.shape, tiny.stored(value, dtype)) for name, value in values.items()}
    tensors["draft_token_ids"] = ("I32", (DRAFT_VOCAB,), draft_token_ids().astype("<i4").tobytes())
    return tensors


def write(path: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """A Hugging Face directory without a tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    return path


def write_target(path: Path, **changes: Any) -> Path:
    """The target, ``changes`` made to its configuration."""
    return write(path, text_config() | changes, text_tensors())


def write_assistant(path: Path, **changes: Any) -> Path:
    """The drafter, ``changes`` made to its text configuration."""
    config = assistant_config()
    config["text_config"] |= changes
    return write(path, config, assistant_tensors())


def write_reduced(path: Path, **changes: Any) -> Path:
    """The drafter with a reduced head, ``changes`` made to its configuration."""
    return write(path, reduced_config() | changes, reduced_tensors())


# --- GGUF ------------------------------------------------------------------------------------------------------------

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight", "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight", "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight", "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight", "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale", "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight", "experts.down_proj": "ffn_down_exps.weight",
}  # fmt: skip
_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "pre_projection.weight": "nextn.pre_projection.weight",
    "post_projection.weight": "nextn.post_projection.weight",
    "masked_embedding.centroids.weight": "masked_embd_centroids.weight",
}


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor."""
    if name in _TOP:
        return _TOP[name]
    _, _, index, part = name.split(".", 3)
    return f"blk.{index}.{_LAYER[part]}"


def rope_freqs(turning: int = GLOBAL_HEAD_DIM // 8) -> bytes:
    """Of the pairs of a full layer's heads, those that turn and those that stay."""
    still = GLOBAL_HEAD_DIM // 2 - turning
    return np.array([1.0] * turning + [1e30] * still, dtype="<f4").tobytes()


def _entries(architecture: str, fields: Mapping[str, tuple[int, Any]]) -> dict[str, bytes]:
    entries = {f"{architecture}.{key}": tiny.key(f"{architecture}.{key}", *value) for key, value in fields.items()}
    return {"general.architecture": tiny.key("general.architecture", tiny.STRING, architecture), **entries}


def _attention_fields(layers: int, shared: int) -> dict[str, tuple[int, Any]]:
    return {
        "context_length": (tiny.U32, 128),
        "block_count": (tiny.U32, layers),
        "attention.head_count": (tiny.U32, HEADS),
        "attention.key_length": (tiny.U32, GLOBAL_HEAD_DIM),
        "attention.value_length": (tiny.U32, GLOBAL_HEAD_DIM),
        "attention.key_length_swa": (tiny.U32, HEAD_DIM),
        "attention.value_length_swa": (tiny.U32, HEAD_DIM),
        "attention.layer_norm_rms_epsilon": (tiny.F32, 1e-6),
        "attention.sliding_window": (tiny.U32, WINDOW),
        "attention.shared_kv_layers": (tiny.U32, shared),
        "rope.freq_base": (tiny.F32, 1e6),
        "rope.freq_base_swa": (tiny.F32, 1e4),
        "rope.dimension_count": (tiny.U32, GLOBAL_HEAD_DIM),
        "rope.dimension_count_swa": (tiny.U32, HEAD_DIM),
    }


class TinyGemma4Gguf(tiny.TinyGguf):
    """The target as llama.cpp's converter writes it, with the vocabulary of tiny_files as merges."""

    architecture = "gemma4"

    def __init__(self, seed: int = 0, **changes: tuple[int, Any]) -> None:
        super().__init__(seed)
        vocabulary = {name: self.entries[name] for name in ("tokens", "scores", "types")}
        key = self.key
        self.entries = {
            **_entries(self.architecture, self.fields() | {k.replace("__", "."): v for k, v in changes.items()}),
            **{key(name): tiny.array(key(name), kind, values) for name, (kind, values) in self.arrays().items()},
            "general.name": tiny.key("general.name", tiny.STRING, "Tiny"),
            "tokenizer.ggml.model": tiny.key("tokenizer.ggml.model", tiny.STRING, "gemma4"),
            "tokenizer.ggml.bos_token_id": tiny.key("tokenizer.ggml.bos_token_id", tiny.U32, 2),
            "tokenizer.ggml.eos_token_id": tiny.key("tokenizer.ggml.eos_token_id", tiny.U32, 1),
            **vocabulary,
            "tokens": tiny.array("tokenizer.ggml.tokens", tiny.STRING, [piece for piece, _, _ in tiny.vocabulary()]),
            "merges": tiny.array("tokenizer.ggml.merges", tiny.STRING, merges()),
        }
        self.tensors = []
        for name, value in weights(self.shapes(), seed).items():
            # norms and scales are float32, everything else float16
            kind, dtype = (tiny.GGML_F32, "<f4") if value.ndim == 1 else (tiny.GGML_F16, "<f2")
            self.tensors.append([gguf_name(name), value.shape, kind, value.astype(dtype).tobytes(), None])
        self.tensors.append(["rope_freqs.weight", (GLOBAL_HEAD_DIM // 2,), tiny.GGML_F32, rope_freqs(), None])

    def key(self, suffix: str) -> str:
        return f"{self.architecture}.{suffix}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return text_shapes()

    def fields(self) -> dict[str, tuple[int, Any]]:
        return {
            **_attention_fields(len(LAYER_TYPES), SHARED),
            "embedding_length": (tiny.U32, HIDDEN),
            "final_logit_softcapping": (tiny.F32, 30.0),
            "embedding_length_per_layer_input": (tiny.U32, PER_LAYER),
            "expert_count": (tiny.U32, EXPERTS),
            "expert_used_count": (tiny.U32, TOP_K),
            "expert_feed_forward_length": (tiny.U32, EXPERT_MLP),
        }

    def arrays(self) -> dict[str, tuple[int, list[Any]]]:
        owning = len(LAYER_TYPES) - SHARED
        return {
            "attention.sliding_window_pattern": (tiny.BOOL, [kind == SLIDING for kind in LAYER_TYPES]),
            "attention.head_count_kv": (
                tiny.U32,
                [GLOBAL_KV_HEADS if kind == FULL else KV_HEADS for kind in LAYER_TYPES],
            ),
            "feed_forward_length": (tiny.U32, [MLP] * owning + [2 * MLP] * SHARED),
        }


class TinyAssistantGguf(TinyGemma4Gguf):
    """The drafter in llama.cpp's dialect, with the centroids that its converter leaves out."""

    architecture = "gemma4-assistant"

    def __init__(self, seed: int = 1, **changes: tuple[int, Any]) -> None:
        super().__init__(seed, **changes)
        order = ordering().astype("<i4").tobytes()
        self.tensors.append(["masked_embd_ordering", (VOCAB,), GGML_I32, order, None])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return assistant_shapes()

    def fields(self) -> dict[str, tuple[int, Any]]:
        return {
            **_attention_fields(DRAFTER_LAYERS, DRAFTER_LAYERS),
            "embedding_length": (tiny.U32, DRAFTER_HIDDEN),
            "embedding_length_out": (tiny.U32, HIDDEN),
            "nextn_predict_layers": (tiny.U32, DRAFTER_LAYERS),
            "embedding_length_per_layer_input": (tiny.U32, 0),
            "feed_forward_length": (tiny.U32, DRAFTER_MLP),
            "centroid_top_k": (tiny.U32, 3),
        }

    def arrays(self) -> dict[str, tuple[int, list[Any]]]:
        return {
            "attention.sliding_window_pattern": (tiny.BOOL, [True, False]),
            "attention.head_count_kv": (tiny.U32, [KV_HEADS, GLOBAL_KV_HEADS]),
        }


class TinyReducedGguf(TinyAssistantGguf):
    """The drafter with a reduced head."""

    def __init__(self, seed: int = 1, **changes: tuple[int, Any]) -> None:
        super().__init__(seed, **changes)
        self.tensors.remove(self.tensor("masked_embd_ordering"))
        tokens = draft_token_ids().astype("<i4").tobytes()
        self.tensors.append(["draft_token_ids", (DRAFT_VOCAB,), GGML_I32, tokens, None])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return reduced_shapes()

    def fields(self) -> dict[str, tuple[int, Any]]:
        return super().fields() | {"vocab_size": (tiny.U32, VOCAB), "draft_vocab_size": (tiny.U32, DRAFT_VOCAB)}


def merges() -> list[str]:
    """The merges of tiny_files.tokenizer_json() as GGUF has them."""
    return [" ".join(pair) for pair in tiny.tokenizer_json()["model"]["merges"]]
