"""Opening a checkpoint: one view of a GGUF file or a Hugging Face directory.

Tensors come under their Hugging Face names, in the order of the forward pass, as the file holds them (quantised blocks
stay quantised), except that norms become the float32 factor the engine multiplies by.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from draftwerk.loading.builtin import BUILTIN_MODELS, Progress, resolve_builtin
from draftwerk.loading.chat_template import ChatTemplate, ChatTemplateError
from draftwerk.loading.config import TextConfig, config_from_gguf, config_from_hugging_face
from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.gguf import BLOCK_TYPES, GgufFile
from draftwerk.loading.mapped_file import ByteArray, MappedFile
from draftwerk.loading.safetensors import SafetensorsFile, parse_json_object
from draftwerk.loading.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf

_logger = logging.getLogger(__name__)
_MAX_JSON_BYTES = 1 << 26
# Tokens with which chat models end their turn, where a GGUF's metadata names only <eos>.
_END_OF_TURN = ("<end_of_turn>", "<turn|>")
_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Where the text model's tensors lie: on the hub, in a multimodal checkpoint of transformers 4 and 5, in a bare
# `Gemma3TextModel`.
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.", "")
_OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class TensorView:
    """One tensor of a checkpoint.

    Attributes:
        name: canonical (Hugging Face) name, e.g. ``model.layers.3.self_attn.q_proj.weight``.
        dtype: ``f32``, ``f16``, ``bf16``, ``q8_0``, ``q4_0``, ``q5_0``, ``q4_k`` or ``q6_k``.
        shape: ``(rows, columns)`` or ``(n,)``.
        data: its bytes, row after row, flat uint8, read-only; aligned to the element. A view of the mapped file where
            possible.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: ByteArray
    _file: MappedFile | None = field(default=None, repr=False)
    _offset: int = field(default=0, repr=False)

    def rows_bytes(self) -> int:
        """Bytes of one row."""
        block = BLOCK_TYPES[self.dtype]
        return self.shape[-1] // block.block_size * block.block_bytes

    def release(self, first_byte: int, last_byte: int) -> None:
        """Drops the resident pages behind ``data[first_byte:last_byte]``: call it with what has been repacked.

        The bytes stay readable (they would be fetched again). Nothing happens for data that is not mapped.
        """
        if self._file is not None:
            first, last = max(first_byte, 0), min(last_byte, self.data.size)
            self._file.release(self._offset + first, self._offset + last)


