"""A drafter in Hugging Face form as one GGUF file, its matrices quantised: what is passed on, a third of the size.

The file is of architecture ``gemma4-assistant``, with llama.cpp's keys and names as far as it has them, and two of our
own for a reduced head; :mod:`draftwerk.loading.gguf_config` says which.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import gguf
import numpy as np
import numpy.typing as npt

from draftwerk import _core
from draftwerk.loading import CheckpointError
from draftwerk.loading.config import FULL, SLIDING, TextConfig
from draftwerk.loading.gguf_checkpoint import drafter_tensor_name
from draftwerk.training.atomic_file import atomic_path
from draftwerk.training.errors import TrainingError
from draftwerk.training.export import open_drafter

if TYPE_CHECKING:
    from draftwerk.loading import AssistantCheckpoint, TensorView

Matrices = Literal["bf16", "q8_0", "q4_0"]
_ARCHITECTURE = "gemma4-assistant"
_TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
_BLOCK = 32  # values of a row that share a scale, in both quantised types
_STILL = 1e30  # divides the frequencies of pairs that shall not turn


def write_gguf(
    directory: str | os.PathLike[str], path: Path, *, matrices: Matrices, name: str, license_name: str | None = None
) -> None:
    """Writes the drafter in a directory as a GGUF file; vectors become float32.

    Args:
        directory: a drafter as draftwerk.loading.open_assistant() takes it, its weights as floats.
        path: of the file; one that is there is replaced when the new one is complete.
        matrices: what the matrices become. "q4_0" is for those of the layers; what is around them, of fewer parameters
            and each used for every draft, becomes q8_0 with it.
        name: what the drafter calls itself.
        license_name: the terms that it is under.

    Raises:
        TrainingError: it cannot be read, quantised or written; then a file that was there is what it was.
    """
    try:
        drafter = open_drafter(directory)
        with atomic_path(path) as temporary:
            writer = gguf.GGUFWriter(str(temporary), _ARCHITECTURE)
            writer.add_name(name)
            if license_name is not None:
                writer.add_license(license_name)
            if drafter.base_model is not None:
                writer.add_base_model_count(1)
                writer.add_base_model_name(0, drafter.base_model)
            _add_configuration(writer, drafter)
            for tensor in drafter.tensors():
                _add_tensor(writer, tensor, matrices)
            if drafter.head_token_ids is not None:
                reduced = drafter.config.draft_vocab_size > 0
                ids = "draft_token_ids" if reduced else "masked_embedding.token_ordering"
                writer.add_tensor(drafter_tensor_name(ids), drafter.head_token_ids)
            if FULL in drafter.config.text.layer_types:
                writer.add_tensor("rope_freqs.weight", _rope_divisors(drafter.config.text))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        raise TrainingError(f"{path}: the drafter cannot be written ({error.strerror or error})") from error


def _add_configuration(writer: gguf.GGUFWriter, drafter: AssistantCheckpoint) -> None:
    config, text = drafter.config, drafter.config.text
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_nextn_predict_layers(text.num_hidden_layers)
    writer.add_embedding_length(text.hidden_size)
    writer.add_embedding_length_out(config.backbone_hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv([text.kv_heads_of(kind) for kind in text.layer_types])
    writer.add_shared_kv_layers(text.num_kv_shared_layers)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_sliding_window(text.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in text.layer_types])
    writer.add_key_length(text.global_head_dim)
    writer.add_value_length(text.global_head_dim)
    writer.add_rope_dimension_count(text.global_head_dim)
    writer.add_key_length_swa(text.head_dim)
    writer.add_value_length_swa(text.head_dim)
    writer.add_rope_dimension_count_swa(text.head_dim)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_rope_freq_base_swa(text.rope_local_theta)
    if text.rope_scaling_factor != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(text.rope_scaling_factor)
    if config.num_centroids:
        writer.add_uint32(f"{_ARCHITECTURE}.centroid_top_k", config.centroid_intermediate_top_k)
    if config.draft_vocab_size:
        writer.add_uint32(f"{_ARCHITECTURE}.draft_vocab_size", config.draft_vocab_size)


def _add_tensor(writer: gguf.GGUFWriter, tensor: TensorView, matrices: Matrices) -> None:
    rows = int(np.prod(tensor.shape[:-1]))
    values = _core.dequantize(tensor.dtype, tensor.data, tensor.shape[-1], rows).reshape(tensor.shape)
    stored = drafter_tensor_name(tensor.name)
    if values.ndim == 1:
        writer.add_tensor(stored, values)
        return
    if matrices != "bf16" and values.shape[1] % _BLOCK:
        raise TrainingError(
            f"matrices = {matrices!r}: tensor {tensor.name} has rows of {values.shape[1]} values, "
            f"which is no multiple of {_BLOCK}"
        )
    kind = _TYPES["q8_0" if matrices == "q4_0" and ".layers." not in tensor.name else matrices]
    writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _rope_divisors(text: TextConfig) -> npt.NDArray[np.float32]:
    """What llama.cpp divides the frequencies of a full layer's pairs by."""
    pairs = text.global_head_dim // 2
    turning = int(text.rope_partial_rotary_factor * text.global_head_dim / 2)
    return np.array([1.0] * turning + [_STILL] * (pairs - turning), dtype=np.float32)
