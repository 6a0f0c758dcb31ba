"""Configurations from the metadata of GGUF files.

Keys and their meaning for Gemma 4 were read in llama.cpp's converter (conversion/gemma.py) and loaders
(src/models/gemma4.cpp, gemma4-assistant.cpp) and compared with dumps of published files: a 12B target, whose arrays for
`head_count_kv` and `sliding_window_pattern` have one entry per layer, and E2B assistants. Nothing was run against
llama.cpp.

Assistants exist in two dialects. `gemma4-assistant` is llama.cpp's; its own converter leaves the centroids out. The
older `gemma4_assistant` keeps them, under other names (`n_embd_backbone`, `n_centroids`, `centroid_top_k`). Files that
were rewritten from one to the other mix both, so each key and tensor is looked for under both names.

An assistant with a reduced head is our own addition to `gemma4-assistant`: `draft_vocab_size` and the tensor
`draft_token_ids`. As it has no `token_embd.weight`, the size of the vocabulary is in `vocab_size`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

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
from draftwerk.loading.gguf import GgufFile

ARCHITECTURES = ("gemma3", "gemma4")
ASSISTANT_ARCHITECTURES = ("gemma4-assistant", "gemma4_assistant")

# Gemma 3 defaults that files leave out (there is no layer pattern and no sliding RoPE base at all).
_LAYERS_PER_FULL = 6
_SLIDING_ROPE_THETA = 10_000.0
_FULL_ROPE_THETA = 1_000_000.0
_DEFAULT_CENTROID_TOP_K = 32
# llama.cpp rotates every pair of a full layer and divides the frequencies of those that shall not turn by this.
_STILL = 1e29


def config_from_gguf(gguf: GgufFile) -> TextConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
        CheckpointError: unknown architecture, or a key that is missing or out of range.
    """
    architecture = _architecture(gguf)
    if architecture in ASSISTANT_ARCHITECTURES:
        raise CheckpointError(
            gguf.path,
            f"is an MTP drafter (architecture {architecture!r}), not a model that generates by itself: "
            "give it to --drafter, and its target to --model",
        )
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            gguf.path,
            f"architecture {printable(architecture)!r} is not supported (supported: {', '.join(ARCHITECTURES)})",
        )
    if architecture == "gemma3":
        return _gemma3(gguf)
    return check_text(gguf.path, _gemma4(_Keys(gguf, architecture)))


def assistant_config_from_gguf(gguf: GgufFile) -> AssistantConfig:
    """The configuration of a drafter in a GGUF file's metadata.

    Raises:
        CheckpointError: it is that of something else, or a key is missing or out of range.
    """
    architecture = _architecture(gguf)
    if architecture in ARCHITECTURES:
        raise CheckpointError(
            gguf.path,
            f"is a whole model (architecture {architecture!r}), not a drafter: that is a GGUF file of "
            f"architecture {ASSISTANT_ARCHITECTURES[0]}",
        )
    if architecture not in ASSISTANT_ARCHITECTURES:
        raise CheckpointError(
            gguf.path,
            f"architecture {printable(architecture)!r} is not supported as a drafter "
            f"(supported: {ASSISTANT_ARCHITECTURES[0]})",
        )
    keys = _Keys(gguf, architecture)
    text = check_text(gguf.path, _gemma4(keys, drafter=True), drafter=True)
    centroids = _rows(gguf, ("masked_embd_centroids.weight", "mtp.centroids.weight"))
    top_k = keys.integer("centroid_top_k")
    return check_assistant(
        gguf.path,
        AssistantConfig(
            text=text,
            backbone_hidden_size=keys.size("backbone_hidden_size", "embedding_length_out", "n_embd_backbone"),
            num_centroids=centroids,
            centroid_intermediate_top_k=0
            if not centroids
            else keys.checked("centroid_intermediate_top_k", "centroid_top_k", top_k or _DEFAULT_CENTROID_TOP_K),
            draft_vocab_size=keys.size_or_none("draft_vocab_size", "draft_vocab_size"),
        ),
    )


def is_assistant_gguf(gguf: GgufFile) -> bool:
    """Whether the file holds a drafter."""
    return gguf.metadata.get("general.architecture") in ASSISTANT_ARCHITECTURES


def may_hold_model(file: str) -> bool:
    """Whether a file of this name may be a GGUF file of a text model: ``mmproj-F16.gguf`` is a vision part."""
    return file.endswith(".gguf") and not file.startswith("mmproj")


