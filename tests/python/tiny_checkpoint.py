"""Tiny random Gemma 3 models in Hugging Face form: all of the architecture, none of the weight."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

# Matrices this small gain nothing from threads, and torch's spin at barriers while others want the processor.
torch.set_num_threads(1)

EOS_TOKEN_ID = 1
BOS_TOKEN_ID = 2


def tiny_config(**changes: Any) -> transformers.Gemma3TextConfig:
    """Both layer types, grouped queries, and a sliding window of one and a half KV pages."""
    values: dict[str, Any] = {
        "vocab_size": 352,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 24,
        "max_position_embeddings": 1024,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        "tie_word_embeddings": True,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "attn_implementation": "eager",
    }
    return transformers.Gemma3TextConfig(**{**values, **changes})


def tiny_model(*, seed: int = 0, logit_scale: float = 1.0, **changes: Any) -> transformers.Gemma3ForCausalLM:
    """A model whose every weight is random, norms included, in float32.

    Args:
        seed: of the weights.
        logit_scale: factor of the logits' spread; 1.0 gives a standard deviation near 2.5.
        changes: fields of the configuration.
    """
    model = transformers.Gemma3ForCausalLM(tiny_config(**changes))
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "model.norm.weight":
                parameter.copy_(logit_scale * (3.0 + 0.3 * noise) - 1.0)
            elif parameter.dim() == 1:  # norms multiply by 1 + w
                parameter.copy_(0.3 * noise)
            elif name == "model.embed_tokens.weight":
                # Small against what the layers add, or every token would foretell itself: embedding and head are tied.
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


def save(
    model: transformers.PreTrainedModel,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
) -> Path:
    """Writes the model in Hugging Face form, its weights in `dtype`, and rounds the weights of `model` to match."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    # A copy: converting the model itself would also round its RoPE frequencies.
    copy.deepcopy(model).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def reference_logits(model: transformers.PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers in float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0]
    return logits
