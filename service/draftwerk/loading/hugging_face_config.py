"""Configurations from Hugging Face's ``config.json``.

Gemma 3 in the layouts of transformers 4.50 and later and of transformers 5; Gemma 4 in both layouts that exist: with
``global_head_dim`` and ``num_global_key_value_heads``, and with ``per_layer_config`` (transformers 5.17). What a file
leaves out has the value that transformers' configuration classes give it; the tests compare with them. A log line says
which values of Gemma 4 these were, and no model is without a hidden size of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from draftwerk.loading.config import (
    FULL,
    SLIDING,
    AssistantConfig,
    TextConfig,
    check_assistant,
    check_size,
    check_text,
    gemma3_text,
    gemma4_text,
    layer_types_every,
)
from draftwerk.loading.errors import CheckpointError, printable

_logger = logging.getLogger(__name__)

MODEL_TYPES = ("gemma3_text", "gemma3", "gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified")
MULTIMODAL_TYPES = ("gemma3", "gemma4", "gemma4_unified")
ASSISTANT_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")

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
_GEMMA4_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
}
_GEMMA4_UNIFIED_TEXT_DEFAULTS: dict[str, Any] = {
    **_GEMMA4_TEXT_DEFAULTS,
    "max_position_embeddings": 262_144,
    "sliding_window": 1024,
    # Unified models have neither of these.
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
_GEMMA4_ROPE_DEFAULTS: dict[str, Any] = {
    SLIDING: {"rope_type": "default", "rope_theta": _SLIDING_ROPE_THETA},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": _FULL_ROPE_THETA},
}
_BACKBONE_DEFAULTS = {"gemma4_assistant": 1536, "gemma4_unified_assistant": 3840}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "max_position_embeddings",
)


def config_from_hugging_face(path: str, config: Mapping[str, Any]) -> TextConfig:
    """The configuration in a parsed ``config.json``; ``path`` names that file in errors.

    Raises:
        CheckpointError: unknown model type, or a field that is missing, out of range or not supported.
    """
    model_type = config.get("model_type")
    if model_type in ASSISTANT_TYPES:
        raise CheckpointError(
            path,
            f"is an MTP drafter (model_type {model_type!r}), not a model that generates by itself: "
            "give it to --drafter, and its target to --model",
        )
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            path, f"model_type {printable(repr(model_type))} is not supported (supported: {', '.join(MODEL_TYPES)})"
        )
    text = text_part(path, config)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    if model_type in ("gemma3", "gemma3_text"):
        return _gemma3(path, _GEMMA3_TEXT_DEFAULTS | dict(text) if model_type == "gemma3" else text, tied)
    return check_text(path, _gemma4(path, text, tied, unified=model_type.startswith("gemma4_unified")))


def assistant_config_from_hugging_face(path: str, config: Mapping[str, Any]) -> AssistantConfig:
    """The configuration of a drafter in a parsed ``config.json``; ``path`` names that file in errors.

    Raises:
        CheckpointError: it is that of something else, or a field is missing, out of range or not supported.
    """
    model_type = config.get("model_type")
    if model_type in MODEL_TYPES:
        raise CheckpointError(
            path,
            f"is a whole model (model_type {model_type!r}), not a drafter: that is a checkpoint of type "
            f"{' or '.join(ASSISTANT_TYPES)}",
        )
    if model_type not in ASSISTANT_TYPES:
        raise CheckpointError(
            path,
            f"model_type {printable(repr(model_type))} is not supported as a drafter "
            f"(supported: {', '.join(ASSISTANT_TYPES)})",
        )
    unified = model_type == "gemma4_unified_assistant"
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(path, "field text_config is missing")
    text_type = text.get("model_type", "gemma4_unified_text" if unified else "gemma4_text")
    if text_type not in ("gemma4_text", "gemma4_unified_text"):
        raise CheckpointError(path, f"text_config: model_type {printable(repr(text_type))} is not supported")
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    fields = _gemma4(path, text, tied, unified=text_type == "gemma4_unified_text", drafter=True)
    centroids = top_k = 0
    if _flag(path, config, "use_ordered_embeddings", False):
        centroids = check_size(path, "field num_centroids", "num_centroids", config.get("num_centroids", 2048))
        top_k = check_size(
            path,
            "field centroid_intermediate_top_k",
            "centroid_intermediate_top_k",
            config.get("centroid_intermediate_top_k", 32),
        )
    draft_vocabulary = 0
    if config.get("draft_vocab_size") is not None:
        draft_vocabulary = check_size(path, "field draft_vocab_size", "draft_vocab_size", config["draft_vocab_size"])
    backbone = config.get("backbone_hidden_size", _BACKBONE_DEFAULTS[model_type])
    return check_assistant(
        path,
        AssistantConfig(
            text=check_text(path, fields, drafter=True),
            backbone_hidden_size=check_size(path, "field backbone_hidden_size", "backbone_hidden_size", backbone),
            num_centroids=centroids,
            centroid_intermediate_top_k=top_k,
            draft_vocab_size=draft_vocabulary,
        ),
    )


def text_part(path: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the text model: those of ``text_config`` in a multimodal configuration.

    Raises:
        CheckpointError: there should be a ``text_config`` and is none.
    """
    if config.get("model_type") not in MULTIMODAL_TYPES:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(path, "field text_config is missing")
    return text


