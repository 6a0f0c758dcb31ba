"""Fixtures of the tests of the server: a tiny model, servers in processes, servers in the test's loop."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from serve_process import InProcess, RunningServer, ServerFactory, ServerProcess, end, start_serve
from session_client import SessionClient

import fake_core
from draftwerk import _core
from draftwerk.engine import Engine
from draftwerk.server.server import Server
from draftwerk.server.settings import Settings

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""Gemma 3's, as far as plain text goes."""


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 with a tokenizer and a chat template; it loads in milliseconds."""
    tiny = import_module("loading.tiny_files")
    config = tiny.hugging_face_config() | {"max_position_embeddings": 1024, "eos_token_id": [1, 5]}
    directory: Path = tiny.write_directory(tmp_path_factory.mktemp("models") / "tiny-gemma", config=config)
    tensors = {name: ("F32", w.shape, tiny.stored(_scaled(name, w), "F32")) for name, w in tiny.weights().items()}
    (directory / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE})
    )
    return directory


def _scaled(name: str, weight: np.ndarray) -> np.ndarray:
    """Random weights made such that the next token depends on all tokens before, as in tiny_checkpoint.tiny_model."""
    if name == "model.norm.weight":
        return 2.0 + 0.3 * weight
    if weight.ndim == 1:  # norms multiply by 1 + w
        return 0.3 * weight
    return weight * (0.1 if name == "model.embed_tokens.weight" else weight.shape[1] ** -0.5)


# --- servers in processes of their own -------------------------------------------------------------------------------


@pytest.fixture
def server_process(tiny_model_path: Path) -> Iterator[ServerFactory]:
    """A function that starts a server with some flags and returns it once it serves. All of them must end well."""
    _need_native_module()
    started: list[ServerProcess] = []

    def start(*flags: str, environment: dict[str, str] | None = None) -> RunningServer:
        server = start_serve(*_test_flags(tiny_model_path), *flags, environment=environment)
        started.append(server)
        return RunningServer(server, server.wait_for("serving"))

    yield start
    for server in started:
        already_ended = server.process.poll() is not None
        code = end(server)
        assert already_ended or code == 0, "".join(server.lines)


@pytest.fixture(scope="session")
def server(tiny_model_path: Path) -> Iterator[RunningServer]:
    """One server of the tiny model for all tests that leave it as it is."""
    _need_native_module()
    process = start_serve(*_test_flags(tiny_model_path))
    yield RunningServer(process, process.wait_for("serving"))
    assert end(process) == 0, "".join(process.lines)


def _need_native_module() -> None:
    if _core.__name__ == "fake_core":
        pytest.skip("the native module is not built")


def _test_flags(model: Path) -> list[str]:
    return [
        *("--model", str(model)),
        *("--listen", "127.0.0.1:0"),
        *("--metrics-listen", "127.0.0.1:0"),
        *("--kv-memory", "64MiB"),
        *("--threads", "1"),
        *("--grace-period", "10"),
    ]


@pytest.fixture
async def channel(server: RunningServer) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the server of all tests."""
    async with grpc.aio.insecure_channel(server.address) as opened:
        yield opened


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with self-signed certificates: server.pem and client.pem, with their keys."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = tmp_path_factory.mktemp("tls")
    for name in ("server", "client"):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        subject = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run(
            ["openssl", "req", *options.split(), *subject, *files], cwd=directory, check=True, capture_output=True
        )
    (directory / "encrypted.key").write_bytes(
        subprocess.run(
            "openssl ec -in server.key -aes128 -passout pass:x".split(), cwd=directory, check=True, capture_output=True
        ).stdout
    )
    (directory / "not.pem").write_text("nothing")
    return directory


# --- servers in the test's loop --------------------------------------------------------------------------------------


@pytest.fixture
def inprocess_server() -> InProcess:
    """`async with inprocess_server(engine, **settings) as server`: serves an engine, the scripted one too, on a free
    port (server.address), in the loop of the test."""

    @asynccontextmanager
    async def serve(engine: Engine, **settings: Any) -> AsyncIterator[Server]:
        given = {"listen": "127.0.0.1:0", "metrics_listen": "", **settings}
        server = Server(Settings.model_validate(given), engine)
        await server.start()
        try:
            yield server
        finally:
            await server.stop(grace=0)

    return serve


@pytest.fixture
def figures(scripted: fake_core.Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the scripted core says of itself when it is asked, as the native one would; for a test to change."""
    values: dict[str, Any] = {
        "requests": 5,
        "finished": 3,
        "running": 2,
        "waiting": 4,
        "paused": 1,
        "conversations": 0,
        "queued_tokens": 600,
        "steps": 40,
        "rows": 900,
        "prefill_rows": 500,
        "generated_tokens": 77,
        "drafted": 42,
        "accepted": 21,
        "drafted_by_position": [20, 10],
        "accepted_by_position": [15, 6],
        "drafters": {
            "mtp": fake_core.drafter_figures(
                [15, 8], [11, 4], siblings=12, rounds=10, drafted_by_position=[10, 5], accepted_by_position=[8, 1]
            ),
            "lookup": fake_core.drafter_figures([5, 2], [4, 2]),
            "idle": fake_core.drafter_figures(),
        },
        "preemptions": 6,
        "seconds": {"schedule": 0.25, "draft": 0.5, "target": 8.0, "commit": 0.125},
        "kv": {
            "budget_bytes": 1000,
            "used_bytes": 800,
            "peak_bytes": 900,
            "cached_bytes": 300,
            "parked_bytes": 50,
            "sliding_pages": 11,
            "full_pages": 12,
            "cached_blocks": 3,
            "prefix_lookup_tokens": 400,
            "prefix_hit_tokens": 250,
            "evicted_pages": 9,
        },
    }
    monkeypatch.setattr(scripted, "stats", lambda: values)
    return values


@pytest.fixture
async def serving(engine: Engine, inprocess_server: InProcess) -> AsyncIterator[Server]:
    """A server of the scripted engine."""
    async with inprocess_server(engine) as server:
        yield server


@pytest.fixture
async def scripted_channel(serving: Server) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the server of the scripted engine."""
    async with grpc.aio.insecure_channel(serving.address) as opened:
        yield opened


@pytest.fixture
async def session(scripted_channel: grpc.aio.Channel) -> AsyncIterator[SessionClient]:
    """A session with the scripted engine."""
    client = SessionClient(scripted_channel)
    await client.open()
    yield client
    client.call.cancel()
