"""What the engine must know of a text model and of a drafter, and whether it fits together.

Where it is read from: :mod:`draftwerk.loading.hugging_face_config` and :mod:`draftwerk.loading.gguf_config`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftwerk.loading.errors import CheckpointError, printable

SLIDING = "sliding_attention"
FULL = "full_attention"

Shapes = dict[str, tuple[int, ...]]
"""Canonical name to shape, in the order of the forward pass."""

# Largest accepted value of each size. Generous, and small enough that no product of two of them overflows 64 bits and
# that no hostile value makes a reader allocate before the shapes are compared with the tensors in the file.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "num_global_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "global_head_dim": 1 << 14,
    "sliding_window": 1 << 30,
    "max_position_embeddings": 1 << 30,
    "num_kv_shared_layers": 1 << 10,
    "hidden_size_per_layer_input": 1 << 16,
    "vocab_size_per_layer_input": 1 << 24,
    "num_experts": 1 << 16,
    "top_k_experts": 1 << 16,
    "moe_intermediate_size": 1 << 22,
    "backbone_hidden_size": 1 << 20,
    "num_centroids": 1 << 20,
    "centroid_intermediate_top_k": 1 << 20,
    "draft_vocab_size": 1 << 24,
}


@dataclass(frozen=True)
class TextConfig:
    """Sizes and constants of a Gemma text model; field names are those of Hugging Face."""

    architecture: str  # "gemma3" or "gemma4"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int  # of the sliding layers
    num_global_key_value_heads: int  # of the full layers
    head_dim: int  # of the sliding layers
    global_head_dim: int  # of the full layers
    sliding_window: int  # positions a sliding layer sees, the token's own included
    layer_types: tuple[str, ...]  # "sliding_attention" or "full_attention", one per layer
    rope_theta: float  # RoPE base of the full layers
    rope_local_theta: float  # RoPE base of the sliding layers
    rope_scaling_factor: float  # linear RoPE scaling of the full layers: positions are divided by it; 1.0 = none
    rope_partial_rotary_factor: float  # in full layers the first int(factor * head_dim / 2) pairs rotate; 1.0 = all
    rms_norm_eps: float
    query_pre_attn_scalar: float  # attention scores are multiplied by query_pre_attn_scalar**-0.5
    max_position_embeddings: int
    final_logit_softcapping: float  # logits become c * tanh(logits / c); 0.0 = none
    value_norm: bool  # values are normalised per head, without a weight
    layer_scalars: bool  # every layer's output is multiplied by a number of its own
    num_kv_shared_layers: int  # the last layers, which read the K/V of the last layer of their type before them
    use_double_wide_mlp: bool  # these layers' MLP has twice the width
    attention_k_eq_v: bool  # full layers have no value projection: the values are the projected keys
    hidden_size_per_layer_input: int  # width of the per-layer embeddings; 0 = none
    vocab_size_per_layer_input: int
    num_experts: int  # beside the MLP of every layer; 0 = none
    top_k_experts: int
    moe_intermediate_size: int

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return len(self.layer_types)

    @property
    def first_shared_layer(self) -> int:
        """The index of the first layer that has no K/V of its own; the number of layers if all have."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    def head_dim_of(self, layer_type: str) -> int:
        """Size of an attention head in layers of this type."""
        return self.global_head_dim if layer_type == FULL else self.head_dim

    def kv_heads_of(self, layer_type: str) -> int:
        """Heads of keys and values in layers of this type."""
        return self.num_global_key_value_heads if layer_type == FULL else self.num_key_value_heads

    def expected_tensors(self) -> Shapes:
        """Canonical (Hugging Face) name to shape of every tensor of the model."""
        hidden, per_layer = self.hidden_size, self.hidden_size_per_layer_input
        expected: Shapes = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        if per_layer:
            all_layers = self.num_hidden_layers * per_layer
            expected["model.embed_tokens_per_layer.weight"] = (self.vocab_size_per_layer_input, all_layers)
            expected["model.per_layer_model_projection.weight"] = (all_layers, hidden)
            expected["model.per_layer_projection_norm.weight"] = (per_layer,)
        return expected | self.expected_layers()

    def expected_layers(self) -> Shapes:
        """The part of expected_tensors() that drafters have too: the layers and the norm behind them."""
        expected: Shapes = {}
        for index in range(self.num_hidden_layers):
            expected |= {f"model.layers.{index}.{part}": shape for part, shape in self._layer(index).items()}
        expected["model.norm.weight"] = (self.hidden_size,)
        return expected

    def ignored_tensors(self) -> set[str]:
        """Names of tensors that checkpoints may hold and nobody reads: K/V projections of layers that share K/V."""
        return {
            f"model.layers.{index}.self_attn.{part}.weight"
            for index in range(self.first_shared_layer, self.num_hidden_layers)
            for part in ("k_proj", "v_proj", "k_norm")
        }

    def _layer(self, index: int) -> Shapes:
        kind, hidden = self.layer_types[index], self.hidden_size
        head = self.head_dim_of(kind)
        queries, keys = self.num_attention_heads * head, self.kv_heads_of(kind) * head
        shares = index >= self.first_shared_layer
        mlp = self.intermediate_size * (2 if shares and self.use_double_wide_mlp else 1)
        layer: Shapes = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
        }
        if not shares:
            layer["self_attn.k_proj.weight"] = (keys, hidden)
            if not (self.attention_k_eq_v and kind == FULL):
                layer["self_attn.v_proj.weight"] = (keys, hidden)
        layer["self_attn.q_norm.weight"] = (head,)
        if not shares:
            layer["self_attn.k_norm.weight"] = (head,)
        layer |= {
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
        }
        if self.num_experts:
            layer |= {
                "post_feedforward_layernorm_1.weight": (hidden,),
                "router.scale": (hidden,),
                "router.proj.weight": (self.num_experts, hidden),
                "router.per_expert_scale": (self.num_experts,),
                "pre_feedforward_layernorm_2.weight": (hidden,),
                "experts.gate_up_proj": (self.num_experts, 2 * self.moe_intermediate_size, hidden),
                "experts.down_proj": (self.num_experts, hidden, self.moe_intermediate_size),
                "post_feedforward_layernorm_2.weight": (hidden,),
            }
        layer["post_feedforward_layernorm.weight"] = (hidden,)
        if self.hidden_size_per_layer_input:
            layer |= {
                "per_layer_input_gate.weight": (self.hidden_size_per_layer_input, hidden),
                "per_layer_projection.weight": (hidden, self.hidden_size_per_layer_input),
                "post_per_layer_input_norm.weight": (hidden,),
            }
        if self.layer_scalars:
            layer["layer_scalar"] = (1,)
        return layer


