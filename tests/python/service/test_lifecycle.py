"""The life of a server: what it offers, what every call gets, how it ends."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from serve_process import TIMEOUT, InProcess, RunningServer, ServerFactory, probed, scraped

import draftwerk
import fake_core
from draftwerk.server.server import Server
from draftwerk_client import AsyncClient, ServerError, Unavailable
from draftwerk_client.v1 import generation_pb2_grpc, models_pb2_grpc, operations_pb2, operations_pb2_grpc
from draftwerk_client.v1.generation_pb2 import GenerateRequest
from draftwerk_client.v1.models_pb2 import GetModelRequest, TokenizeRequest
from draftwerk_client.v1.output_pb2 import FINISH_REASON_LENGTH
from draftwerk_client.v1.parameters_pb2 import Prompt, StopConditions, TokenIds
from draftwerk_client.v1.session_pb2 import SessionRequest

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def request_for(text: str = "hello", max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(prompt=Prompt(text=text), stop=StopConditions(max_tokens=max_tokens, ignore_end_tokens=True))


def connect(server: Server | RunningServer) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(server.address)


def generate(channel: grpc.aio.Channel, request: GenerateRequest | None = None, **options: Any) -> Any:
    stub = generation_pb2_grpc.GenerationStub(channel)
    return stub.Generate(request or request_for(), **{"timeout": TIMEOUT, **options})


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    return caught.value


def trailers(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata() or ())


def details(error: grpc.aio.AioRpcError, kind: type) -> Any:
    status = status_pb2.Status.FromString(trailers(error)["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    found = kind()
    assert any(packed.Unpack(found) for packed in status.details)
    return found


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)).status)


async def probe_of(server: Server, status: int) -> str:
    """What a probe over HTTP hears once it has this status."""
    probe = 0, ""
    for _ in range(1000):
        probe = await asyncio.to_thread(probed, server.metrics_address)
        if probe[0] == status:
            return probe[1]
        await asyncio.sleep(0.01)
    raise AssertionError(probe)


@pytest.fixture
async def served(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server in this loop, of the scripted core."""
    async with inprocess_server(engine) as server, connect(server) as channel:
        yield channel


# --- what a running server offers ------------------------------------------------------------------------------------


async def test_a_process_serves(channel: grpc.aio.Channel, server: RunningServer) -> None:
    tokens = [token async for message in generate(channel, request_for(max_tokens=40)) for token in message.token_ids]
    assert len(tokens) == 40
    for service in ("", "draftwerk.v1.Generation", "draftwerk.v1.Models", "draftwerk.v1.Operations"):
        assert await health_of(channel, service) == SERVING


async def test_the_loop_itself_takes_the_engines_events(served: grpc.aio.Channel, scripted: fake_core.Engine) -> None:
    scripted.takers.clear()
    messages = [message async for message in generate(served, request_for(max_tokens=20))]
    assert len(messages) > 1
    assert set(scripted.takers) == {threading.current_thread().name}


async def test_the_log_says_what_is_served_and_where(server: RunningServer) -> None:
    said = server.serving
    assert said["model"] == "tiny-gemma"
    assert said["backend"].startswith("cpu ")
    assert said["drafter"] == "lookup"
    assert said["kv_memory_bytes"] == 64 << 20
    assert said["max_context"] == 1024
    assert said["version"] == draftwerk.__version__
    assert said["listen"].startswith("127.0.0.1:")
    assert not said["listen"].endswith(":0")
    assert said["metrics"] not in (said["listen"], "127.0.0.1:0")


def test_the_log_names_variables_that_nothing_reads(server_process: ServerFactory) -> None:
    running = server_process(environment={"DRAFTWERK_MAX_SEQUENCE": "3"})
    warnings = [line for line in running.server.lines if '"warning"' in line]
    (said,) = warnings
    assert "DRAFTWERK_MAX_SEQUENCE; did you mean DRAFTWERK_MAX_SEQUENCES?" in said


