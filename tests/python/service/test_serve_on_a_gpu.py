"""`draftwerk serve` on a GPU: what a client gets is what an engine there generates."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from serve_process import ServerFactory

import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.devices import LIBRARY_VARIABLE
from draftwerk_client import Client
from tested_device import EMULATED

pytestmark = pytest.mark.skipif(not EMULATED, reason="needs the emulated device (make test-cuda)")


def test_a_client_gets_what_the_engine_generates(
    server_process: ServerFactory, tiny_model_path: Path, tmp_path: Path
) -> None:
    model = tmp_path / "tiny"
    target = tiny_gemma4.ple_shared(seed=3)
    tiny_gemma4.save(target, model)
    tiny_gemma4.save(tiny_gemma4.assistant_for(target, centroids=32, seed=4), tmp_path / "tiny-assistant")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_path / name, model)
    with Engine(model, device="cuda", drafter="none", threads=1, kv_memory="16MiB") as engine:
        params = SamplingParams(temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)
        expected = engine.generate("a b the", params)
        backend = engine.info.backend
    flags = ["--model", str(model), "--drafter", str(tmp_path / "tiny-assistant"), "--kv-memory", "16MiB"]
    running = server_process(*flags, environment={LIBRARY_VARIABLE: os.environ[LIBRARY_VARIABLE]})
    with Client(running.address) as client:
        assert client.model().backend == backend == "cuda sm_90, emulated"
        generated = client.generate("a b the", temperature=1.0, seed=4, max_tokens=6, ignore_eos=True)
    assert generated.text == expected.text
