"""Tiny but complete Gemma 3 checkpoints, written byte by byte so that a test can bend any part of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
GGML_F32, GGML_F16, GGML_Q8_0, GGML_BF16 = 0, 1, 8, 30

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS, WINDOW = 32, 64, 2, 1, 32, 2, 8
END_OF_TURN = "<end_of_turn>"


def vocabulary() -> list[tuple[str, float, int]]:
    """(piece, score, SentencePiece type), laid out like Gemma's: controls, symbols, bytes, merges, characters."""
    pieces: list[tuple[str, float, int]] = [(name, -1000.0, 3) for name in ("<pad>", "<eos>", "<bos>")]
    pieces.append(("<unk>", -1000.0, 2))
    pieces += [("<start_of_turn>", -1000.0, 3), (END_OF_TURN, -1000.0, 3)]
    pieces += [("\n" * n, -1000.0, 4) for n in range(1, 5)]
    pieces += [("▁" * n, -1000.0, 4) for n in range(2, 6)]
    pieces += [("<table>", -1000.0, 4), ("</table>", -1000.0, 4), ("\t", -1000.0, 4)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    merged = [
        "▁t",
        "he",
        "▁the",
        "in",
        "an",
        "▁a",
        "er",
        "▁w",
        "or",
        "ld",
        "▁world",
        "▁wor",
        "lo",
        "el",
        "hel",
        "hello",
    ]
    merged += ["éà", "日本"]
    pieces += [(piece, -float(rank), 1) for rank, piece in enumerate(merged)]
    letters = sorted(set("▁abcdefghilnorstw.,<>/?éà日本語🙂"))
    pieces += [(letter, -float(len(merged) + rank), 1) for rank, letter in enumerate(letters)]
    return pieces


VOCAB = len(vocabulary())


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return string(value)
    return struct.pack("<" + {U8: "B", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q"}[kind], value)


def key(name: str, kind: int, value: Any) -> bytes:
    """A metadata entry with a scalar value."""
    return string(name) + struct.pack("<I", kind) + scalar(kind, value)


def array(name: str, kind: int, values: Sequence[Any]) -> bytes:
    """A metadata entry with an array."""
    head = string(name) + struct.pack("<IIQ", ARRAY, kind, len(values))
    return head + b"".join(scalar(kind, value) for value in values)


def metadata(**changes: tuple[int, Any] | None) -> dict[str, bytes]:
    """The entries of a tiny model by key; ``changes`` (``__`` for ``.``) replaces or drops some."""
    fields: dict[str, tuple[int, Any] | None] = {
        "general.architecture": (STRING, "gemma3"),
        "general.name": (STRING, "Tiny"),
        "gemma3.context_length": (U32, 128),
        "gemma3.embedding_length": (U32, HIDDEN),
        "gemma3.block_count": (U32, LAYERS),
        "gemma3.feed_forward_length": (U32, MLP),
        "gemma3.attention.head_count": (U32, HEADS),
        "gemma3.attention.head_count_kv": (U32, KV_HEADS),
        "gemma3.attention.key_length": (U32, HEAD_DIM),
        "gemma3.attention.value_length": (U32, HEAD_DIM),
        "gemma3.attention.layer_norm_rms_epsilon": (F32, 1e-6),
        "gemma3.attention.sliding_window": (U32, WINDOW),
        "gemma3.rope.freq_base": (F32, 1e6),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.bos_token_id": (U32, 2),
        "tokenizer.ggml.eos_token_id": (U32, 1),
    }
    fields.update({name.replace("__", "."): value for name, value in changes.items()})
    entries = {name: key(name, *value) for name, value in fields.items() if value is not None}
    pieces = vocabulary()
    entries["tokens"] = array("tokenizer.ggml.tokens", STRING, [piece.replace("▁▁", "  ") for piece, _, _ in pieces])
    entries["scores"] = array("tokenizer.ggml.scores", F32, [score for _, score, _ in pieces])
    entries["types"] = array("tokenizer.ggml.token_type", I32, [kind for _, _, kind in pieces])
    return entries


def matrix_shapes() -> dict[str, tuple[int, ...]]:
    """GGUF name to shape of every tensor."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,), "attn_q": (queries, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN),
            "attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,), "attn_output": (HIDDEN, queries),
            "post_attention_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_gate": (MLP, HIDDEN), "ffn_up": (MLP, HIDDEN),
            "ffn_down": (HIDDEN, MLP), "post_ffw_norm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


class TinyGguf:
    """The parts of a GGUF file; change any of them, then :meth:`bytes`."""

    def __init__(self, seed: int = 0, **changes: tuple[int, Any] | None) -> None:
        random = np.random.default_rng(seed)
        self.magic = b"GGUF"
        self.version = 3
        self.entries = metadata(**changes)
        self.key_count: int | None = None
        self.tensor_count: int | None = None
        # name, shape (slowest first), ggml type, bytes, offset (None: where it belongs)
        self.tensors: list[list[Any]] = []
        for name, shape in matrix_shapes().items():
            if len(shape) == 1:
                kind, data = GGML_F32, random.standard_normal(shape).astype("<f4").tobytes()
            elif name == "token_embd.weight":
                kind, data = GGML_Q8_0, random.integers(0, 60, VOCAB * HIDDEN // 32 * 34, np.uint8).tobytes()
            else:
                kind, data = GGML_F16, random.standard_normal(shape).astype("<f2").tobytes()
            self.tensors.append([name, shape, kind, data, None])

    def tensor(self, name: str) -> list[Any]:
        return next(tensor for tensor in self.tensors if tensor[0] == name)

    def bytes(self) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.entries) if self.key_count is None else self.key_count
        out = bytearray(self.magic + struct.pack("<IQQ", self.version, tensor_count, key_count))
        out += b"".join(self.entries.values())
        offset = 0
        for name, shape, kind, data, forced in self.tensors:
            out += string(name) + struct.pack("<I", len(shape))
            out += struct.pack(f"<{len(shape)}Q", *reversed(shape))
            out += struct.pack("<IQ", kind, offset if forced is None else forced)
            offset += -(-len(data) // 32) * 32
        for _, _, _, data, _ in self.tensors:
            out += bytes(-len(out) % 32) + data
        return bytes(out + bytes(-len(out) % 32))

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


def hugging_face_config() -> dict[str, Any]:
    """A ``config.json`` as transformers 5 writes it, as far as it matters."""
    return {
        "model_type": "gemma3_text",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "sliding_window": WINDOW,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "bos_token_id": 2,
        "eos_token_id": 1,
    }


def hugging_face_shapes() -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape of every tensor."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, HIDDEN), "self_attn.k_proj": (keys, HIDDEN),
            "self_attn.v_proj": (keys, HIDDEN), "self_attn.o_proj": (HIDDEN, queries),
            "self_attn.q_norm": (HEAD_DIM,), "self_attn.k_norm": (HEAD_DIM,),
            "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
            "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
            "pre_feedforward_layernorm": (HIDDEN,), "post_feedforward_layernorm": (HIDDEN,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in hugging_face_shapes().items()}


def stored(values: np.ndarray, dtype: str) -> bytes:
    """float32 values in a safetensors dtype; bfloat16 by truncation."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def safetensors_bytes(tensors: Mapping[str, tuple[str, Sequence[int], bytes]], padding: int = 8) -> bytes:
    """A safetensors file from name to (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    return framed(header, b"".join(data for _, _, data in tensors.values()), padding)


def framed(header: Any, data: bytes, padding: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % padding)
    return struct.pack("<Q", len(text)) + text + data


def write_directory(
    path: Path,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: str = "BF16",
    seed: int = 0,
    prefix: str | None = None,
) -> Path:
    """A Hugging Face directory without a tokenizer; ``prefix`` replaces ``model.`` in the tensors' names."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or hugging_face_config()))
    tensors = {
        name if prefix is None else prefix + name.removeprefix("model."): (dtype, value.shape, stored(value, dtype))
        for name, value in weights(seed).items()
    }
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return path


def tokenizer_json(pieces: Sequence[tuple[str, float, int]] = ()) -> dict[str, Any]:
    """A vocabulary as ``tokenizer.json``, with merges made from the pieces as transformers' converter makes them."""
    pieces = pieces or vocabulary()
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece, score, kind in pieces:
        if kind == 1 or piece.startswith("▁▁"):
            splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            # Runs of spaces come first, the longest ones before the others: so a run is taken as long as possible.
            rank = -score if kind == 1 else -float(len(piece))
            merges += [(rank, list(pair)) for pair in splits if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda merge: merge[0])
    added = [
        {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind in (2, 3)}
        for index, (piece, _, kind) in enumerate(pieces)
        if kind in (2, 3, 4)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": ids,
            "merges": [pair for _, pair in merges],
        },
    }  # fmt: skip
