"""A checkpoint of bytes for the tests of the Python layer, and whether there is a native module to test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from draftwerk.loading.gguf import BLOCK_TYPES

NATIVE_MODULE_BUILT = find_spec("draftwerk._core") is not None

VOCABULARY = 260
BOS, EOS = 2, 1


class ByteTokenizer:
    """Token 4 + b stands for byte b; tokens 0 to 3 are control tokens."""

    vocab_size = VOCABULARY
    bos_token_id = BOS
    special_ids = frozenset(range(4))

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [BOS] * add_bos + [4 + byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 4]) if token_id >= 4 else b""

    def piece_of(self, token_id: int) -> str:
        return f"<control {token_id}>" if token_id < 4 else f"<0x{token_id - 4:02X}>"

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        def spelled(token_id: int) -> bytes:
            named = not skip_special_tokens and token_id in self.special_ids
            return self.piece_of(token_id).encode() if named else self.token_bytes(token_id)

        return b"".join(map(spelled, ids)).decode(errors="replace")

    def token_bytes_table(self) -> tuple[np.ndarray, bytes]:
        offsets = np.array([0] * 4 + list(range(VOCABULARY - 3)), dtype=np.uint32)
        return offsets, bytes(range(256))


class QuotingTemplate:
    variables = frozenset({"messages"})
    special_tokens: ClassVar[dict[str, str]] = {}

    def render(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@dataclass(frozen=True)
class Config:
    architecture: str = "gemma3"
    vocab_size: int = VOCABULARY
    layer_types: tuple[str, ...] = ("sliding_attention", "full_attention")
    max_position_embeddings: int = 4096


class FakeTensor:
    """A tensor of random bytes that remembers what was released."""

    def __init__(self, name: str = "w", dtype: str = "bf16", shape: tuple[int, ...] = (64, 256)) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.nbytes = self.rows_bytes() * (shape[0] if len(shape) == 2 else 1)
        self.data = np.random.default_rng(self.nbytes).integers(0, 255, self.nbytes, dtype=np.uint8)
        self.released: list[tuple[int, int]] = []

    def rows_bytes(self) -> int:
        block = BLOCK_TYPES[self.dtype]
        return self.shape[-1] // block.block_size * block.block_bytes

    def rows(self, first: int, last: int) -> np.ndarray:
        return self.data[first * self.rows_bytes() : last * self.rows_bytes()]

    def release(self, first_byte: int, last_byte: int) -> None:
        self.released.append((first_byte, last_byte))


@dataclass
class FakeCheckpoint:
    path: Path = Path("fake")
    name: str = "fake-model"
    config: Config = field(default_factory=Config)
    tokenizer: ByteTokenizer | None = field(default_factory=ByteTokenizer)
    chat_template: QuotingTemplate | None = field(default_factory=QuotingTemplate)
    bos_token_id: int | None = BOS
    eos_token_ids: tuple[int, ...] = (EOS,)
    weight_types: dict[str, int] = field(default_factory=lambda: {"q8_0": 3, "f32": 2})
    views: list[Any] = field(default_factory=list)

    def tensors(self) -> Iterator[Any]:
        return iter(self.views)
