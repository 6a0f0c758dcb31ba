"""What tiny_gemma4's assistants draft, by transformers, and reduced heads for them, which transformers has not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

import tiny_gemma4

_OWN_HEAD = ("lm_head.weight", "model.embed_tokens.weight", "masked_embedding.")


@dataclass(frozen=True)
class ReducedHead:
    """Some rows of the target's head in the place of an assistant's own.

    Attributes:
        token_ids: whose rows, int32 [tokens]; with centroids those of each one together.
        centroids: float32 [centroids, hidden size of the target], if there are some.
        top_k: centroids whose tokens get logits.
    """

    token_ids: torch.Tensor
    centroids: torch.Tensor | None = None
    top_k: int = 0

    def logits(self, model: transformers.PreTrainedModel, state: torch.Tensor) -> torch.Tensor:
        """Of the whole vocabulary, minus infinity where there is none, from a state [hidden size of the target]."""
        token_ids = self.token_ids.long()
        if self.centroids is not None:
            chosen = torch.topk(self.centroids @ state, self.top_k).indices
            token_ids = token_ids.view(self.centroids.shape[0], -1)[chosen].flatten()
        scored = model.get_output_embeddings().weight[token_ids] @ state
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:
            scored = cap * torch.tanh(scored / cap)
        logits = torch.full((model.config.get_text_config().vocab_size,), -torch.inf)
        return logits.index_copy(0, token_ids, scored)


def reduced_head(
    model: transformers.PreTrainedModel, tokens: int, *, centroids: int = 0, top_k: int = 0, seed: int = 2
) -> ReducedHead:
    """A head of some of the tokens of a model, in any order, with random centroids."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.get_text_config()
    token_ids = torch.randperm(text.vocab_size, generator=generator)[:tokens].int()
    if centroids == 0:
        return ReducedHead(token_ids)
    scale = text.hidden_size**-0.5
    return ReducedHead(token_ids, scale * torch.randn((centroids, text.hidden_size), generator=generator), top_k)


def save_reduced(
    assistant: transformers.PreTrainedModel, head: ReducedHead, directory: Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes an assistant with the reduced head instead of its own, as tiny_gemma4.save() does."""
    tiny_gemma4.save(assistant, directory, dtype=dtype)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "draft_vocab_size": len(head.token_ids),
        "use_ordered_embeddings": head.centroids is not None,
        "centroid_intermediate_top_k": head.top_k,
    }
    config.pop("num_centroids", None)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors = {name: values for name, values in tensors.items() if not name.startswith(_OWN_HEAD)}
    tensors["draft_token_ids"] = head.token_ids
    if head.centroids is not None:
        config["num_centroids"] = head.centroids.shape[0]
        head.centroids.copy_(head.centroids.to(dtype))
        tensors["masked_embedding.centroids.weight"] = head.centroids.to(dtype)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def reference_drafts(
    model: transformers.PreTrainedModel,
    assistant: transformers.PreTrainedModel,
    token_ids: Sequence[int],
    count: int,
    head: ReducedHead | None = None,
) -> tuple[list[int], torch.Tensor]:
    """Greedy drafts after `token_ids` by the assistant's own forward pass, given K/V of the positions before the last.

    Returns:
        The drafts, and the logits that each was taken from.
    """
    with torch.inference_mode():
        state, shared = _state_and_kv(model, torch.tensor([token_ids[:-1]]))
        token = torch.tensor([token_ids[-1:]])
        position = torch.tensor([[len(token_ids) - 1]])
        drafts, logits = [], []
        for _ in range(count):
            embedded = model.get_input_embeddings()(token)
            drafted = assistant(
                inputs_embeds=torch.cat([embedded, state], dim=-1), position_ids=position, shared_kv_states=shared
            )
            state = drafted.last_hidden_state
            row = drafted.logits[0, -1] if head is None else head.logits(model, state[0, -1])
            token = row.argmax().view(1, 1)
            drafts.append(int(token))
            logits.append(row)
    return drafts, torch.stack(logits)


def _state_and_kv(
    model: transformers.PreTrainedModel, before: torch.Tensor
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """The final state of the last position, and the K/V of all by layer type, of the last layer that owns some."""
    if model.config.model_type != "gemma3_text":
        outputs = model(before, use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
        return outputs.hidden_states[-1][:, -1:], outputs.shared_kv_states
    cache: Any = transformers.DynamicCache()  # without a configuration, so that sliding layers keep every position
    outputs = model(before, past_key_values=cache, output_hidden_states=True)
    shared = {
        kind: (layer.keys, layer.values) for kind, layer in zip(model.config.layer_types, cache.layers, strict=True)
    }
    return outputs.hidden_states[-1][:, -1:], shared