def _refuse_unsupported(path: str, config: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    for field, values in accepted.items():
        value = config.get(field)
        if value not in values:
            raise CheckpointError(path, f"field {field} = {printable(repr(value))} is not supported")


# --- Gemma 3 ---------------------------------------------------------------------------------------------------------


def _gemma3(path: str, config: Mapping[str, Any], tied: Any) -> TextConfig:
    _refuse_unsupported(
        path,
        {**config, "tie_word_embeddings": tied},
        {
            "tie_word_embeddings": (True, None),
            "attention_bias": (False, None),
            "attn_logit_softcapping": (None, 0),
            "use_bidirectional_attention": (False, None),
            "hidden_activation": ("gelu_pytorch_tanh", None),
        },
    )
    sizes = {field: check_size(path, f"field {field}", field, config.get(field)) for field in _SIZES}
    layers = sizes.pop("num_hidden_layers")
    full_theta, full_factor, sliding_theta = _gemma3_rope(path, config)
    fields = {
        **sizes,
        "query_pre_attn_scalar": _number(path, config, "query_pre_attn_scalar"),
        "layer_types": _gemma3_layer_types(path, config, layers),
        "rope_theta": full_theta,
        "rope_local_theta": sliding_theta,
        "rope_scaling_factor": full_factor,
        "rms_norm_eps": _number(path, config, "rms_norm_eps"),
        "final_logit_softcapping": _number(path, config, "final_logit_softcapping", 0.0),
    }
    return check_text(path, gemma3_text(fields))


def _gemma3_rope(path: str, config: Mapping[str, Any]) -> tuple[float, float, float]:
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
    if _linear_factor(path, sliding) != 1.0:
        raise CheckpointError(path, "RoPE scaling of sliding layers is not supported")
    full_theta = _number(path, full, "rope_theta", _number(path, config, "rope_theta", _FULL_ROPE_THETA))
    sliding_theta = _number(
        path, sliding, "rope_theta", _number(path, config, "rope_local_base_freq", _SLIDING_ROPE_THETA)
    )
    return full_theta, _linear_factor(path, full), sliding_theta


def _linear_factor(path: str, rope: Mapping[str, Any]) -> float:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return 1.0
    if kind != "linear":
        raise CheckpointError(path, f"RoPE type {printable(repr(kind))} is not supported (supported: default, linear)")
    return _number(path, rope, "factor")


def _gemma3_layer_types(path: str, config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    if config.get("layer_types") is not None:
        return _listed_layer_types(path, config["layer_types"], layers)
    period = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if period is None:
        period = _LAYERS_PER_FULL
    return layer_types_every(path, "field sliding_window_pattern", period, layers)


# --- Gemma 4 ---------------------------------------------------------------------------------------------------------


def _gemma4(path: str, given: Mapping[str, Any], tied: Any, *, unified: bool, drafter: bool = False) -> TextConfig:
    """The configuration in the fields of a Gemma4TextConfig; not checked whether they fit together."""
    _refuse_unsupported(
        path,
        {**given, "tie_word_embeddings": tied},
        {
            "tie_word_embeddings": (True, None),
            "attention_bias": (False, None),
            # "vision": tokens of an image see each other, and text is causal.
            "use_bidirectional_attention": ("vision", False, None),
            "hidden_activation": ("gelu_pytorch_tanh", None),
        },
    )
    config = {**given, **_defaults_for(path, given, unified=unified)}
    if unified:
        config |= {"enable_moe_block": False, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    sizes = {field: check_size(path, f"field {field}", field, config[field]) for field in _SIZES}
    layers = sizes.pop("num_hidden_layers")
    layer_types = _gemma4_layer_types(path, config, layers)
    k_eq_v = _flag(path, config, "attention_k_eq_v")
    shared = check_size(
        path, "field num_kv_shared_layers", "num_kv_shared_layers", config["num_kv_shared_layers"], least=0
    )
    if drafter and not shared:
        shared = layers
    per_layer = check_size(
        path,
        "field hidden_size_per_layer_input",
        "hidden_size_per_layer_input",
        config["hidden_size_per_layer_input"],
        least=0,
    )
    double_wide = _flag(path, config, "use_double_wide_mlp")
    experts = _experts(path, config)
    if drafter and (per_layer or experts["num_experts"] or (double_wide and not unified)):
        raise CheckpointError(
            path,
            "an assistant has no per-layer embeddings, experts or double-wide MLP, but "
            f"hidden_size_per_layer_input = {per_layer}, num_experts = {experts['num_experts']}, "
            f"use_double_wide_mlp = {double_wide}",
        )
    return gemma4_text(
        {
            **sizes,
            **_attention_sizes(path, config, sizes, layer_types, k_eq_v),
            **_gemma4_rope(path, config, layer_types),
            **experts,
            "layer_types": layer_types,
            "rms_norm_eps": _number(path, config, "rms_norm_eps"),
            # An assistant's logits are not capped, whatever its configuration says, and it projects no values.
            "final_logit_softcapping": 0.0 if drafter else _number(path, config, "final_logit_softcapping", 0.0),
            "attention_k_eq_v": k_eq_v and not drafter,
            "num_kv_shared_layers": shared,
            "use_double_wide_mlp": double_wide and not drafter,
            "hidden_size_per_layer_input": per_layer,
            "vocab_size_per_layer_input": per_layer
            and check_size(
                path,
                "field vocab_size_per_layer_input",
                "vocab_size_per_layer_input",
                config["vocab_size_per_layer_input"],
            ),
        }
    )


def _defaults_for(path: str, given: Mapping[str, Any], *, unified: bool) -> dict[str, Any]:
    """The values of the fields that are not given."""
    if "hidden_size" not in given:  # transformers' default is that of no published model
        raise CheckpointError(path, "field hidden_size is missing")
    defaults = _GEMMA4_UNIFIED_TEXT_DEFAULTS if unified else _GEMMA4_TEXT_DEFAULTS
    missing = {field: value for field, value in defaults.items() if field not in given}
    # Without a flag or a size that may be 0 it has no such part, and says all.
    sizes = [field for field, value in missing.items() if value and not _in_per_layer_config(field, given)]
    if sizes:
        values = ", ".join(f"{field} = {missing[field]}" for field in sizes)
        _logger.warning("%s: missing fields are taken as transformers takes them: %s", path, values)
    return missing


def _in_per_layer_config(field: str, config: Mapping[str, Any]) -> bool:
    return field == "global_head_dim" and "per_layer_config" in config


def _gemma4_layer_types(path: str, config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    if config.get("layer_types") is None:
        types = layer_types_every(path, "every", _LAYERS_PER_FULL, layers)
    else:
        types = _listed_layer_types(path, config["layer_types"], layers)
    if types[-1] != FULL:
        _logger.warning("%s: the last layer is taken for a %s layer, as transformers does", path, FULL)
    return (*types[:-1], FULL)


def _attention_sizes(
    path: str, config: Mapping[str, Any], sizes: Mapping[str, int], layer_types: tuple[str, ...], k_eq_v: bool
) -> dict[str, int]:
    """head_dim and num_key_value_heads of the sliding layers, and both of the full ones."""
    plain = {"head_dim": sizes["head_dim"], "num_key_value_heads": sizes["num_key_value_heads"]}
    overrides: dict[int, Mapping[str, Any]]
    if "per_layer_config" in config:
        overrides = _per_layer_overrides(path, config["per_layer_config"], len(layer_types))
    else:
        full = {"head_dim": config["global_head_dim"]}
        # Without K = V transformers does not look at the other number.
        if k_eq_v and config.get("num_global_key_value_heads") is not None:
            full["num_key_value_heads"] = config["num_global_key_value_heads"]
        overrides = {index: full for index, kind in enumerate(layer_types) if kind == FULL}
    found: dict[str, dict[str, int]] = {}
    for index, kind in enumerate(layer_types):
        layer = {**plain, **overrides.get(index, {})}
        for field in plain:
            where = f"field {field} of layer {index}"
            check_size(path, where, field, layer[field])
        if found.setdefault(kind, layer) != layer:
            raise CheckpointError(
                path,
                f"{kind} layers differ: layer {layer_types.index(kind)} has {_sizes(found[kind])}, "
                f"layer {index} {_sizes(layer)}",
            )
    full_sizes, sliding = found[FULL], found.get(SLIDING, plain)
    return {
        **sliding,
        "global_head_dim": full_sizes["head_dim"],
        "num_global_key_value_heads": full_sizes["num_key_value_heads"],
    }


def _sizes(layer: Mapping[str, int]) -> str:
    return ", ".join(f"{field} {value}" for field, value in layer.items())


def _per_layer_overrides(path: str, given: Any, layers: int) -> dict[int, Mapping[str, Any]]:
    """``per_layer_config`` by layer."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise CheckpointError(path, "field per_layer_config is not an object")
    overrides: dict[int, Mapping[str, Any]] = {}
    for key, values in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 4 and int(key) < layers):
            raise CheckpointError(
                path, f"field per_layer_config has no layer {printable(repr(key))} (0 to {layers - 1})"
            )
        if not isinstance(values, Mapping):
            raise CheckpointError(path, f"field per_layer_config.{key} is not an object")
        for field in values:
            if field not in ("head_dim", "num_key_value_heads"):
                raise CheckpointError(
                    path, f"field per_layer_config.{key}.{printable(field)} is not supported: all layers must have one"
                )
        if int(key) in overrides:
            raise CheckpointError(path, f"field per_layer_config has layer {int(key)} twice")
        overrides[int(key)] = values
    return overrides


def _gemma4_rope(path: str, config: Mapping[str, Any], layer_types: tuple[str, ...]) -> dict[str, float]:
    parameters = config.get("rope_parameters")
    if parameters is None:
        parameters = _GEMMA4_ROPE_DEFAULTS
    if not isinstance(parameters, Mapping):
        raise CheckpointError(path, "field rope_parameters is not an object")
    by_type = {}
    for kind in (FULL, SLIDING):
        rope = parameters.get(kind) if kind in layer_types else _GEMMA4_ROPE_DEFAULTS[kind]
        if not isinstance(rope, Mapping):
            missing = "is missing" if rope is None else "is not an object"
            raise CheckpointError(path, f"field rope_parameters.{kind} {missing}")
        by_type[kind] = _gemma4_rope_of(path, kind, rope)
    sliding_theta, sliding_factor, sliding_share = by_type[SLIDING]
    if (sliding_factor, sliding_share) != (1.0, 1.0):
        raise CheckpointError(path, "RoPE scaling or partial rotation of sliding layers is not supported")
    full_theta, full_factor, full_share = by_type[FULL]
    return {
        "rope_theta": full_theta,
        "rope_scaling_factor": full_factor,
        "rope_partial_rotary_factor": full_share,
        "rope_local_theta": sliding_theta,
    }


def _gemma4_rope_of(path: str, layer_type: str, rope: Mapping[str, Any]) -> tuple[float, float, float]:
    """(base, factor by which frequencies are divided, share of the pairs that rotate)."""
    where = f"rope_parameters.{layer_type}"
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _number(path, rope, "rope_theta", where=where)
    if kind == "default":  # whatever else is there is not looked at
        return theta, 1.0, 1.0
    share = _number(path, rope, "partial_rotary_factor", 1.0, where=where)
    if kind == "proportional":
        return theta, _number(path, rope, "factor", 1.0, where=where), share
    if kind == "linear" and share == 1.0:
        return theta, _number(path, rope, "factor", where=where), 1.0
    raise CheckpointError(
        path,
        f"RoPE type {printable(repr(kind))} of {layer_type} layers is not supported "
        "(supported: default, proportional, linear without partial rotation)",
    )


def _experts(path: str, config: Mapping[str, Any]) -> dict[str, int]:
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not _flag(path, config, "enable_moe_block"):
        return dict.fromkeys(names, 0)
    return {name: check_size(path, f"field {name}", name, config.get(name)) for name in names}


# --- fields ----------------------------------------------------------------------------------------------------------


def _listed_layer_types(path: str, types: Any, layers: int) -> tuple[str, ...]:
    if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise CheckpointError(path, f"field layer_types is not a list of {layers} times {SLIDING} or {FULL}")
    return tuple(types)


def _flag(path: str, fields: Mapping[str, Any], field: str, default: bool | None = None) -> bool:
    value = fields.get(field, default)
    if not isinstance(value, bool):
        raise CheckpointError(path, f"field {field} = {printable(repr(value))} is not true or false")
    return value


def _number(
    path: str, fields: Mapping[str, Any], field: str, default: float | None = None, *, where: str = ""
) -> float:
    name = f"{where}.{field}" if where else field
    value = fields.get(field)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(path, f"field {name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise CheckpointError(path, f"field {name} = {printable(repr(value))} is not a finite number")
    return float(value)
