"""A server on the tiny model, and the same model in this process to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance import served
from conformance.sessions import Actions, token_prompt
from draftwerk import Engine
from draftwerk_client.v1 import generation_pb2
from service.serve_process import TIMEOUT


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def reference(tiny_gguf: Path) -> Iterator[Engine]:
    """In this process, without drafts and without a cache."""
    with Engine(str(tiny_gguf), drafter="none", threads=1, kv_memory="64MiB", prefix_cache=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(tiny_gguf: Path) -> Iterator[served.Served]:
    # Drafts whether or not it pays: steps of this model are too short to tell.
    with served.serve(tiny_gguf, "--kv-memory", "64MiB", "--draft-length", "4") as running:
        yield running


@pytest.fixture
def crowded(tiny_gguf: Path) -> Iterator[served.Served]:
    """A server that is busy for seconds, one request at a time, and whose queue has no room for 40 more tokens."""
    flags = "--max-sequences 1 --max-queued-tokens 64 --max-unread-tokens 100000 --kv-memory 32MiB".split()
    with served.serve(tiny_gguf, *flags) as running:
        request = generation_pb2.GenerateRequest(prompt=token_prompt([2, 20]), stop=served.ENDLESS)
        calls = [running.generation.Generate(request, timeout=TIMEOUT) for _ in range(32)]
        running.wait_for_stats(requests=len(calls))
        yield running
        for call in calls:
            call.cancel()
        running.wait_idle()


@pytest.fixture
def session(server: served.Served) -> Iterator[Actions]:
    """A call of Generation.Session; nothing is sent yet."""
    with Actions(server) as actions:
        yield actions