@dataclass(frozen=True)
class AssistantConfig:
    """Sizes of an MTP drafter ("assistant"): a few layers of Gemma 4 that read the K/V of the target."""

    text: TextConfig  # all of its layers share K/V, and kv_heads_of() are those of the target
    backbone_hidden_size: int  # hidden size of the target that it was made for
    num_centroids: int  # clusters of tokens that its head scores first; 0: it scores every token that it has
    centroid_intermediate_top_k: int  # clusters whose tokens get logits
    draft_vocab_size: int  # tokens that it drafts, by their rows of the target's head; 0: all, by a head of its own

    @property
    def head_tokens(self) -> int:
        """How many tokens the head can score."""
        return self.draft_vocab_size or self.text.vocab_size

    def expected_tensors(self) -> Shapes:
        """Canonical name to shape of every tensor but token ordering and draft tokens; the head is lm_head.weight."""
        hidden, backbone = self.text.hidden_size, self.backbone_hidden_size
        expected: Shapes = {"pre_projection.weight": (hidden, 2 * backbone), **self.text.expected_layers()}
        if self.num_centroids:
            scored = backbone if self.draft_vocab_size else hidden
            expected["masked_embedding.centroids.weight"] = (self.num_centroids, scored)
        if not self.draft_vocab_size:
            expected["lm_head.weight"] = (self.text.vocab_size, hidden)
        expected["post_projection.weight"] = (backbone, hidden)
        return expected


def check_size(path: str, where: str, field: str, value: Any, *, least: int = 1) -> int:
    """``value`` if it is a possible value of the size ``field``; ``where`` names it in errors.

    Raises:
        CheckpointError: it is missing, no integer, or out of range.
    """
    if value is None:
        raise CheckpointError(path, f"{where} is missing")
    limit = _LIMITS[field]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
        raise CheckpointError(path, f"{where} = {printable(repr(value))} is not an integer from {least} to {limit}")
    return value