@dataclass(frozen=True)
class _Source:
    """Where one tensor lies; known to have the shape the configuration asks for."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    add_one: bool  # norms are stored as w, and the factor is 1 + w


@dataclass(frozen=True)
class Checkpoint:
    """A model that was opened; its weights are read when :meth:`tensors` is iterated.

    Attributes:
        path: the file or directory.
        name: what the model calls itself, else the name of the file or directory.
        config: sizes and constants.
        tokenizer: ``None`` if the checkpoint has none; then only token ids can be used.
        chat_template: ``None`` if the checkpoint has none.
        bos_token_id: put in front of raw text; ``None`` if unknown.
        eos_token_ids: generation ends at any of them; may be empty.
        weight_types: type name to number of tensors stored so.
    """

    path: str
    name: str
    config: TextConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    weight_types: dict[str, int]
    _sources: dict[str, _Source] = field(repr=False)

    def tensors(self) -> Iterator[TensorView]:
        """Every tensor once, embedding first; norms as float32 ``(n,)`` factors (``1 + w`` where files store ``w``).

        Raises:
            CheckpointError: a norm holds a value that is not finite; matrices are not looked at.
        """
        for name, source in self._sources.items():
            data = source.file.bytes[source.offset : source.offset + source.size]
            if len(source.shape) == 1:
                factor = _to_float32(data, source.dtype)
                if not np.isfinite(factor).all():
                    raise CheckpointError(source.file.path, "holds a value that is not finite", tensor=name)
                factor += np.float32(source.add_one)
                yield TensorView(name, "f32", source.shape, factor.view(np.uint8))
            elif source.dtype in _ELEMENT_SIZES and data.ctypes.data % _ELEMENT_SIZES[source.dtype]:
                yield TensorView(name, source.dtype, source.shape, data.copy())
            else:
                yield TensorView(name, source.dtype, source.shape, data, source.file, source.offset)


_ELEMENT_SIZES = {"f32": 4, "f16": 2, "bf16": 2}


def open_checkpoint(model: str | os.PathLike[str], *, progress: Progress | None = None) -> Checkpoint:
    """Opens a model for reading.

    Args:
        model: a GGUF file, a Hugging Face directory, or the name of a built-in model (a path of that name goes first).
        progress: told (bytes done, bytes in all) while a built-in model is put together for the first time.

    Raises:
        CheckpointError: it does not exist, is damaged, or is not supported.
    """
    path = os.fspath(model)
    if "\0" in path:
        raise CheckpointError(path, "is not a path: it holds a NUL")
    if not path or not Path(path).exists():
        if path not in BUILTIN_MODELS:
            known = ", ".join(BUILTIN_MODELS)
            raise CheckpointError(path, f"no such file or directory, and not a built-in model ({known})")
        return _open_gguf(str(resolve_builtin(path, progress)), path)
    if Path(path).is_dir():
        return _open_directory(Path(path))
    return _open_gguf(path, None)


def _open_gguf(path: str, name: str | None) -> Checkpoint:
    gguf = GgufFile(path)
    config = config_from_gguf(gguf)
    found: dict[str, _Source] = {}
    original: dict[str, str] = {}
    for tensor in gguf.tensors.values():
        canonical = _canonical_gguf_name(tensor.name)
        if canonical is None:
            raise CheckpointError(path, "is not part of a Gemma 3 model", tensor=tensor.name)
        found[canonical] = _Source(gguf.file, tensor.type.name, tensor.shape, tensor.offset, tensor.size, False)
        original[canonical] = tensor.name
    sources = _matched(
        path, config, found, lambda canonical: original.get(canonical) or _gguf_name(canonical), lambda _: path
    )
    tokenizer = tokenizer_from_gguf(gguf)
    gguf.release_directory()
    _check_vocabulary(path, tokenizer, config)
    eos_ids = [gguf.integer(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    template_source = gguf.string("tokenizer.chat_template")
    if tokenizer is not None and template_source is not None:
        eos_ids += [tokenizer.id_of(marker) for marker in _END_OF_TURN]
    bos_id = gguf.integer("tokenizer.ggml.bos_token_id")
    special = {}
    for kind, token_id in (("bos_token", bos_id), ("eos_token", eos_ids[0])):
        if tokenizer is not None and token_id is not None:
            special[kind] = tokenizer.piece_of(token_id)
    return Checkpoint(
        path=path,
        name=name or gguf.string("general.name") or Path(path).stem,
        config=config,
        tokenizer=tokenizer,
        chat_template=_template(path, template_source, special),
        bos_token_id=_checked_ids(path, config, [bos_id])[0] if bos_id is not None else None,
        eos_token_ids=_checked_ids(path, config, eos_ids),
        weight_types=_histogram(sources),
        _sources=sources,
    )


def _canonical_gguf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; ``None`` if Gemma 3 has no such tensor."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] != "weight" or parts[2] not in _GGUF_NAMES:
        return None
    return f"model.layers.{parts[1]}.{_GGUF_NAMES[parts[2]]}.weight"


def _gguf_name(canonical: str) -> str:
    """The GGUF name of a Hugging Face tensor, to name one that is missing."""
    if canonical == "model.embed_tokens.weight":
        return "token_embd.weight"
    if canonical == "model.norm.weight":
        return "output_norm.weight"
    _, _, index, rest = canonical.split(".", 3)
    short = {full: short for short, full in _GGUF_NAMES.items()}[rest.removesuffix(".weight")]
    return f"blk.{index}.{short}.weight"


def _open_directory(directory: Path) -> Checkpoint:
    path = str(directory)
    config_path = str(directory / "config.json")
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise CheckpointError(path, "no config.json: not a Hugging Face checkpoint")
    config = config_from_hugging_face(config_path, raw)
    if raw.get("model_type") == "gemma3":
        _logger.info("%s is multimodal: only its text model is loaded", path)
    found: dict[str, _Source] = {}
    original: dict[str, tuple[str, str]] = {}
    for file_path, file, names in _weight_files(directory):
        for stored in names:
            canonical = _canonical_hugging_face_name(stored)
            if canonical is None:
                continue
            tensor = file.tensors[stored]
            if canonical in original:
                raise CheckpointError(
                    file_path, f"the same tensor as {printable(original[canonical][1])}", tensor=stored
                )
            found[canonical] = _Source(file.file, tensor.dtype, tensor.shape, tensor.offset, tensor.size, True)
            original[canonical] = (file_path, stored)
    head = found.pop("lm_head.weight", None)
    if head is not None and head.shape != (config.vocab_size, config.hidden_size):
        file_path, stored = original["lm_head.weight"]
        raise CheckpointError(
            file_path,
            f"has shape {list(head.shape)}, not that of the embedding it is tied to, "
            f"{[config.vocab_size, config.hidden_size]}",
            tensor=stored,
        )
    sources = _matched(
        path,
        config,
        found,
        lambda canonical: original[canonical][1] if canonical in original else canonical,
        lambda canonical: original[canonical][0] if canonical in original else path,
    )

    text_config = raw["text_config"] if raw.get("model_type") == "gemma3" else raw
    generation = _read_json(directory / "generation_config.json") or {}
    tokenizer_config = _read_json(directory / "tokenizer_config.json") or {}
    special = {
        kind: text
        for kind in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (text := _token_text(tokenizer_config.get(kind))) is not None
    }
    bos = _first(
        generation.get("bos_token_id"),
        text_config.get("bos_token_id"),
        raw.get("bos_token_id"),
        special.get("bos_token"),
    )
    if bos is not None and not isinstance(bos, str):
        bos = _checked_ids(path, config, _as_ids(path, "bos_token_id", bos))[0]
    tokenizer = tokenizer_from_directory(directory, bos)
    bos_id = tokenizer.bos_token_id if tokenizer is not None else bos if isinstance(bos, int) else None
    eos = _first(generation.get("eos_token_id"), raw.get("eos_token_id"), text_config.get("eos_token_id"))
    if eos is None and tokenizer is not None and "eos_token" in special:
        eos = tokenizer.id_of(special["eos_token"])
    if tokenizer is not None and bos_id is not None:
        special.setdefault("bos_token", tokenizer.piece_of(bos_id))
    return Checkpoint(
        path=path,
        name=directory.resolve().name,
        config=config,
        tokenizer=tokenizer,
        chat_template=_template(path, _directory_template(directory, tokenizer_config), special),
        bos_token_id=bos_id,
        eos_token_ids=_checked_ids(path, config, [] if eos is None else _as_ids(path, "eos_token_id", eos)),
        weight_types=_histogram(sources),
        _sources=sources,
    )


def _weight_files(directory: Path) -> Iterator[tuple[str, SafetensorsFile, list[str]]]:
    """(path, file, names of the tensors to take from it) of every safetensors file of a directory."""
    index_path = directory / "model.safetensors.index.json"
    index = _read_json(index_path)
    if index is None:
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(directory, "neither model.safetensors nor model.safetensors.index.json: no weights")
        file = SafetensorsFile(single)
        yield str(single), file, list(file.tensors)
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index_path, "weight_map is missing or empty")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # A shard is a file of this directory: an index must not make us open files elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise CheckpointError(index_path, f"{printable(repr(shard))} is not a file name", tensor=name)
        if _canonical_hugging_face_name(name) is not None:
            shards.setdefault(shard, []).append(name)
    for shard, names in shards.items():
        shard_path = str(directory / shard)
        file = SafetensorsFile(shard_path)
        for name in names:
            if name not in file.tensors:
                raise CheckpointError(shard_path, "is missing, though the index says it is here", tensor=name)
        yield shard_path, file, names


def _canonical_hugging_face_name(name: str) -> str | None:
    """The name in a text-only checkpoint; ``None`` for what is no part of the text model."""
    if name.startswith(_OTHER_MODALITIES) or name.endswith("rotary_emb.inv_freq"):
        return None
    if name in ("lm_head.weight", "language_model.lm_head.weight"):
        return "lm_head.weight"
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return None


def _matched(
    path: str,
    config: TextConfig,
    found: Mapping[str, _Source],
    stored_name: Callable[[str], str],
    stored_path: Callable[[str], str],
) -> dict[str, _Source]:
    """The tensors of the model in its own order, each with the shape and a type that the engine reads."""
    expected = config.expected_tensors()
    for name in found:
        if name not in expected:
            raise CheckpointError(
                stored_path(name),
                f"is not part of this model ({config.architecture}, {config.num_hidden_layers} layers)",
                tensor=stored_name(name),
            )
    sources: dict[str, _Source] = {}
    for name, shape in expected.items():
        source = found.get(name)
        if source is None:
            raise CheckpointError(stored_path(name), "is missing", tensor=stored_name(name))
        if source.shape != shape:
            raise CheckpointError(
                stored_path(name),
                f"has shape {list(source.shape)}, but the configuration asks for {list(shape)}",
                tensor=stored_name(name),
            )
        supported = BLOCK_TYPES if len(shape) == 2 else _ELEMENT_SIZES
        if source.dtype not in supported:
            raise CheckpointError(
                stored_path(name),
                f"type {source.dtype} is not supported here (supported: {', '.join(sorted(supported))})",
                tensor=stored_name(name),
            )
        sources[name] = source
    return sources


def _to_float32(data: ByteArray, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bf16":
        # bfloat16 is the upper half of a float32.
        bits = np.frombuffer(data.tobytes(), dtype="<u2").astype(np.uint32) << np.uint32(16)
        halves: npt.NDArray[np.float32] = bits.view(np.float32)
        return halves
    return np.frombuffer(data.tobytes(), dtype="<f4" if dtype == "f32" else "<f2").astype(np.float32)


def _histogram(sources: Mapping[str, _Source]) -> dict[str, int]:
    return dict(Counter(source.dtype for source in sources.values()).most_common())


def _check_vocabulary(path: str, tokenizer: Tokenizer | None, config: TextConfig) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            path, f"the vocabulary has {tokenizer.vocab_size} tokens, but the embedding only {config.vocab_size} rows"
        )


def _checked_ids(path: str, config: TextConfig, ids: list[int | None] | list[int]) -> tuple[int, ...]:
    """``ids`` without repetitions and ``None``, each inside the vocabulary."""
    for token_id in ids:
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise CheckpointError(path, f"token id {token_id} is outside the vocabulary of {config.vocab_size}")
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _as_ids(path: str, where: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(token_id) is not int for token_id in ids):
        raise CheckpointError(path, f"{where} = {printable(repr(value))} is neither a token id nor a list of them")
    return ids


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _token_text(value: Any) -> str | None:
    """A special token of ``tokenizer_config.json``: its text, or an object with the text in ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_text(path: Path) -> bytes | None:
    """The bytes of a small file; ``None`` if there is none."""
    if not path.exists():
        return None
    try:
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


def _directory_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The Jinja text: ``chat_template.jinja``, ``chat_template.json`` or in ``tokenizer_config.json``."""
    jinja_path = directory / "chat_template.jinja"
    text = _read_text(jinja_path)
    if text is not None:
        try:
            return text.decode("utf-8")
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
    return template


def _template(path: str, source: str | None, special: Mapping[str, str]) -> ChatTemplate | None:
    if source is None:
        return None
    try:
        return ChatTemplate(source, special)
    except ChatTemplateError as error:
        raise CheckpointError(path, str(error)) from None
