"""Connecting: addresses, several servers, retries, readiness."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from scripted_server import TIMEOUT, ScriptedServer, piece, refusing, status, two_pieces

from draftwerk_client import Client, QueueFull, Unavailable
from draftwerk_client.channel import Endpoint, service_config, target_of
from draftwerk_client.v1 import models_pb2, operations_pb2

# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "target"),
    [
        (["127.0.0.1:50051"], "ipv4:127.0.0.1:50051"),
        (["[::1]:50051"], "ipv6:[::1]:50051"),
        (["example.org:443"], "dns:///example.org:443"),
        (["unix:/run/draftwerk.sock"], "unix:/run/draftwerk.sock"),
        (["10.0.0.1:1", "10.0.0.2:2", "10.0.0.1:1"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (["[::1]:1", "10.0.0.2:2"], "ipv6:[::1]:1,[::ffff:10.0.0.2]:2"),
    ],
)
def test_targets(addresses: list[str], target: str) -> None:
    assert target_of(addresses) == target


def test_several_host_names_are_resolved() -> None:
    assert "127.0.0.1]:2" in target_of(["[::1]:1", "localhost:2"]) or "[::1]:2" in target_of(["[::1]:1", "localhost:2"])


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", "localhost:0", "localhost:70000", "::1:50051", ":1"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"HOST:PORT, \[IPV6\]:PORT or unix:PATH"):
        Client(address)


def test_addresses_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="unix socket"):
        Client(["unix:/a", "127.0.0.1:1"])
    with pytest.raises(ValueError, match="at least one"):
        Client([])


@pytest.mark.parametrize("options", [{"retries": 5}, {"retries": -1}, {"timeout": 0}])
def test_wrong_settings(options: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        Client(**options)


def test_unix_sockets(make_client: Any, tmp_path: Path) -> None:
    server = ScriptedServer(f"unix:{tmp_path}/socket")
    try:
        assert make_client(server.address).generate("x").text == "Hello"
    finally:
        server.stop()


def test_keepalive_goes_on_without_data() -> None:
    made = Endpoint.of("127.0.0.1:1", timeout=None, credentials=None, server_name=None, retries=3)
    options = dict(made.options)
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.keepalive_timeout_ms"] == 10_000
    assert options["grpc.http2.max_pings_without_data"] == 0


def test_several_servers_share_one_certificate_name() -> None:
    made = Endpoint.of(
        ["localhost:1", "127.0.0.1:2"],
        timeout=None,
        credentials=grpc.ssl_channel_credentials(),
        server_name=None,
        retries=3,
    )
    assert dict(made.options)["grpc.ssl_target_name_override"] == "localhost"


# --- retries ---------------------------------------------------------------------------------------------------------


def failing_first(times: int, refuse: Any) -> Any:
    """A script that refuses so many calls and then answers."""
    left = [times]

    def script(request: Any, context: Any) -> Any:
        left[0] -= 1
        return refuse(request, context) if left[0] >= 0 else two_pieces()

    return script


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_refused_calls_are_tried_again(make_client: Any, server: ScriptedServer, code: grpc.StatusCode) -> None:
    server.generate = failing_first(2, refusing(status(code, "not now"), pushback_ms=1))
    assert make_client(server.address).generate("x", request_id="same").text == "Hello"
    assert server.request_ids == ["same"] * 3


def test_the_server_says_how_long_to_wait(make_client: Any, server: ScriptedServer) -> None:
    server.generate = failing_first(1, refusing(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), pushback_ms=700))
    client = make_client(server.address)
    client.model()  # connects
    began = time.monotonic()
    client.generate("x")
    assert time.monotonic() - began >= 0.69  # the client's own first backoff is 0.12 s at most


def test_the_server_may_forbid_retries(make_client: Any, server: ScriptedServer) -> None:
    server.generate = refusing(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"), pushback_ms=-1)
    with pytest.raises(QueueFull):
        make_client(server.address).generate("x")
    assert server.calls == 1


def test_retries_end(make_client: Any, server: ScriptedServer) -> None:
    server.generate = refusing(status(grpc.StatusCode.UNAVAILABLE, "not now"), pushback_ms=1)
    with pytest.raises(Unavailable, match="not now"):
        make_client(server.address, retries=2).generate("x")
    assert server.calls == 3


def test_unary_calls_are_tried_again(make_client: Any, server: ScriptedServer) -> None:
    refuse = refusing(status(grpc.StatusCode.UNAVAILABLE, "not now"), pushback_ms=1)
    answers = iter([refuse, lambda *_: models_pb2.GetModelResponse(model={"name": "tiny"})])
    server.unary[models_pb2.GetModelRequest] = lambda *call: next(answers)(*call)
    assert make_client(server.address).model().name == "tiny"


def test_nothing_is_tried_again_after_the_first_message(make_client: Any, server: ScriptedServer) -> None:
    def script(request: Any, context: Any) -> Any:
        yield piece("a", 1)
        refusing(status(grpc.StatusCode.UNAVAILABLE, "going down"), pushback_ms=1)(request, context)

    server.generate = script
    stream = make_client(server.address).stream("x")
    assert next(stream).text == "a"
    with pytest.raises(Unavailable, match="going down"):
        next(stream)
    assert server.calls == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
def test_other_errors_are_not_tried_again(make_client: Any, server: ScriptedServer, code: grpc.StatusCode) -> None:
    server.generate = refusing(status(code, "no"), pushback_ms=1)
    with pytest.raises(Exception, match="no"):
        make_client(server.address).generate("x")
    assert server.calls == 1


def test_sessions_are_never_tried_again() -> None:
    (policy,) = service_config(3)["methodConfig"]
    assert {"service": "draftwerk.v1.Generation", "method": "Generate"} in policy["name"]
    assert all(name.get("method") == "Generate" for name in policy["name"] if "Generation" in name["service"])


# --- several servers -------------------------------------------------------------------------------------------------


def test_calls_go_to_all_servers_in_turn(make_client: Any, server: ScriptedServer) -> None:
    other = ScriptedServer()
    try:
        client = make_client([server.address, other.address])
        end = time.monotonic() + TIMEOUT
        while not (server.calls and other.calls):  # until both are connected
            client.model()
            assert time.monotonic() < end
        before = server.calls, other.calls
        for _ in range(10):
            client.generate("x")
        assert (server.calls - before[0], other.calls - before[1]) == (5, 5)
    finally:
        other.stop()


def test_a_server_that_is_down_gets_no_calls(make_client: Any, server: ScriptedServer) -> None:
    other = ScriptedServer()
    client = make_client([server.address, other.address])
    client.wait_ready(TIMEOUT)
    other.stop()
    for _ in range(10):
        assert client.generate("x").text == "Hello"
    assert server.calls >= 10


def test_a_server_that_is_not_healthy_gets_no_calls(make_client: Any, server: ScriptedServer) -> None:
    sick = ScriptedServer()
    try:
        sick.set_serving(False)
        client = make_client([server.address, sick.address])
        client.wait_ready(TIMEOUT)
        for _ in range(10):
            client.generate("x")
        assert (server.calls, sick.calls) == (10, 0)
    finally:
        sick.stop()


def test_a_server_that_is_not_healthy_still_gives_its_figures(make_client: Any, server: ScriptedServer) -> None:
    server.unary[operations_pb2.GetStatsRequest] = lambda *_: operations_pb2.GetStatsResponse(requests=3)
    client = make_client(server.address, retries=0)
    assert client.generate("x").text == "Hello"
    server.set_serving(False)
    with pytest.raises(Unavailable, match="it is shutting down, or its device has failed") as caught:
        while client.generate("x"):  # until the client has heard of it
            pass
    assert "is the server running" not in str(caught.value)
    assert client.stats().requests == 3
    with pytest.raises(Unavailable, match="it says that it is not serving"):
        client.wait_ready(0.1)


# --- readiness -------------------------------------------------------------------------------------------------------


def test_wait_ready_returns_at_once_when_the_server_serves(client: Any) -> None:
    client.wait_ready(TIMEOUT)


@pytest.mark.parametrize("seconds", [1e12, math.inf])
def test_a_long_wait_is_a_wait(client: Any, seconds: float) -> None:
    waiting = threading.Thread(target=client.wait_ready, args=[seconds], daemon=True)
    waiting.start()
    waiting.join(TIMEOUT)
    assert not waiting.is_alive()
    assert client.generate("x", timeout=seconds).text == "Hello"


def test_wait_ready_waits_for_a_server_that_starts_later(make_client: Any, server: ScriptedServer) -> None:
    server.stop()
    client = make_client(server.address)
    started: list[ScriptedServer] = []  # stays empty if something else has taken the port meanwhile
    starter = threading.Timer(0.3, lambda: started.append(ScriptedServer(server.address)))
    starter.start()
    try:
        client.wait_ready(TIMEOUT)
        assert started and client.generate("x").text == "Hello"
    finally:
        starter.join()
        for late in started:
            late.stop()


def test_wait_ready_waits_for_health(make_client: Any, server: ScriptedServer) -> None:
    server.set_serving(False)
    client = make_client(server.address)
    with pytest.raises(Unavailable, match=r"within 0\.3 s"):
        client.wait_ready(0.3)
    healing = threading.Timer(0.2, server.set_serving, [True])
    healing.start()
    client.wait_ready(TIMEOUT)
    healing.join()


def test_wait_ready_says_why_not(make_client: Any, server: ScriptedServer) -> None:
    server.stop()
    with pytest.raises(Unavailable, match=r"(?i)refused"):
        make_client(server.address).wait_ready(0.3)
