"""What the engine must know of a text model, from GGUF metadata or a Hugging Face ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.gguf import GgufFile

SLIDING = "sliding_attention"
FULL = "full_attention"
SUPPORTED_GGUF_ARCHITECTURES = ("gemma3",)
SUPPORTED_MODEL_TYPES = ("gemma3_text", "gemma3")

# Gemma 3 defaults that files may leave out (transformers, models/gemma3/configuration_gemma3.py; GGUF has no layer
# pattern and no sliding RoPE base at all).
_LAYERS_PER_FULL = 6
_SLIDING_ROPE_THETA = 10_000.0
_FULL_ROPE_THETA = 1_000_000.0
# The hub's multimodal configs list only what differs from the defaults of `Gemma3TextConfig`.
_GEMMA3_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
}
# Largest accepted value of each size. Generous, and small enough that no product of two of them overflows 64 bits and
# that no hostile value makes a reader allocate before the shapes are compared with the tensors in the file.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "sliding_window": 1 << 30,
    "max_position_embeddings": 1 << 30,
}


@dataclass(frozen=True)
class TextConfig:
    """Sizes and constants of a Gemma text model; field names are those of Hugging Face."""

    architecture: str  # "gemma3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int  # positions a sliding layer sees, the token's own included
    layer_types: tuple[str, ...]  # "sliding_attention" or "full_attention", one per layer
    rope_theta: float  # RoPE base of the full layers
    rope_local_theta: float  # RoPE base of the sliding layers
    rope_scaling_factor: float  # linear RoPE scaling of the full layers: positions are divided by it; 1.0 = none
    rms_norm_eps: float
    query_pre_attn_scalar: float  # attention scores are multiplied by query_pre_attn_scalar**-0.5
    max_position_embeddings: int
    final_logit_softcapping: float  # logits become c * tanh(logits / c); 0.0 = none

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return len(self.layer_types)

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical (Hugging Face) name to shape of every tensor of the model, in the order of the forward pass."""
        hidden, head = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * head, self.num_key_value_heads * head
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
            "pre_feedforward_layernorm": (hidden,),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "mlp.down_proj": (hidden, self.intermediate_size),
            "post_feedforward_layernorm": (hidden,),
        }
        expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            expected |= {f"model.layers.{index}.{part}.weight": shape for part, shape in layer.items()}
        expected["model.norm.weight"] = (hidden,)
        return expected