def _architecture(gguf: GgufFile) -> str:
    """The architecture of a file that holds a whole text model or drafter, supported or not.

    Raises:
        CheckpointError: it holds something else.
    """
    split = gguf.integer("split.count")
    if split is not None and split > 1:  # all parts but the first have no other metadata
        raise CheckpointError(
            gguf.path, f"is one of {split} parts of a split GGUF: merge them (llama-gguf-split --merge)"
        )
    architecture = gguf.string("general.architecture")
    if architecture is None:
        raise CheckpointError(gguf.path, "metadata general.architecture is missing")
    if architecture == "clip":
        raise CheckpointError(
            gguf.path,
            "is the vision or audio part of a model (architecture 'clip'): give the GGUF file of its text model",
        )
    return architecture


class _Keys:
    """Metadata of one architecture, by the part of the key behind its name."""

    def __init__(self, gguf: GgufFile, architecture: str) -> None:
        self.gguf = gguf
        self._prefix = f"{architecture}."

    def name(self, key: str) -> str:
        return f"metadata {self._prefix}{key}"

    def error(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(self.gguf.path, f"{self.name(key)} {reason}")

    def integer(self, key: str) -> int | None:
        return self.gguf.integer(self._prefix + key)

    def number(self, key: str) -> float | None:
        return self.gguf.number(self._prefix + key)

    def string(self, key: str) -> str | None:
        return self.gguf.string(self._prefix + key)

    def value(self, key: str) -> Any:
        return self.gguf.metadata.get(self._prefix + key)

    def checked(self, field: str, key: str, value: Any, *, least: int = 1) -> int:
        return check_size(self.gguf.path, self.name(key), field, value, least=least)

    def size(self, field: str, key: str, *others: str) -> int:
        """The size under ``key``, or under one of the other names that it has had."""
        found = next((name for name in (key, *others) if self.value(name) is not None), key)
        return self.checked(field, found, self.integer(found))

    def size_or_none(self, field: str, key: str) -> int:
        """A size that may be 0, and is where the key is missing."""
        return self.checked(field, key, self.integer(key) or 0, least=0)

    def per_layer(self, field: str, key: str, layers: int) -> list[int]:
        """Sizes of all layers: one for each, or one for all."""
        value = self.value(key)
        if not isinstance(value, np.ndarray):
            return [self.checked(field, key, self.integer(key))] * layers
        if value.shape != (layers,) or value.dtype.kind not in "iu":
            raise self.error(key, f"does not have one integer per layer ({layers})")
        return [self.checked(field, key, entry) for entry in value.tolist()]

    def linear_rope_factor(self) -> float:
        key = "rope.scaling.factor"
        scaling, factor = self.string("rope.scaling.type"), self.number(key)
        if scaling not in (None, "none", "linear"):
            raise CheckpointError(
                self.gguf.path, f"RoPE scaling {printable(scaling)!r} is not supported (supported: none, linear)"
            )
        # As in llama.cpp a factor alone is that of linear scaling, and 0 is none.
        if scaling == "none" or (scaling is None and not factor):
            return 1.0
        if factor is None or factor <= 0:
            raise self.error(
                key, f"is {'missing' if factor is None else factor}: linear RoPE scaling needs one above 0"
            )
        return factor

    def epsilon(self) -> float:
        key = "attention.layer_norm_rms_epsilon"
        value = self.number(key)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def number_or(self, key: str, default: float) -> float:
        value = self.number(key)
        return default if value is None else value


def _rows(gguf: GgufFile, names: Sequence[str]) -> int:
    """Rows of the matrix that has one of these names; 0 if there is none."""
    for name in names:
        tensor = gguf.tensors.get(name)
        if tensor is not None:
            if len(tensor.shape) != 2:
                raise CheckpointError(gguf.path, f"has shape {list(tensor.shape)}, not two dimensions", tensor=name)
            return tensor.shape[0]
    return 0


def _vocabulary(gguf: GgufFile) -> int:
    rows = _rows(gguf, ("token_embd.weight",))
    if rows == 0:
        raise CheckpointError(gguf.path, "is missing", tensor="token_embd.weight")
    return check_size(gguf.path, "rows of token_embd.weight", "vocab_size", rows)


def _drafter_vocabulary(keys: _Keys) -> int:
    """A reduced head has no embedding that would tell."""
    reduced = keys.size_or_none("draft_vocab_size", "draft_vocab_size")
    return keys.size("vocab_size", "vocab_size") if reduced else _vocabulary(keys.gguf)


# --- Gemma 3 ---------------------------------------------------------------------------------------------------------


def _gemma3(gguf: GgufFile) -> TextConfig:
    keys = _Keys(gguf, "gemma3")
    fields: dict[str, Any] = {
        "hidden_size": keys.size("hidden_size", "embedding_length"),
        "intermediate_size": keys.size("intermediate_size", "feed_forward_length"),
        "num_attention_heads": keys.size("num_attention_heads", "attention.head_count"),
        "num_key_value_heads": keys.size("num_key_value_heads", "attention.head_count_kv"),
        "head_dim": keys.size("head_dim", "attention.key_length"),
        "sliding_window": keys.size("sliding_window", "attention.sliding_window"),
        "max_position_embeddings": keys.size("max_position_embeddings", "context_length"),
        "vocab_size": _vocabulary(gguf),
    }
    layers = keys.size("num_hidden_layers", "block_count")
    if keys.integer("attention.value_length") not in (None, fields["head_dim"]):
        raise keys.error("attention.value_length", "differs from key_length: not supported")
    # Only the 27B scales attention by hidden_size / heads instead of head_dim (168 rather than 128, and GGUF does not
    # say so); llama.cpp too tells it by its 62 layers.
    heads_wide = fields["hidden_size"] // fields["num_attention_heads"]
    return check_text(
        gguf.path,
        gemma3_text(
            {
                **fields,
                "query_pre_attn_scalar": float(heads_wide if layers == 62 else fields["head_dim"]),
                "layer_types": _gemma3_layer_types(keys, layers),
                "rope_theta": keys.number_or("rope.freq_base", _FULL_ROPE_THETA),
                "rope_local_theta": keys.number_or("rope.freq_base_swa", _SLIDING_ROPE_THETA),
                "rope_scaling_factor": keys.linear_rope_factor(),
                "rms_norm_eps": keys.epsilon(),
                "final_logit_softcapping": keys.number("final_logit_softcapping") or 0.0,
            }
        ),
    )


def _gemma3_layer_types(keys: _Keys, layers: int) -> tuple[str, ...]:
    key = "attention.sliding_window_pattern"
    value = keys.value(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        period = _LAYERS_PER_FULL if value is None else value
        return layer_types_every(keys.gguf.path, keys.name(key), period, layers)
    return _flagged_layer_types(keys, layers)


def _flagged_layer_types(keys: _Keys, layers: int) -> tuple[str, ...]:
    """From an array that says of each layer whether it is a sliding one."""
    key = "attention.sliding_window_pattern"
    flags = keys.value(key)
    if not isinstance(flags, np.ndarray) or flags.shape != (layers,):
        raise keys.error(key, f"does not have one entry per layer ({layers})")
    return tuple(SLIDING if flag else FULL for flag in flags.tolist())


# --- Gemma 4 ---------------------------------------------------------------------------------------------------------


def _gemma4(keys: _Keys, *, drafter: bool = False) -> TextConfig:
    """Not checked whether it fits together."""
    gguf = keys.gguf
    layers = keys.size("num_hidden_layers", "block_count")
    layer_types = _flagged_layer_types(keys, layers)
    shared = keys.size_or_none("num_kv_shared_layers", "attention.shared_kv_layers")
    if drafter and not shared:
        shared = layers
    owning = layers - shared if 0 < shared < layers else layers
    heads = _the_same(
        keys, "attention.head_count", keys.per_layer("num_attention_heads", "attention.head_count", layers)
    )
    kv_heads = keys.per_layer("num_key_value_heads", "attention.head_count_kv", layers)
    kv_by_type = {
        kind: _the_same(
            keys, "attention.head_count_kv", [kv_heads[i] for i in range(layers) if layer_types[i] == kind], kind
        )
        for kind in dict.fromkeys(layer_types)
    }
    full_dim = keys.size("global_head_dim", "attention.key_length")
    sliding_dim = keys.size("head_dim", "attention.key_length_swa")
    for key, expected in (
        ("attention.value_length", full_dim),
        ("attention.value_length_swa", sliding_dim),
        ("rope.dimension_count", full_dim),
        ("rope.dimension_count_swa", sliding_dim),
    ):
        value = keys.integer(key)
        if value not in (None, expected):
            raise keys.error(key, f"= {value} differs from the head size, {expected}: not supported")
    intermediate, double_wide = _mlp_widths(keys, layers, owning)
    experts = keys.size_or_none("num_experts", "expert_count")
    per_layer = keys.size_or_none("hidden_size_per_layer_input", "embedding_length_per_layer_input")
    if drafter and (experts or per_layer):
        raise CheckpointError(
            gguf.path,
            f"an assistant has no experts or per-layer embeddings, but expert_count = {experts}, "
            f"embedding_length_per_layer_input = {per_layer}",
        )
    per_layer_rows = _rows(gguf, ("per_layer_token_embd.weight",))
    if per_layer and not per_layer_rows:
        raise CheckpointError(gguf.path, "is missing", tensor="per_layer_token_embd.weight")
    return gemma4_text(
        {
            "vocab_size": _drafter_vocabulary(keys) if drafter else _vocabulary(gguf),
            "hidden_size": keys.size("hidden_size", "embedding_length"),
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_by_type.get(SLIDING, kv_heads[0]),
            "num_global_key_value_heads": kv_by_type.get(FULL, kv_heads[0]),
            "head_dim": sliding_dim,
            "global_head_dim": full_dim,
            "sliding_window": keys.size("sliding_window", "attention.sliding_window"),
            "layer_types": layer_types,
            "rope_theta": keys.number_or("rope.freq_base", _FULL_ROPE_THETA),
            "rope_local_theta": keys.number_or("rope.freq_base_swa", _SLIDING_ROPE_THETA),
            "rope_scaling_factor": keys.linear_rope_factor(),
            "rope_partial_rotary_factor": _rotating_share(gguf, full_dim) if FULL in layer_types else 1.0,
            "rms_norm_eps": keys.epsilon(),
            "max_position_embeddings": keys.size("max_position_embeddings", "context_length"),
            "final_logit_softcapping": 0.0 if drafter else keys.number("final_logit_softcapping") or 0.0,
            "num_kv_shared_layers": shared,
            "use_double_wide_mlp": double_wide,
            "attention_k_eq_v": not drafter and _keys_are_values(gguf, layer_types[:owning]),
            "hidden_size_per_layer_input": per_layer,
            "vocab_size_per_layer_input": per_layer
            and check_size(
                gguf.path, "rows of per_layer_token_embd.weight", "vocab_size_per_layer_input", per_layer_rows
            ),
            "num_experts": experts,
            "top_k_experts": keys.size("top_k_experts", "expert_used_count") if experts else 0,
            "moe_intermediate_size": keys.size("moe_intermediate_size", "expert_feed_forward_length") if experts else 0,
        }
    )


def _the_same(keys: _Keys, key: str, values: Sequence[int], kind: str = "") -> int:
    if len(set(values)) != 1:
        raise keys.error(key, f"differs between {kind or 'the'} layers: not supported")
    return values[0]


def _mlp_widths(keys: _Keys, layers: int, owning: int) -> tuple[int, bool]:
    """(width of the MLP, whether it is twice that in the layers from ``owning`` on, which share K/V)."""
    key = "feed_forward_length"
    widths = keys.per_layer("intermediate_size", key, layers)
    first, shared = set(widths[:owning]), set(widths[owning:])
    width = widths[0]
    if first != {width} or shared not in (set(), {width}, {2 * width}):
        raise keys.error(key, "is neither the same in all layers nor doubled in those that share K/V")
    return width, shared == {2 * width}


def _keys_are_values(gguf: GgufFile, owning: Sequence[str]) -> bool:
    """Whether no full layer with K/V of its own has a value projection: that is how K = V shows in a GGUF."""
    full = [index for index, kind in enumerate(owning) if kind == FULL]
    return bool(full) and not any(f"blk.{index}.attn_v.weight" in gguf.tensors for index in full)


def _rotating_share(gguf: GgufFile, head_dim: int) -> float:
    """The share of the pairs that RoPE turns in full layers, from what their frequencies are divided by."""
    name = "rope_freqs.weight"
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise CheckpointError(gguf.path, "is missing", tensor=name)
    if tensor.shape != (head_dim // 2,) or tensor.type.name != "f32":
        raise CheckpointError(
            gguf.path, f"is {list(tensor.shape)} of {tensor.type.name}, not [{head_dim // 2}] of f32", tensor=name
        )
    divisors = np.frombuffer(gguf.file.bytes[tensor.offset : tensor.offset + tensor.size].tobytes(), dtype="<f4")
    turning = int(np.count_nonzero(divisors == 1.0))
    if turning == 0 or not ((divisors[:turning] == 1.0).all() and (divisors[turning:] >= _STILL).all()):
        raise CheckpointError(gguf.path, "holds other values than some 1 and then 1e30: not supported", tensor=name)
    share = 2 * turning / head_dim
    # The engine rounds down.
    return share if int(share * head_dim / 2) == turning else math.nextafter(share, 1.0)
