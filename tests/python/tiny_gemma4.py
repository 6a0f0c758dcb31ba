"""Tiny random Gemma 4 models and their assistants in Hugging Face form: all of the architecture, none of the weight.

One function for each family of text decoders; every weight is random, norms, layer scalars and router scales included.
Rows are multiples of 32 long, so that every matrix can be quantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny_checkpoint

VOCABULARY = 352
EOS_TOKEN_ID = tiny_checkpoint.EOS_TOKEN_ID
BOS_TOKEN_ID = tiny_checkpoint.BOS_TOKEN_ID
HEAD_DIM, GLOBAL_HEAD_DIM = 32, 64
SLIDING, FULL = "sliding_attention", "full_attention"

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "global_head_dim": GLOBAL_HEAD_DIM,
    "sliding_window": 24,  # one and a half KV pages
    "max_position_embeddings": 1024,
    "final_logit_softcapping": 30.0,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "attn_implementation": "eager",
}
_DENSE: dict[str, Any] = {
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
_NO_PLE: dict[str, Any] = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}


def ple_shared(*, seed: int = 0, **changes: Any) -> transformers.Gemma4ForCausalLM:
    """As E2B: per-layer embeddings, layers that share K/V, and an MLP of double width in those."""
    return _causal(
        transformers.Gemma4ForCausalLM,
        {
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, FULL],
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        seed,
        changes,
    )


def dense_k_eq_v(*, seed: int = 0, **changes: Any) -> transformers.Gemma4ForCausalLM:
    """As 31B: full layers have fewer KV heads and no value projection."""
    return _causal(transformers.Gemma4ForCausalLM, {**_DENSE, **_NO_PLE}, seed, changes)


def moe(*, seed: int = 0, **changes: Any) -> transformers.Gemma4ForCausalLM:
    """As 26B-A4B: dense_k_eq_v() with experts beside every MLP."""
    return _causal(
        transformers.Gemma4ForCausalLM,
        {
            **_DENSE,
            **_NO_PLE,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
            "experts_implementation": "eager",
        },
        seed,
        changes,
    )


def unified(*, seed: int = 0, **changes: Any) -> transformers.Gemma4UnifiedForCausalLM:
    """As 12B: the text decoder of gemma4_unified, in shape like dense_k_eq_v()."""
    return _causal(transformers.Gemma4UnifiedForCausalLM, _DENSE, seed, changes)


FAMILIES = {"ple_shared": ple_shared, "dense_k_eq_v": dense_k_eq_v, "moe": moe, "unified": unified}


def assistant_for(
    model: transformers.PreTrainedModel, *, centroids: int = 0, top_k: int = 4, seed: int = 1, **changes: Any
) -> transformers.PreTrainedModel:
    """A drafter of four layers, narrower than the model, that reads the model's K/V.

    Args:
        model: the target, as the functions above make it or a Gemma 3.
        centroids: clusters of its head; has to divide the vocabulary (32 does). 0: a head over the whole vocabulary.
        top_k: clusters whose tokens get logits.
        seed: of the weights.
        changes: fields of the assistant's text configuration.
    """
    target = model.config.get_text_config()
    gemma3 = target.model_type == "gemma3_text"
    full, sliding = (target, target) if gemma3 else (target.per_layer_config[kind] for kind in (FULL, SLIDING))
    unified = target.model_type.startswith("gemma4_unified")
    values = {
        **_SIZES,
        **({} if unified else _NO_PLE),
        "vocab_size": target.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
        "num_key_value_heads": sliding.num_key_value_heads,
        "num_global_key_value_heads": full.num_key_value_heads,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "attention_k_eq_v": not gemma3 and target.attention_k_eq_v,
        "sliding_window": target.sliding_window,
        "rope_parameters": target.rope_parameters,
    } | changes
    values["num_hidden_layers"] = len(values["layer_types"])
    text_class = transformers.Gemma4UnifiedTextConfig if unified else transformers.Gemma4TextConfig
    config_class = transformers.Gemma4UnifiedAssistantConfig if unified else transformers.Gemma4AssistantConfig
    model_class = transformers.Gemma4UnifiedAssistantForCausalLM if unified else transformers.Gemma4AssistantForCausalLM
    config = config_class(
        text_config=text_class(**values),
        backbone_hidden_size=target.hidden_size,
        use_ordered_embeddings=centroids > 0,
        num_centroids=centroids or 2048,
        centroid_intermediate_top_k=top_k,
        attn_implementation="eager",
    )
    return randomised(model_class(config), seed)


def multimodal(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model as the text part of a multimodal one, with vision and audio parts as small as they can be."""
    text = model.config
    if text.model_type == "gemma4_unified_text":
        unified_config = transformers.Gemma4UnifiedConfig(
            text_config=text,
            vision_config={"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32, "patch_size": 4},
            audio_config={"audio_embed_dim": 32},
        )
        whole = transformers.Gemma4UnifiedForConditionalGeneration(unified_config)
    else:
        config = transformers.Gemma4Config(
            text_config=text,
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "position_embedding_size": 16,
                "use_clipped_linears": True,
                "standardize": True,
            },
            audio_config={
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [4, 4],
                "output_proj_dims": 32,
            },
        )
        whole = transformers.Gemma4ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    return whole.eval()


