"""Fixtures of the client's tests: a scripted server, and both clients with one face."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted_server import Blocking, ScriptedServer

from draftwerk_client import AsyncClient, Client


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Answers as the test says."""
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that runs in a thread of its own, for the asyncio client."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(params=["Client", "AsyncClient"])
def make_client(request: pytest.FixtureRequest, loop: asyncio.AbstractEventLoop) -> Iterator[Callable[..., Any]]:
    """Makes a client of either kind, with the face of Client."""
    made: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        client = (
            Client(*args, **options) if request.param == "Client" else Blocking(AsyncClient(*args, **options), loop)
        )
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(make_client: Callable[..., Any], server: ScriptedServer) -> Any:
    """A client of either kind of the scripted server. It does not try again what failed."""
    return make_client(server.address, retries=0)