def check_text(path: str, config: TextConfig, *, drafter: bool = False) -> TextConfig:
    """``config``, if its fields fit together.

    Args:
        path: names the file in errors.
        config: what was read.
        drafter: it is that of an assistant, whose layers all share K/V.

    Raises:
        CheckpointError: they do not.
    """

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(path, reason)

    for kind in dict.fromkeys(config.layer_types):
        heads, kv_heads = config.num_attention_heads, config.kv_heads_of(kind)
        if heads % kv_heads:
            raise refuse(f"{heads} attention heads are no multiple of {kv_heads} key-value heads ({kind})")
        if config.head_dim_of(kind) % 2:
            name = "head_dim" if config.head_dim == config.head_dim_of(kind) else "global_head_dim"
            raise refuse(f"{name} = {config.head_dim_of(kind)} is odd: RoPE rotates pairs")
    if not 0.0 < config.rope_partial_rotary_factor <= 1.0:
        raise refuse(f"partial_rotary_factor = {config.rope_partial_rotary_factor} is not above 0 and at most 1")
    for field in ("rope_theta", "rope_local_theta", "rope_scaling_factor", "rms_norm_eps", "query_pre_attn_scalar"):
        value = getattr(config, field)
        if not (math.isfinite(value) and value > 0):
            raise refuse(f"{field} = {value} is not positive")
    if not (math.isfinite(config.final_logit_softcapping) and config.final_logit_softcapping >= 0):
        raise refuse(f"final_logit_softcapping = {config.final_logit_softcapping} is negative")
    if drafter:
        if config.num_kv_shared_layers != config.num_hidden_layers:
            raise refuse(
                f"num_kv_shared_layers = {config.num_kv_shared_layers}: "
                f"all {config.num_hidden_layers} layers of an assistant have to share K/V"
            )
        return config
    _check_sharing(path, config)
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input < config.vocab_size:
        raise refuse(
            f"vocab_size_per_layer_input = {config.vocab_size_per_layer_input} is less than "
            f"vocab_size = {config.vocab_size}: some tokens would have no per-layer embedding"
        )
    if config.top_k_experts > config.num_experts:
        raise refuse(f"top_k_experts = {config.top_k_experts} is more than num_experts = {config.num_experts}")
    return config


def check_assistant(path: str, config: AssistantConfig) -> AssistantConfig:
    """``config``, if its fields fit together; those of its text part are known to.

    Raises:
        CheckpointError: they do not.
    """
    centroids, vocabulary = config.num_centroids, config.text.vocab_size
    if config.draft_vocab_size > vocabulary:
        raise CheckpointError(
            path, f"draft_vocab_size = {config.draft_vocab_size} is more than vocab_size = {vocabulary}"
        )
    if centroids and config.head_tokens % centroids:
        size = "draft_vocab_size" if config.draft_vocab_size else "vocab_size"
        raise CheckpointError(path, f"num_centroids = {centroids} does not divide {size} = {config.head_tokens}")
    if config.centroid_intermediate_top_k > centroids > 0:
        raise CheckpointError(
            path,
            f"centroid_intermediate_top_k = {config.centroid_intermediate_top_k} is more than "
            f"num_centroids = {centroids}",
        )
    return config


def layer_types_every(path: str, where: str, period: Any, layers: int) -> tuple[str, ...]:
    """Every ``period``-th layer attends to everything; ``where`` names the period in errors.

    Raises:
        CheckpointError: it is no positive integer.
    """
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise CheckpointError(path, f"{where} = {printable(repr(period))} is not a positive integer")
    return tuple(FULL if (index + 1) % period == 0 else SLIDING for index in range(layers))


def gemma3_text(fields: Mapping[str, Any]) -> TextConfig:
    """A Gemma 3 configuration from the fields that Gemma 3 has."""
    return TextConfig(
        architecture="gemma3",
        num_global_key_value_heads=fields["num_key_value_heads"],
        global_head_dim=fields["head_dim"],
        rope_partial_rotary_factor=1.0,
        value_norm=False,
        layer_scalars=False,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        attention_k_eq_v=False,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        num_experts=0,
        top_k_experts=0,
        moe_intermediate_size=0,
        **fields,
    )


def gemma4_text(fields: Mapping[str, Any]) -> TextConfig:
    """A Gemma 4 configuration from the fields in which Gemma 4 models differ."""
    return TextConfig(
        architecture="gemma4",
        query_pre_attn_scalar=1.0,  # the norms of queries and keys carry the scale
        value_norm=True,
        layer_scalars=True,
        **fields,
    )


def _check_sharing(path: str, config: TextConfig) -> None:
    shared, layers = config.num_kv_shared_layers, config.num_hidden_layers
    if shared >= layers:
        raise CheckpointError(
            path, f"num_kv_shared_layers = {shared}: at least one of the {layers} layers needs K/V of its own"
        )
    owned = set(config.layer_types[: config.first_shared_layer])
    for index in range(config.first_shared_layer, layers):
        if config.layer_types[index] not in owned:
            raise CheckpointError(
                path,
                f"layer {index} shares the K/V of a {config.layer_types[index]} layer, "
                f"but none of the first {config.first_shared_layer} layers is one",
            )