def config_from_gguf(gguf: GgufFile) -> TextConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
        CheckpointError: unknown architecture, or a key that is missing or out of range.
    """
    architecture = gguf.string("general.architecture")
    if architecture is None:
        raise CheckpointError(gguf.path, "metadata general.architecture is missing")
    if architecture not in SUPPORTED_GGUF_ARCHITECTURES:
        raise CheckpointError(
            gguf.path,
            f"architecture {printable(architecture)!r} is not supported "
            f"(supported: {', '.join(SUPPORTED_GGUF_ARCHITECTURES)})",
        )
    split = gguf.integer("split.count")
    if split is not None and split > 1:
        raise CheckpointError(
            gguf.path, f"is one of {split} parts of a split GGUF: merge them (llama-gguf-split --merge)"
        )
    return _gemma3_from_gguf(gguf)


def _gemma3_from_gguf(gguf: GgufFile) -> TextConfig:
    keys = {
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "sliding_window": "attention.sliding_window",
        "max_position_embeddings": "context_length",
    }
    fields: dict[str, Any] = {}
    for field, suffix in keys.items():
        fields[field] = gguf.integer(f"gemma3.{suffix}")
        _check_size(gguf.path, f"metadata gemma3.{suffix}", field, fields[field])
    if gguf.integer("gemma3.attention.value_length") not in (None, fields["head_dim"]):
        raise CheckpointError(
            gguf.path, "metadata gemma3.attention.value_length differs from key_length: not supported"
        )

    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(gguf.path, "is missing", tensor="token_embd.weight")
    if len(embedding.shape) != 2:
        raise CheckpointError(
            gguf.path, f"has shape {list(embedding.shape)}, not two dimensions", tensor=embedding.name
        )
    fields["vocab_size"] = embedding.shape[0]

    scaling_type = gguf.string("gemma3.rope.scaling.type")
    factor = gguf.number("gemma3.rope.scaling.factor") or 1.0
    if scaling_type not in (None, "none", "linear"):
        raise CheckpointError(
            gguf.path, f"RoPE scaling {printable(scaling_type)!r} is not supported (supported: none, linear)"
        )
    # Only the 27B scales attention by hidden_size / heads instead of head_dim (168 rather than 128, and GGUF does not
    # say so); llama.cpp too tells it by its 62 layers.
    heads_wide = fields["hidden_size"] // fields["num_attention_heads"]
    fields["query_pre_attn_scalar"] = heads_wide if fields["num_hidden_layers"] == 62 else fields["head_dim"]
    return _checked(
        gguf.path,
        fields,
        layer_types=_gguf_layer_types(gguf, fields["num_hidden_layers"]),
        rope_theta=_or_default(gguf.number("gemma3.rope.freq_base"), _FULL_ROPE_THETA),
        rope_local_theta=_or_default(gguf.number("gemma3.rope.freq_base_swa"), _SLIDING_ROPE_THETA),
        rope_scaling_factor=1.0 if scaling_type in (None, "none") else factor,
        rms_norm_eps=_required(
            gguf.path,
            "metadata gemma3.attention.layer_norm_rms_epsilon",
            gguf.number("gemma3.attention.layer_norm_rms_epsilon"),
        ),
        final_logit_softcapping=gguf.number("gemma3.final_logit_softcapping") or 0.0,
    )


def _gguf_layer_types(gguf: GgufFile, layers: int) -> tuple[str, ...]:
    key = "gemma3.attention.sliding_window_pattern"
    value = gguf.metadata.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return _layer_types_every(gguf.path, value, layers, f"metadata {key}")
    flags = gguf.numbers(key)
    if flags is None or flags.shape != (layers,):
        raise CheckpointError(gguf.path, f"metadata {key} does not have one entry per layer ({layers})")
    return tuple(SLIDING if flag else FULL for flag in flags.tolist())


def config_from_hugging_face(path: str, config: Mapping[str, Any]) -> TextConfig:
    """The configuration in a parsed ``config.json``; ``path`` names that file in errors.

    Understands the layout of transformers 5 (``rope_parameters`` per layer type) and of 4.50 and later
    (``rope_theta``, ``rope_local_base_freq``, ``rope_scaling``, ``sliding_window_pattern``).

    Raises:
        CheckpointError: unknown model type, or a field that is missing, out of range or not supported.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise CheckpointError(
            path,
            f"model_type {printable(repr(model_type))} is not supported "
            f"(supported: {', '.join(SUPPORTED_MODEL_TYPES)})",
        )
    tied = config.get("tie_word_embeddings", True)
    if model_type == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise CheckpointError(path, "field text_config is missing")
        tied = text.get("tie_word_embeddings", tied)
        config = _GEMMA3_TEXT_DEFAULTS | dict(text)
    for field, accepted in (
        ("tie_word_embeddings", (True, None)),
        ("attention_bias", (False, None)),
        ("attn_logit_softcapping", (None, 0)),
        ("use_bidirectional_attention", (False, None)),
        ("hidden_activation", ("gelu_pytorch_tanh", None)),
        ("quantization_config", (None,)),
    ):
        value = tied if field == "tie_word_embeddings" else config.get(field)
        if value not in accepted:
            raise CheckpointError(path, f"field {field} = {printable(repr(value))} is not supported")

    fields: dict[str, Any] = {}
    for field in _LIMITS:
        fields[field] = config.get(field)
        _check_size(path, f"field {field}", field, fields[field])
    fields["query_pre_attn_scalar"] = _number(path, config, "query_pre_attn_scalar")
    full_theta, full_factor, sliding_theta = _rope_from_hugging_face(path, config)
    return _checked(
        path,
        fields,
        layer_types=_layer_types_from_hugging_face(path, config, fields["num_hidden_layers"]),
        rope_theta=full_theta,
        rope_local_theta=sliding_theta,
        rope_scaling_factor=full_factor,
        rms_norm_eps=_number(path, config, "rms_norm_eps"),
        final_logit_softcapping=_number(path, config, "final_logit_softcapping", 0.0),
    )