def randomised(
    model: transformers.PreTrainedModel, seed: int, logit_scale: float = 1.0
) -> transformers.PreTrainedModel:
    """The model with random weights in which every part of it shows in the logits, and logits of a spread near 2.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in sorted([*model.named_parameters(), *model.named_buffers()]):
            noise = torch.randn(values.shape, generator=generator)
            part = name.removesuffix(".weight").rpartition(".")[2]
            if part == "token_ordering":
                values.copy_(torch.randperm(values.numel(), generator=generator))
            elif part == "layer_scalar":
                values.copy_(0.9 + 0.15 * noise.clamp(-2, 2))
            elif part == "norm":  # the last one
                values.copy_(logit_scale * (6.0 + 0.6 * noise))
            elif part == "q_norm":  # attention has no other scale: scores with a spread near 1.5
                values.copy_((1.5 + 0.3 * noise) * values.numel() ** -0.5)
            elif values.dim() == 1:
                if "inv_freq" not in part:
                    values.copy_(1.0 + 0.3 * noise)
            elif part in ("embed_tokens", "embed_tokens_per_layer"):
                # Small against what the layers add, or every token would foretell itself: embedding and head are tied.
                values.copy_((0.05 if part == "embed_tokens" else 0.2) * noise)
            elif part == "proj":  # the router's, whose input has been scaled by hidden_size**-0.5
                values.copy_(1.5 * noise)
            elif values.dim() > 1 and part != "lm_head":  # that is embed_tokens
                values.copy_(noise / values.shape[-1] ** 0.5)
    return model.eval()


def save(
    model: transformers.PreTrainedModel,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> Path:
    """Writes the model in Hugging Face form, its weights in `dtype`, and rounds the weights of `model` to match."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(buffer.to(dtype))
    return tiny_checkpoint.save(model, directory, dtype=dtype, max_shard_size=max_shard_size)


def reference_logits(model: transformers.PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers in float32."""
    return tiny_checkpoint.reference_logits(model, token_ids)


def loaded_form(model: transformers.PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name to (type, shape, bytes) of every tensor that is saved, as loading yields them, for a model that save() has
    rounded to bfloat16."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if tensor.dim() == 1:
            found[name] = ("f32", tuple(tensor.shape), tensor.numpy().tobytes())
        else:
            matrix = tensor.reshape(-1, tensor.shape[-1]).to(torch.bfloat16)
            found[name] = ("bf16", tuple(matrix.shape), matrix.view(torch.int16).numpy().tobytes())
    return found


def _causal(
    model_class: type[transformers.PreTrainedModel], family: dict[str, Any], seed: int, changes: dict[str, Any]
) -> transformers.PreTrainedModel:
    values = {**_SIZES, **family, **changes}
    logit_scale = values.pop("logit_scale", 1.0)
    values.setdefault("num_hidden_layers", len(values["layer_types"]))
    return randomised(model_class(model_class.config_class(**values)), seed, logit_scale)
