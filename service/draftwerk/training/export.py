"""Drafters on disk, in the Hugging Face layout of ``gemma4_assistant``: written by training, read to go on from.

Two things are ours: ``draft_vocab_size`` in ``config.json`` and the tensor ``draft_token_ids`` say that the head is the
target's own embedding, of these tokens alone. Everything that a target of another family does differently is in the
weights and the configuration, so that the layout stays that of Gemma 4.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from draftwerk.loading import (
    AssistantCheckpoint,
    Checkpoint,
    CheckpointError,
    check_fits,
    is_hub_name,
    open_assistant,
    path_exists,
)
from draftwerk.loading.vocabulary_checks import DRAFT_TOKEN_IDS, HEAD, TOKEN_ORDERING
from draftwerk.training.atomic_file import atomic_file
from draftwerk.training.drafter import CENTROIDS, DrafterModule
from draftwerk.training.errors import TrainingError, WriteError
from draftwerk.training.shape import DrafterShape
from draftwerk.training.target import rope_parameters
from draftwerk.training.torch_tensors import torch_tensor

_STORED_NAMES = {HEAD: "model.embed_tokens.weight"}  # which transformers ties the head to


def open_drafter(drafter: str | os.PathLike[str]) -> AssistantCheckpoint:
    """Opens a drafter: a directory, a GGUF file or a name on the hub.

    Raises:
        TrainingError: there is none.
        CheckpointError: it is damaged, not supported, or no drafter.
    """
    if not (path_exists(drafter) or is_hub_name(os.fspath(drafter))):
        raise TrainingError(
            f"{drafter}: no such file or directory, and no name on the hub: give a drafter's directory, its GGUF file, "
            "or a name such as google/gemma-4-E2B-it-assistant"
        )
    return open_assistant(drafter)


def read_drafter(checkpoint: AssistantCheckpoint, target: Checkpoint) -> DrafterModule:
    """A drafter to go on from. Its layers and projections are trained, in float32, and the centroids of a reduced head.

    A head of its own stays as it is, and centroids with it: training compares its tokens whichever clusters a state
    would choose.

    Args:
        checkpoint: an opened drafter, quantised or not.
        target: what it drafts for.

    Returns:
        On the CPU.

    Raises:
        CheckpointError: it does not fit the target, or holds a value that is not finite.
    """
    check_fits(checkpoint, target)
    config = checkpoint.config
    weights: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for view in checkpoint.tensors():
        if view.name == HEAD or (view.name == CENTROIDS and not config.draft_vocab_size):
            head[view.name] = torch_tensor(view)
            continue
        weights[view.name] = torch_tensor(view, torch.float32)
        if not weights[view.name].isfinite().all():
            raise CheckpointError(checkpoint.path, "holds a value that is not finite", tensor=view.name)
    draft_token_ids = torch.arange(config.text.vocab_size)
    if checkpoint.head_token_ids is not None:
        ordered = torch.from_numpy(checkpoint.head_token_ids).long()
        if config.draft_vocab_size:
            draft_token_ids = ordered
        else:
            head[TOKEN_ORDERING] = ordered
    drafter = DrafterModule(DrafterShape.of(config, target.config), draft_token_ids, head)
    drafter.load_state_dict(weights)
    return drafter


def write_drafter(
    drafter: DrafterModule,
    weights: Mapping[str, Tensor],
    directory: Path,
    *,
    target_name: str,
    started_from: str | None = None,
    draft_length: int | None = None,
) -> None:
    """Writes a drafter: what is trained in bfloat16, a head of its own as it came.

    Args:
        drafter: what is written.
        weights: its parameters by name, such as their moving average (``Trainer.averaged``).
        directory: where to; must not exist, or be empty.
        target_name: what it was trained for.
        started_from: the drafter that it was trained from, for the model card; ``None``: the target's last layers.
        draft_length: how many tokens it should draft in a step; ``None`` leaves it to the engine.

    Raises:
        WriteError: it cannot be written; then nothing is left behind.
        TrainingError: there is something in the directory.
    """
    tensors = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    tensors |= {
        name: buffer.to("cpu", torch.bfloat16)
        for name, buffer in drafter.named_buffers()
        if name.endswith("layer_scalar")
    }
    tensors |= {_STORED_NAMES.get(name, name): tensor.contiguous() for name, tensor in drafter.head.items()}
    if drafter.shape.draft_vocab_size:
        tensors[DRAFT_TOKEN_IDS] = drafter.draft_token_ids.to("cpu", torch.int32)
    files = {
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
        "config.json": _json({**configuration(drafter.shape), "base_model": target_name}),
        # A name of a file need not be UTF-8.
        "README.md": _model_card(target_name, started_from).encode(errors="backslashreplace"),
    }
    if draft_length is not None:
        files["generation_config.json"] = _json({"num_assistant_tokens": draft_length})
    directory = directory.absolute()
    temporary = None
    try:
        if directory.exists() and any(directory.iterdir()):
            raise TrainingError(f"{directory}: is not empty; a drafter is written into a new directory")
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        for name, contents in files.items():
            with atomic_file(temporary / name) as file:
                file.write(contents)
        temporary.chmod(0o755)
        temporary.replace(directory)
    except OSError as error:
        raise WriteError(f"{directory}: the drafter cannot be written ({error.strerror})", error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def configuration(shape: DrafterShape) -> dict[str, Any]:
    """``config.json`` of a drafter."""
    text = shape.text
    config: dict[str, Any] = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": shape.backbone_hidden_size,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "use_ordered_embeddings": shape.num_centroids > 0,
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_kv_shared_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "num_global_key_value_heads": text.num_global_key_value_heads,
            "head_dim": text.head_dim,
            "global_head_dim": text.global_head_dim,
            # Only with this does transformers look at num_global_key_value_heads. No values are projected here anyway.
            "attention_k_eq_v": text.num_global_key_value_heads != text.num_key_value_heads,
            "sliding_window": text.sliding_window,
            "layer_types": list(text.layer_types),
            "rope_parameters": rope_parameters(text),
            "rms_norm_eps": text.rms_norm_eps,
            "max_position_embeddings": text.max_position_embeddings,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "enable_moe_block": False,
            "tie_word_embeddings": True,
        },
    }
    if shape.draft_vocab_size:
        config["draft_vocab_size"] = shape.draft_vocab_size
    if shape.num_centroids:
        config["num_centroids"] = shape.num_centroids
        config["centroid_intermediate_top_k"] = shape.centroid_intermediate_top_k
    return config


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _model_card(target: str, started_from: str | None) -> str:
    if started_from is None:
        start, sources = "whose last layers it started from and whose text it learned from", target
    else:
        start = f"whose text it learned from; it started from the drafter {started_from}"
        sources = f"{target} and of {started_from}"
    return _MODEL_CARD.format(target=target, start=start, sources=sources)


_MODEL_CARD = """\
---
library_name: draftwerk
tags: [speculative-decoding, multi-token-prediction]
---
# A drafter for {target}

It drafts tokens that {target} verifies: it changes how fast text comes, never which text. It reads the target's keys,
values, states and embedding, so it works with that target alone.

Trained with `draftwerk train-drafter` from {target}, {start}.
It is a derivative of {sources}, under their terms.
"""
