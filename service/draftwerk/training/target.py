"""The frozen target of a training run: its states, keys and values, which the drafter reads, and its distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from draftwerk.loading import Checkpoint, TextConfig
from draftwerk.loading.config import FULL, SLIDING
from draftwerk.training.torch_tensors import torch_tensor


@dataclass(frozen=True)
class Features:
    """What a target computed of a batch.

    Attributes:
        states: normed final states [B, T, hidden].
        keys: layer type to keys [B, KV heads, T, head size] of its last layer with K/V of its own, rotated.
        values: layer type to values, in the shape of the keys.
    """

    states: Tensor
    keys: dict[str, Tensor]
    values: dict[str, Tensor]


class FrozenTarget:
    """A target in transformers' own classes, with the weights of an opened checkpoint (quantised ones dequantised).

    Attributes:
        config: its sizes and constants.
        device: where it is.
        dtype: of its weights and of everything that it computes.
        embedding: [vocabulary, hidden]; also its LM head.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.config: TextConfig = checkpoint.config
        self.device = torch.device(device)
        self.dtype = dtype
        config = _reference_config(self.config)
        gemma3 = self.config.architecture == "gemma3"
        reference = transformers.Gemma3TextModel if gemma3 else transformers.Gemma4TextModel
        shapes = _shapes(reference, config)
        state = {}
        for view in checkpoint.tensors():
            name = view.name.removeprefix("model.")
            if gemma3 and len(view.shape) == 1:  # norms, which add the one themselves
                state[name] = (torch_tensor(view) - 1.0).to(dtype)
            else:
                state[name] = torch_tensor(view, dtype).view(shapes[name])
        with _no_progress_bars():
            model: Any = reference.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
        self._model = model.requires_grad_(False).eval().to(self.device)
        self.embedding: Tensor = self._model.embed_tokens.weight
        owned = self.config.layer_types[: self.config.first_shared_layer]
        self._kv_layers = {kind: _last(owned, kind) for kind in (SLIDING, FULL) if kind in owned}

    def embed(self, token_ids: Tensor) -> Tensor:
        """Scaled embeddings [..., hidden] of token ids [...]."""
        embedded: Tensor = self._model.embed_tokens(token_ids)
        return embedded

    @torch.no_grad()
    def features(self, token_ids: Tensor) -> Features:
        """States, keys and values of sequences, each from position 0.

        Args:
            token_ids: [B, T]. Where a sequence ends before T, what follows changes nothing before.
        """
        cache = _LastKv(self._kv_layers.values())
        output = self._model(input_ids=token_ids, past_key_values=cache, use_cache=True)
        kept = {kind: cache.kept[layer] for kind, layer in self._kv_layers.items()}
        return Features(
            states=output.last_hidden_state,
            keys={kind: keys for kind, (keys, _) in kept.items()},
            values={kind: values for kind, (_, values) in kept.items()},
        )

    @torch.no_grad()
    def inputs_of_layer(self, layer: int, token_ids: Tensor) -> Tensor:
        """The residual stream [B, T, hidden] in front of a layer."""
        seen: list[Tensor] = []

        def record(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.append(arguments[0])

        with _removed(self._model.layers[layer].register_forward_pre_hook(record)):
            self._model(input_ids=token_ids, use_cache=False)
        return seen[0]

    def parameter(self, name: str) -> Tensor | None:
        """A weight by its canonical name, norms as the factor itself; ``None`` if there is none."""
        found: dict[str, Tensor] = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        weight = found.get(name.removeprefix("model."))
        if weight is None:
            return None
        adds_one = self.config.architecture == "gemma3" and weight.dim() == 1
        return weight.float() + 1.0 if adds_one else weight.float()

    @torch.no_grad()
    def logits(self, states: Tensor, head: Tensor | None = None) -> Tensor:
        """Logits [..., n] of normed states [..., hidden], in the target's dtype.

        Args:
            states: of any dtype.
            head: the rows [n, hidden] of the embedding whose tokens are wanted; by default all.
        """
        scored = nn.functional.linear(states.to(self.dtype), self.embedding if head is None else head)
        return softcap(scored, self.config.final_logit_softcapping)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)``; the logits themselves if ``cap`` is 0."""
    return logits if cap == 0.0 else cap * torch.tanh(logits / cap)


class _LastKv(DynamicCache):
    """Keeps keys and values of some layers, whole, and lets those of all others go."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self._wanted = frozenset(layers)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self._wanted:
            self.kept[layer_idx] = key_states, value_states
        return key_states, value_states


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _last(kinds: tuple[str, ...], kind: str) -> int:
    return len(kinds) - 1 - kinds[::-1].index(kind)


def _shapes(reference: Any, config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = reference(config)
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _reference_config(config: TextConfig) -> transformers.PreTrainedConfig:
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "final_logit_softcapping": config.final_logit_softcapping or None,
        "rope_parameters": rope_parameters(config),
        "attn_implementation": "sdpa",
    }
    if config.architecture == "gemma3":
        return transformers.Gemma3TextConfig(**fields, query_pre_attn_scalar=int(config.query_pre_attn_scalar))
    fields |= {
        "global_head_dim": config.global_head_dim,
        "num_kv_shared_layers": config.num_kv_shared_layers,
        "use_double_wide_mlp": config.use_double_wide_mlp,
        "attention_k_eq_v": config.attention_k_eq_v,
        "hidden_size_per_layer_input": config.hidden_size_per_layer_input,
        "vocab_size_per_layer_input": config.vocab_size_per_layer_input,
        "enable_moe_block": config.num_experts > 0,
        "num_experts": config.num_experts or None,
        "top_k_experts": config.top_k_experts or None,
        "moe_intermediate_size": config.moe_intermediate_size or None,
    }
    if config.attention_k_eq_v:
        fields["num_global_key_value_heads"] = config.num_global_key_value_heads
    return transformers.Gemma4TextConfig(**fields)


def rope_parameters(config: TextConfig) -> dict[str, dict[str, Any]]:
    """``rope_parameters`` of a configuration in transformers' form."""
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_partial_rotary_factor != 1.0:
        full |= {"rope_type": "proportional", "partial_rotary_factor": config.rope_partial_rotary_factor}
    elif config.rope_scaling_factor != 1.0:
        full |= {"rope_type": "linear"}
    if config.rope_scaling_factor != 1.0:
        full["factor"] = config.rope_scaling_factor
    return {SLIDING: {"rope_type": "default", "rope_theta": config.rope_local_theta}, FULL: full}
