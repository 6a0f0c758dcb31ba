"""Opening a GGUF file: its tensors under their Hugging Face names, its tokenizer and chat template.

The names are those of the ``gguf`` package 0.19 and, for drafters, of llama.cpp's converter. What that converter does
to Gemma 4's tensors: nothing to norms (Gemma 3's have 1 added), layer scalars are vectors of one, the router's scale
and its per-expert scale become ``ffn_gate_inp.scale`` and ``ffn_down_exps.scale``, and experts stay
``[experts, rows, columns]`` with gate and up either in one tensor, gate first, or in two.
"""

from __future__ import annotations

from pathlib import Path

from draftwerk.loading.checkpoint import AssistantCheckpoint, Checkpoint
from draftwerk.loading.config import TextConfig
from draftwerk.loading.errors import CheckpointError, printable_name
from draftwerk.loading.gguf import GgufFile
from draftwerk.loading.gguf_config import assistant_config_from_gguf, config_from_gguf
from draftwerk.loading.tensors import FileRange, FoundTensors, Source, histogram
from draftwerk.loading.tokenizer import Tokenizer, tokenizer_from_gguf
from draftwerk.loading.vocabulary_checks import (
    DRAFT_TOKEN_IDS,
    HEAD,
    TOKEN_ORDERING,
    chat_template,
    checked_ids,
    end_token_ids,
    head_token_ids,
)

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
# A drafter's, each under both names that exist; see gguf_config.
_DRAFTER_NAMES = {
    "token_embd.weight": HEAD,
    "output_norm.weight": "model.norm.weight",
    "nextn.pre_projection.weight": "pre_projection.weight",
    "nextn.post_projection.weight": "post_projection.weight",
    "masked_embd_centroids.weight": "masked_embedding.centroids.weight",
    "masked_embd_ordering": TOKEN_ORDERING,
    "mtp.pre_projection.weight": "pre_projection.weight",
    "mtp.post_projection.weight": "post_projection.weight",
    "mtp.centroids.weight": "masked_embedding.centroids.weight",
    "mtp.token_ordering.weight": TOKEN_ORDERING,
    "draft_token_ids": DRAFT_TOKEN_IDS,  # ours alone
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    # from here on Gemma 4 alone
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_gate_exps.weight": "experts.gate_proj",
    "ffn_up_exps.weight": "experts.up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "layer_output_scale.weight": "layer_scalar",
}
# Whose content is in the configuration.
_READ_ALREADY = ("rope_freqs.weight",)


def open_model(path: str, name: str | None) -> Checkpoint:
    """Opens a model.

    Args:
        path: of the file.
        name: what to call it; by default as it calls itself, or as the file.

    Raises:
        CheckpointError: it is damaged or not supported.
    """
    gguf = GgufFile(path)
    config = config_from_gguf(gguf)
    found = _find_tensors(gguf, config, _NAMES, f"a {config.architecture.replace('gemma', 'Gemma ')} model")
    for index in range(config.num_hidden_layers) if config.num_experts else ():
        experts = f"model.layers.{index}.experts."
        pair = (f"{experts}gate_proj", f"{experts}up_proj")
        found.interleave(pair, config.moe_intermediate_size, f"{experts}gate_up_proj")
    layers = f"{config.architecture}, {config.num_hidden_layers} layers"
    sources = found.match(config.expected_tensors(), config.ignored_tensors(), layers)
    tokenizer = tokenizer_from_gguf(gguf)
    gguf.release_directory()
    _check_vocabulary(path, tokenizer, config)
    template_source = gguf.string("tokenizer.chat_template")
    eos_ids = [gguf.integer(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    end_ids = end_token_ids(path, config, eos_ids, tokenizer, chats=template_source is not None)
    bos_id = gguf.integer("tokenizer.ggml.bos_token_id")
    special = {}
    if tokenizer is not None:
        bos_id = tokenizer.bos_token_id
        special = {"bos_token": tokenizer.piece_of(bos_id), "eos_token": tokenizer.piece_of(end_ids[0])}
    return Checkpoint(
        path=path,
        name=name or printable_name(gguf.string("general.name") or Path(path).stem),
        config=config,
        tokenizer=tokenizer,
        chat_template=chat_template(path, template_source, special),
        bos_token_id=checked_ids(path, config, [bos_id])[0] if bos_id is not None else None,
        eos_token_ids=end_ids,
        weight_types=histogram(sources),
        _sources=sources,
    )


def open_drafter(path: str, name: str | None) -> AssistantCheckpoint:
    """Opens a drafter; arguments and errors as of open_model()."""
    gguf = GgufFile(path)
    config = assistant_config_from_gguf(gguf)
    found = _find_tensors(gguf, config.text, _DRAFTER_NAMES, "a Gemma 4 assistant")
    token_ids = head_token_ids(found, config)
    layers = f"an assistant of {config.text.num_hidden_layers} layers"
    sources = found.match(config.expected_tensors(), config.text.ignored_tensors(), layers)
    gguf.release_directory()
    base_model = gguf.string("general.base_model.0.name")
    return AssistantCheckpoint(
        path=path,
        name=name or printable_name(gguf.string("general.name") or Path(path).stem),
        config=config,
        head_token_ids=token_ids,
        draft_length=None,
        base_model=None if base_model is None else printable_name(base_model),
        weight_types=histogram(sources),
        _sources=sources,
    )


def drafter_tensor_name(canonical: str) -> str:
    """What a tensor of a drafter is called in a file, in llama.cpp's dialect."""
    return _stored_name(canonical, _DRAFTER_NAMES)


def _find_tensors(gguf: GgufFile, config: TextConfig, names: dict[str, str], what: str) -> FoundTensors:
    found = FoundTensors(gguf.path, lambda canonical: _stored_name(canonical, names))
    for tensor in gguf.tensors.values():
        if tensor.name in _READ_ALREADY and config.architecture == "gemma4":
            continue
        canonical = names.get(tensor.name) or _layer_tensor(tensor.name)
        if canonical is None:
            raise CheckpointError(gguf.path, f"is not part of {what}", tensor=tensor.name)
        place = FileRange(gguf.file, tensor.offset, tensor.size)
        found.add(canonical, Source(tensor.name, tensor.type.name, tensor.shape, (place,)))
    return found


def _stored_name(canonical: str, names: dict[str, str]) -> str:
    for stored, name in names.items():
        if name == canonical:
            return stored
    _, _, index, part = canonical.split(".", 3)
    return f"blk.{index}.{_STORED_LAYER_NAMES[part]}"


_STORED_LAYER_NAMES = {canonical: stored for stored, canonical in _LAYER_NAMES.items()}


def _layer_tensor(stored: str) -> str | None:
    """The Hugging Face name of a layer's tensor; ``None`` if no Gemma has such a tensor."""
    block, _, rest = stored.partition(".")
    index, _, part = rest.partition(".")
    if block != "blk" or part not in _LAYER_NAMES:
        return None
    return f"model.layers.{index}.{_LAYER_NAMES[part]}"


def _check_vocabulary(path: str, tokenizer: Tokenizer | None, config: TextConfig) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            path, f"the vocabulary has {tokenizer.vocab_size} tokens, but the embedding only {config.vocab_size} rows"
        )