def _rope_from_hugging_face(path: str, config: Mapping[str, Any]) -> tuple[float, float, float]:
    """(base of full layers, linear factor of full layers, base of sliding layers)."""
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(path, "field rope_parameters is not an object")
    if parameters and not {SLIDING, FULL} & parameters.keys():
        parameters = {FULL: parameters}  # one flat set of parameters, as configs converted by hand have it
    full = parameters.get(FULL) or {}
    sliding = parameters.get(SLIDING) or {}
    scaling = config.get("rope_scaling") or {}
    for name, value in (
        (f"rope_parameters.{FULL}", full),
        (f"rope_parameters.{SLIDING}", sliding),
        ("rope_scaling", scaling),
    ):
        if not isinstance(value, Mapping):
            raise CheckpointError(path, f"field {name} is not an object")
    full = {**full, **scaling}
    if _rope_factor(path, sliding) != 1.0:
        raise CheckpointError(path, "RoPE scaling of sliding layers is not supported")
    full_theta = _number(path, full, "rope_theta", _number(path, config, "rope_theta", _FULL_ROPE_THETA))
    sliding_theta = _number(
        path, sliding, "rope_theta", _number(path, config, "rope_local_base_freq", _SLIDING_ROPE_THETA)
    )
    return full_theta, _rope_factor(path, full), sliding_theta


def _rope_factor(path: str, rope: Mapping[str, Any]) -> float:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return 1.0
    if kind != "linear":
        raise CheckpointError(path, f"RoPE type {printable(repr(kind))} is not supported (supported: default, linear)")
    return _number(path, rope, "factor")


def _layer_types_from_hugging_face(path: str, config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types is None:
        pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        return _layer_types_every(path, pattern, layers, "field sliding_window_pattern")
    if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise CheckpointError(path, f"field layer_types is not a list of {layers} times {SLIDING} or {FULL}")
    return tuple(types)


def _layer_types_every(path: str, pattern: Any, layers: int, where: str) -> tuple[str, ...]:
    """Every ``pattern``-th layer attends to everything."""
    if pattern is None:
        pattern = _LAYERS_PER_FULL
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        raise CheckpointError(path, f"{where} = {printable(repr(pattern))} is not a positive integer")
    return tuple(FULL if (index + 1) % pattern == 0 else SLIDING for index in range(layers))


def _check_size(path: str, where: str, field: str, value: Any) -> None:
    value = _required(path, where, value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LIMITS[field]:
        raise CheckpointError(path, f"{where} = {printable(repr(value))} is not an integer from 1 to {_LIMITS[field]}")


def _required(path: str, where: str, value: Any) -> Any:
    if value is None:
        raise CheckpointError(path, f"{where} is missing")
    return value


def _or_default(value: float | None, default: float) -> float:
    return default if value is None else value


def _number(path: str, fields: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = fields.get(field)
    if value is None:
        value = _required(path, f"field {field}", default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise CheckpointError(path, f"field {field} = {printable(repr(value))} is not a finite number")
    return float(value)


def _checked(
    path: str,
    sizes: Mapping[str, Any],
    *,
    layer_types: tuple[str, ...],
    rope_theta: float,
    rope_local_theta: float,
    rope_scaling_factor: float,
    rms_norm_eps: float,
    final_logit_softcapping: float,
) -> TextConfig:
    """The configuration, if its fields fit together."""
    config = TextConfig(
        architecture="gemma3",
        **{
            field: value
            for field, value in sizes.items()
            if field not in ("num_hidden_layers", "query_pre_attn_scalar")
        },
        layer_types=layer_types,
        rope_theta=rope_theta,
        rope_local_theta=rope_local_theta,
        rope_scaling_factor=rope_scaling_factor,
        rms_norm_eps=rms_norm_eps,
        query_pre_attn_scalar=float(sizes["query_pre_attn_scalar"]),
        final_logit_softcapping=final_logit_softcapping,
    )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            path,
            f"{config.num_attention_heads} attention heads are no multiple of "
            f"{config.num_key_value_heads} key-value heads",
        )
    if config.head_dim % 2:
        raise CheckpointError(path, f"head_dim = {config.head_dim} is odd: RoPE rotates pairs")
    positive = {
        "rope_theta": rope_theta,
        "rope_local_theta": rope_local_theta,
        "rope_scaling_factor": rope_scaling_factor,
        "rms_norm_eps": rms_norm_eps,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
    }
    for field, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise CheckpointError(path, f"{field} = {value} is not positive")
    if not (math.isfinite(final_logit_softcapping) and final_logit_softcapping >= 0):
        raise CheckpointError(path, f"final_logit_softcapping = {final_logit_softcapping} is negative")
    return config
