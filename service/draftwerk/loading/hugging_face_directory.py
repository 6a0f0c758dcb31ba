"""Opening a Hugging Face directory, as the hub has it or as transformers' ``save_pretrained()`` writes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftwerk.loading.chat_template import ChatTemplate
from draftwerk.loading.checkpoint import AssistantCheckpoint, Checkpoint
from draftwerk.loading.compressed_tensors import holds_fp8
from draftwerk.loading.config import TextConfig
from draftwerk.loading.errors import CheckpointError, printable, printable_name
from draftwerk.loading.gguf_config import may_hold_model
from draftwerk.loading.hugging_face_config import (
    MULTIMODAL_TYPES,
    assistant_config_from_hugging_face,
    config_from_hugging_face,
    text_part,
)
from draftwerk.loading.safetensors import SafetensorsFile, parse_json_object
from draftwerk.loading.tensors import FileRange, FoundTensors, Source, histogram
from draftwerk.loading.tokenizer import tokenizer_from_directory
from draftwerk.loading.vocabulary_checks import (
    DRAFT_TOKEN_IDS,
    HEAD,
    chat_template,
    checked_ids,
    end_token_ids,
    head_token_ids,
)

_logger = logging.getLogger(__name__)
_MAX_JSON_BYTES = 1 << 26
# Where the text model's tensors lie: on the hub, in a multimodal checkpoint of transformers 4 and 5, in a bare
# `Gemma3TextModel`.
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")
# The other parts of multimodal models: Gemma 3's, Gemma 4's towers and embedders, Gemma 4 unified's embedder.
_OTHER_PARTS = tuple(
    prefix + part
    for part in (
        "vision_tower.",
        "multi_modal_projector.",
        "audio_tower.",
        "embed_vision.",
        "embed_audio.",
        "vision_embedder.",
    )
    for prefix in ("", "model.")
)
_DRAFTER_PARTS = ("pre_projection.", "post_projection.", "masked_embedding.")
_EMBEDDING = "model.embed_tokens.weight"


def open_model(directory: Path, name: str | None) -> Checkpoint:
    """Opens a model.

    Args:
        directory: where it lies.
        name: what to call it; by default as the directory.

    Raises:
        CheckpointError: it is damaged or not supported.
    """
    path = str(directory)
    raw = read_config(directory)
    config_path = str(directory / "config.json")
    config = config_from_hugging_face(config_path, raw)
    fp8 = holds_fp8(config_path, raw)
    found, skipped = _find_tensors(directory, _text_name)
    if fp8:
        found.attach_scales()
    _join_experts(found, config)
    if raw["model_type"] in MULTIMODAL_TYPES:
        _logger.info("%s is multimodal: only its text model is loaded (%d other tensors are skipped)", path, skipped)
    head = found.take(HEAD)
    if head is not None and head.shape != (config.vocab_size, config.hidden_size):
        raise found.error(
            HEAD,
            f"has shape {list(head.shape)}, not that of the embedding it is tied to, "
            f"{[config.vocab_size, config.hidden_size]}",
        )
    layers = f"{config.architecture}, {config.num_hidden_layers} layers"
    sources = found.match(config.expected_tensors(), config.ignored_tensors(), layers)

    text_config = text_part(config_path, raw)
    generation = _read_json(directory / "generation_config.json") or {}
    tokenizer_config = _read_json(directory / "tokenizer_config.json") or {}
    special = {
        kind: text
        for kind in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (text := _token_text(directory, kind, tokenizer_config.get(kind))) is not None
    }
    bos = _first(
        generation.get("bos_token_id"),
        text_config.get("bos_token_id"),
        raw.get("bos_token_id"),
        special.get("bos_token"),
    )
    if bos is not None and not isinstance(bos, str):
        bos = checked_ids(path, config, _as_ids(path, "bos_token_id", bos))[0]
    tokenizer = tokenizer_from_directory(directory, bos)
    bos_id = tokenizer.bos_token_id if tokenizer is not None else bos if isinstance(bos, int) else None
    if tokenizer is not None:
        special.setdefault("bos_token", tokenizer.piece_of(tokenizer.bos_token_id))
    template = _template(path, directory, tokenizer_config, special)
    eos = _first(generation.get("eos_token_id"), raw.get("eos_token_id"), text_config.get("eos_token_id"))
    eos_ids: list[int | None] = [] if eos is None else [*_as_ids(path, "eos_token_id", eos)]
    if tokenizer is not None and "eos_token" in special and (template is not None or not eos_ids):
        eos_ids.append(tokenizer.id_of(special["eos_token"]))
    return Checkpoint(
        path=path,
        name=name or printable_name(directory.resolve().name),
        config=config,
        tokenizer=tokenizer,
        chat_template=template,
        bos_token_id=bos_id,
        eos_token_ids=end_token_ids(path, config, eos_ids, tokenizer, chats=template is not None),
        weight_types=histogram(sources),
        _sources=sources,
        _norms_add_one=config.architecture == "gemma3",
    )


def open_drafter(directory: Path, name: str | None) -> AssistantCheckpoint:
    """Opens a drafter; arguments and errors as of open_model()."""
    path = str(directory)
    config_path = str(directory / "config.json")
    raw = read_config(directory)
    config = assistant_config_from_hugging_face(config_path, raw)
    fp8 = holds_fp8(config_path, raw)
    found, _ = _find_tensors(directory, _drafter_name)
    if fp8:
        found.attach_scales()
    if _EMBEDDING in found:  # the head is tied to it, and at times stored under this name alone
        found.take(HEAD)
        found.rename(_EMBEDDING, HEAD)
    token_ids = head_token_ids(found, config)
    layers = f"an assistant of {config.text.num_hidden_layers} layers"
    sources = found.match(config.expected_tensors(), config.text.ignored_tensors(), layers)
    generation = _read_json(directory / "generation_config.json") or {}
    length = generation.get("num_assistant_tokens")
    if length is not None and (type(length) is not int or not 1 <= length <= 1 << 10):
        raise CheckpointError(
            directory / "generation_config.json",
            f"num_assistant_tokens = {printable(repr(length))} is not an integer from 1 to {1 << 10}",
        )
    base_model = raw.get("base_model")
    return AssistantCheckpoint(
        path=path,
        name=name or printable_name(directory.resolve().name),
        config=config,
        head_token_ids=token_ids,
        draft_length=length,
        base_model=printable_name(base_model)
        if isinstance(base_model, str)
        else None,  # a remark: nothing depends on it
        weight_types=histogram(sources),
        _sources=sources,
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed ``config.json``.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise CheckpointError(directory, _instead(directory) or "no config.json: not a Hugging Face checkpoint")
    return raw


def _instead(directory: Path) -> str:
    """What a directory is that lacks a part of a checkpoint, and what to give instead; "" if that cannot be told."""
    if (directory / "run.json").exists():
        return f"is the directory of a training run: its drafter is {directory / 'drafter'}"
    if (directory / "adapter_config.json").exists():
        return (
            "is a LoRA adapter: merge it into its model (merge_and_unload() of peft), save that and give its directory"
        )
    ggufs = sorted(path for path in directory.glob("*.gguf") if may_hold_model(path.name))
    return f"holds GGUF files and no safetensors checkpoint: give the path of one, such as {ggufs[0]}" if ggufs else ""


# --- tensors ---------------------------------------------------------------------------------------------------------


def _find_tensors(directory: Path, canonical: Callable[[str], str | None]) -> tuple[FoundTensors, int]:
    """The tensors that have a canonical name, and how many have none."""
    found = FoundTensors(str(directory), lambda name: name)
    skipped = 0
    for shard, listed in _weight_files(directory).items():
        path = directory / shard
        if listed is not None and not any(map(canonical, listed)):
            skipped += len(listed)
            continue
        file = SafetensorsFile(path)
        for stored in file.tensors if listed is None else listed:
            name = canonical(stored)
            if name is None:
                skipped += 1
                continue
            tensor = file.tensors.get(stored)
            if tensor is None:
                raise CheckpointError(path, "is missing, though the index says it is here", tensor=stored)
            place = FileRange(file.file, tensor.offset, tensor.size)
            found.add(name, Source(stored, tensor.dtype, tensor.shape, (place,)))
    return found, skipped


def _join_experts(found: FoundTensors, config: TextConfig) -> None:
    """Experts that lie apart, each with a name of its own: quantised checkpoints have them as linear layers."""
    for layer in range(config.num_hidden_layers if config.num_experts else 0):
        prefix = f"model.layers.{layer}.experts."
        for into, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            if f"{prefix}0.{parts[0]}.weight" in found:
                names = [f"{prefix}{e}.{part}.weight" for e in range(config.num_experts) for part in parts]
                found.join_experts(names, config.num_experts, prefix + into)


def _weight_files(directory: Path) -> dict[str, list[str] | None]:
    """File name to the tensors to take from it, of every safetensors file of a directory; ``None`` for all of them."""
    # transformers too takes one file where there is one: an index beside it is left over.
    if (directory / "model.safetensors").exists():
        return {"model.safetensors": None}
    index_path = directory / "model.safetensors.index.json"
    index = _read_json(index_path)
    if index is None:
        raise CheckpointError(
            directory,
            _instead(directory) or "neither model.safetensors nor model.safetensors.index.json: no weights",
        )
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index_path, "weight_map is missing or empty")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # A shard is a file of this directory: an index must not make us open files elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise CheckpointError(index_path, f"{printable(repr(shard))} is not a file name", tensor=name)
        shards.setdefault(shard, []).append(name)
    return {**shards}


def _text_name(stored: str) -> str | None:
    """The name in a text-only checkpoint; ``None`` for what is no part of the text model."""
    if stored.startswith(_OTHER_PARTS) or "rotary_emb." in stored:
        return None
    base = stored.removesuffix("_scale")
    if base in (HEAD, "language_model.lm_head.weight"):
        return HEAD + stored.removeprefix(base)
    prefix = next(prefix for prefix in _TEXT_PREFIXES if stored.startswith(prefix))
    return "model." + stored.removeprefix(prefix)


def _drafter_name(stored: str) -> str | None:
    if "rotary_emb." in stored:
        return None
    own = stored.removesuffix("_scale") in (HEAD, DRAFT_TOKEN_IDS) or stored.startswith(_DRAFTER_PARTS)
    return stored if own else _text_name(stored)


# --- the small files -------------------------------------------------------------------------------------------------


def _as_ids(path: str, where: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(token_id) is not int for token_id in ids):
        raise CheckpointError(path, f"{where} = {printable(repr(value))} is neither a token id nor a list of them")
    return ids


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _token_text(directory: Path, kind: str, value: Any) -> str | None:
    """A special token of ``tokenizer_config.json``: its text, or an object with the text in ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            directory / "tokenizer_config.json", f"{kind} = {printable(repr(text))} is not valid Unicode"
        ) from None
    return text