async def test_reflection_lists_what_the_port_has(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(timeout=TIMEOUT)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    await call.done_writing()
    assert {service.name for service in answer.list_services_response.service} == {
        "draftwerk.v1.Generation",
        "draftwerk.v1.Models",
        "draftwerk.v1.Operations",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_server_whose_device_has_failed_says_so(served: grpc.aio.Channel, scripted: fake_core.Engine) -> None:
    why = "CUDA error while waiting for a step: an illegal memory access was encountered"
    running = generate(served, request_for(max_tokens=1000))
    await anext(aiter(running))
    watch = health_pb2_grpc.HealthStub(served).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    assert (await watch.read()).status == SERVING
    scripted.fail_with = scripted.device_failure = why
    error = await failure_of(running)
    assert error.code() == grpc.StatusCode.INTERNAL
    assert why in (error.details() or "")
    assert (await watch.read()).status == NOT_SERVING
    assert await health_of(served, "draftwerk.v1.Generation") == NOT_SERVING
    error = await failure_of(generate(served))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == f"the server has to be started anew: {why}"
    watch.cancel()


async def test_a_server_whose_step_does_not_end_says_so_until_it_does(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, step_timeout=0.1) as server, connect(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        assert (await watch.read()).status == SERVING
        scripted.step_takes = 0.05
        await asyncio.sleep(0.1)
        assert await health_of(channel, "draftwerk.v1.Generation") == SERVING
        for seconds, status in ((0.2, NOT_SERVING), (0.0, SERVING), (9.0, NOT_SERVING)):
            scripted.step_takes = seconds
            assert (await watch.read()).status == status
            assert await health_of(channel, "draftwerk.v1.Generation") == status
        scripted.device_failure = "gone"  # from now on that is what counts
        scripted.step_takes = 0.0
        await asyncio.sleep(0.1)
        assert await health_of(channel, "draftwerk.v1.Generation") == NOT_SERVING
        watch.cancel()


async def test_an_engine_that_failed_before_is_not_served(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    scripted.device_failure = "gone"
    async with inprocess_server(engine) as server, connect(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        while (await watch.read()).status != NOT_SERVING:
            pass
        watch.cancel()


async def test_probes_over_http_hear_what_health_says(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, metrics_listen="127.0.0.1:0", step_timeout=0.1) as server:
        assert await probe_of(server, 200) == "serving\n"
        scripted.step_takes = 0.2
        assert await probe_of(server, 503) == "a step does not end: it has taken more than 0.1 s\n"
        scripted.step_takes = 0.0
        assert await probe_of(server, 200) == "serving\n"
        async with connect(server) as channel:
            scripted.gate.clear()
            running = generate(channel, request_for("hello", 10))
            await running.initial_metadata()
            stopping = asyncio.create_task(server.stop(grace=TIMEOUT))
            assert await probe_of(server, 503) == "the server is shutting down\n"
            assert (await asyncio.to_thread(scraped, server.metrics_address))["draftwerk_sessions",] == 0
            scripted.gate.set()
            await asyncio.wait_for(stopping, TIMEOUT)


async def test_a_probe_over_http_hears_why_the_device_has_failed(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    scripted.device_failure = "an illegal\naddress"
    async with inprocess_server(engine, metrics_listen="127.0.0.1:0") as server:
        assert await probe_of(server, 503) == "the device has failed: an illegal address\n"


async def test_reflection_can_be_off(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, reflection=False) as server, connect(server) as channel:
        error = await failure_of(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([])))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "method", ["/draftwerk.v1.Generation/Dream", "/draftwerk.v2.Generation/Generate", "/other.Service/Method"]
)
async def test_a_client_of_a_newer_proto_learns_what_is_wrong(served: grpc.aio.Channel, method: str) -> None:
    for kind in (served.unary_unary, served.unary_stream):
        error = await failure_of(kind(method)(b"", timeout=TIMEOUT))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert f"draftwerk {draftwerk.__version__} does not know {method}" in (error.details() or "")
        assert "Generation/Generate" in (error.details() or "")


async def test_a_method_on_the_wrong_port_is_told_what_the_port_has(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with (
        inprocess_server(engine, operations_listen="127.0.0.1:0") as server,
        grpc.aio.insecure_channel(server.operations_address) as channel,
    ):
        error = await failure_of(channel.unary_unary("/draftwerk.v1.Models/GetModel")(b"", timeout=TIMEOUT))
        async with AsyncClient(server.address) as client:
            with pytest.raises(ServerError) as caught:
                await client.stats()
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "it has Operations/GetStats. This server answers it on another port" in (error.details() or "")
    assert "operations_listen" in str(caught.value).partition("older")[0]
    assert "newer" not in str(caught.value)


async def test_a_message_may_be_as_large_as_the_settings_say(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, max_message_bytes="64KiB") as server, connect(server) as channel:
        tokenize = models_pb2_grpc.ModelsStub(channel).Tokenize
        fits = await tokenize(TokenizeRequest(prompt=Prompt(text="x" * 60_000)), timeout=TIMEOUT)
        assert len(fits.token_ids) == 60_001
        error = await failure_of(tokenize(TokenizeRequest(prompt=Prompt(text="x" * 70_000)), timeout=TIMEOUT))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


# --- the request id --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["a", "x" * 128, "order 66/~!"])
async def test_the_clients_request_id_is_kept(served: grpc.aio.Channel, wanted: str) -> None:
    call = generate(served, metadata=(("x-request-id", wanted),))
    first = await call.read()
    assert first.request_id == wanted
    assert dict(await call.initial_metadata())["x-request-id"] == wanted


@pytest.mark.parametrize("wanted", [None, "", "x" * 129])
async def test_otherwise_the_server_makes_one_up(served: grpc.aio.Channel, wanted: str | None) -> None:
    metadata = () if wanted is None else (("x-request-id", wanted),)
    made_up = set()
    for _ in range(2):
        call = models_pb2_grpc.ModelsStub(served).GetModel(GetModelRequest(), metadata=metadata, timeout=TIMEOUT)
        await call
        made_up.add(dict(await call.initial_metadata())["x-request-id"])
    assert len(made_up) == 2
    assert all(len(request_id) == 32 for request_id in made_up)


async def test_the_request_id_is_there_before_the_first_token(
    served: grpc.aio.Channel, scripted: fake_core.Engine
) -> None:
    scripted.gate.clear()
    call = generate(served, metadata=(("x-request-id", "early"),))
    assert dict(await call.initial_metadata())["x-request-id"] == "early"
    scripted.gate.set()
    assert (await call.read()).request_id == "early"


# --- errors of calls -------------------------------------------------------------------------------------------------


async def test_an_error_has_details_and_the_request_id(served: grpc.aio.Channel) -> None:
    error = await failure_of(generate(served, request_for(max_tokens=-3), metadata=(("x-request-id", "r7"),)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = details(error, error_details_pb2.BadRequest).field_violations
    assert violation.field == "stop.max_tokens"
    assert details(error, error_details_pb2.RequestInfo).request_id == "r7"
    assert trailers(error)["x-request-id"] == "r7"


async def test_bytes_that_are_no_message_are_the_clients_fault(served: grpc.aio.Channel) -> None:
    garbage = b"\xff\xff\xff\x07 no message"
    session = served.stream_stream("/draftwerk.v1.Generation/Session")(timeout=TIMEOUT)
    await session.write(garbage)
    for call, name in (
        (served.unary_unary("/draftwerk.v1.Models/GetModel")(garbage, timeout=TIMEOUT), "GetModelRequest"),
        (served.unary_stream("/draftwerk.v1.Generation/Generate")(garbage, timeout=TIMEOUT), "GenerateRequest"),
        (session, "SessionRequest"),
    ):
        error = await failure_of(call if call is not session else session.read())
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == "request"
        assert f"must be a draftwerk.v1.{name}" in violation.description


async def test_a_full_queue_is_refused_such_that_the_client_can_retry(
    served: grpc.aio.Channel, scripted: fake_core.Engine
) -> None:
    scripted.refuse_with = fake_core.QueueFull("full")
    call = generate(served)
    error = await failure_of(call)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000
    assert trailers(error)["grpc-retry-pushback-ms"] == "1000"
    # gRPC retries nothing of which the server has sent initial metadata.
    assert "x-request-id" not in dict(await call.initial_metadata())


async def test_gRPCs_own_retries_get_through(  # noqa: N802
    served: grpc.aio.Channel, scripted: fake_core.Engine, engine: draftwerk.Engine, inprocess_server: InProcess
) -> None:
    config = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s",
        "maxBackoff": "0.01s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}"""
    scripted.stats()["queued_tokens"] = 0
    refusals = 2
    submit = scripted.submit

    def busy_at_first(request: fake_core.Request) -> int:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise fake_core.QueueFull("full")
        return submit(request)

    scripted.submit = busy_at_first  # type: ignore[method-assign]
    async with inprocess_server(engine) as server:
        options = (("grpc.service_config", config),)
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            assert [token async for message in generate(channel) for token in message.token_ids]
    assert refusals == -1


async def test_a_defect_tells_the_client_nothing_but_the_request_id(
    served: grpc.aio.Channel, engine: draftwerk.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(engine, "submit", broken)
    error = await failure_of(generate(served, metadata=(("x-request-id", "r8"),)))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert error.details() == "internal error; the server's log has the cause under request r8"


async def test_no_more_calls_are_open_than_may_be(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine, max_calls=2) as server, connect(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
        assert (await watch.read()).status == SERVING  # does not count
        session = generation_pb2_grpc.GenerationStub(channel).Session(timeout=TIMEOUT)
        await session.write(SessionRequest(request_number=1, open=SessionRequest.Open()))
        await session.read()
        scripted.gate.clear()
        running = generate(channel)
        await running.initial_metadata()
        refused = await failure_of(generate(channel))
        assert refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refused.details() or "").startswith(
            "2 calls are open, which is all that the server takes; try again in"
        )
        assert details(refused, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
        stub = operations_pb2_grpc.OperationsStub(channel)
        assert (await stub.GetStats(operations_pb2.GetStatsRequest(), timeout=TIMEOUT)).sessions == 1
        scripted.gate.set()
        await drained(running)
        await drained(generate(channel))
        session.cancel()
        watch.cancel()


# --- the end ---------------------------------------------------------------------------------------------------------


async def test_running_streams_finish_and_nothing_new_begins(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with (
        inprocess_server(engine) as server,
        connect(server) as channel,
        AsyncClient(server.address, retries=0) as client,
    ):
        assert (await client.model()).name == "fake-model"
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        scripted.gate.clear()
        running = generate(channel, request_for("hello", 10))
        await running.initial_metadata()
        stopping = asyncio.create_task(server.stop(grace=TIMEOUT))
        assert (await watch.read()).status == NOT_SERVING

        refused = await failure_of(generate(channel))
        assert refused.code() == grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (refused.details() or "")
        assert details(refused, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000
        stub = operations_pb2_grpc.OperationsStub(channel)
        assert (await stub.GetStats(operations_pb2.GetStatsRequest(), timeout=TIMEOUT)).steps == 40
        with pytest.raises(Unavailable, match="shutting down"):
            await client.generate("hello")
        assert (await client.stats()).steps == 40

        assert not stopping.done()
        scripted.gate.set()
        messages = [message async for message in running]
        assert sum(len(message.token_ids) for message in messages) == 10
        assert messages[-1].finish_reason == FINISH_REASON_LENGTH
        await asyncio.wait_for(stopping, TIMEOUT)


async def test_what_outlasts_the_grace_period_is_ended_with_a_reason(
    engine: draftwerk.Engine, scripted: fake_core.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine) as server, connect(server) as channel:
        scripted.gate.clear()
        running = generate(channel)
        await running.initial_metadata()
        await asyncio.wait_for(server.stop(grace=0), TIMEOUT)
        error = await failure_of(running)
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the server ended the call after its grace period of 0 s"
    assert scripted.cancelled


async def test_a_reader_that_has_stopped_does_not_hold_up_the_end(server_process: ServerFactory) -> None:
    async with unread_stream(server_process("--grace-period", "0")) as (running, call):
        running.server.signal(signal.SIGTERM)
        running.server.wait_for("grace period is over: ending calls")
        running.server.wait_for("ended")
        assert running.server.wait() == 0
        error = await failure_of(drained(call))
        assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_idle_sessions_are_ended(
    engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> None:
    async with inprocess_server(engine) as server, connect(server) as channel:
        session = generation_pb2_grpc.GenerationStub(channel).Session(timeout=TIMEOUT)
        await session.write(SessionRequest(request_number=1, open=SessionRequest.Open()))
        await session.read()
        await asyncio.wait_for(server.stop(grace=TIMEOUT), TIMEOUT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await session.read()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_cleanly(server_process: ServerFactory, number: signal.Signals) -> None:
    server = server_process().server
    server.signal(number)
    assert server.wait_for("shutting down")["signal"] == number.name
    server.wait_for("ended")
    assert server.wait() == 0


@asynccontextmanager
async def unread_stream(running: RunningServer) -> AsyncIterator[tuple[RunningServer, Any]]:
    """A server with a stream that does not end, because its client does not read."""
    # A window that a few messages fill.
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(running.address, options=options) as channel:
        request = GenerateRequest(
            prompt=Prompt(token_ids=TokenIds(ids=[2, 30, 40])),
            stop=StopConditions(max_tokens=900, ignore_end_tokens=True),
        )
        request.output.logprobs = 20
        call = generate(channel, request)
        await call.read()
        yield running, call


async def drained(call: Any) -> list[Any]:
    """What is left of a stream."""
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def test_a_second_signal_ends_the_process_at_once(server_process: ServerFactory) -> None:
    async with unread_stream(server_process()) as (running, _):
        running.server.signal(signal.SIGTERM)
        assert running.server.wait_for("waiting for running calls")["running"] == 1
        running.server.signal(signal.SIGTERM)
        running.server.wait_for("second signal: ending at once")
        assert running.server.wait() == 128 + signal.SIGTERM


async def test_a_process_waits_for_its_streams(server_process: ServerFactory) -> None:
    async with unread_stream(server_process()) as (running, call):
        running.server.signal(signal.SIGTERM)
        running.server.wait_for("waiting for running calls")
        messages = await drained(call)
        assert sum(len(message.token_ids) for message in messages) > 800
        assert messages[-1].finish_reason == FINISH_REASON_LENGTH
        running.server.wait_for("ended")
        assert running.server.wait() == 0