def _read_text(path: Path) -> bytes | None:
    """The bytes of a small file; ``None`` if there is none."""
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise CheckpointError(path, "not a regular file")
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(path, error.strerror or str(error)) from error
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError(path, f"larger than {_MAX_JSON_BYTES} bytes")
    return text


def _read_json(path: Path) -> dict[str, Any] | None:
    text = _read_text(path)
    return None if text is None else parse_json_object(str(path), text, "the file")


def _template(
    path: str, directory: Path, tokenizer_config: Mapping[str, Any], special: Mapping[str, str]
) -> ChatTemplate | None:
    """From ``chat_template.jinja``, ``chat_template.json`` or ``tokenizer_config.json``."""
    jinja_path = directory / "chat_template.jinja"
    text = _read_text(jinja_path)
    if text is not None:
        try:
            return chat_template(path, text.decode("utf-8"), special)
        except UnicodeDecodeError:
            raise CheckpointError(jinja_path, "is not UTF-8") from None
    separate = _read_json(directory / "chat_template.json") or {}
    template = _first(separate.get("chat_template"), tokenizer_config.get("chat_template"))
    if isinstance(template, list):  # several by name
        template = next(
            (entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"),
            None,
        )
    if template is not None and not isinstance(template, str):
        raise CheckpointError(directory, "chat_template is not a text")
    return chat_template(path, template, special)
