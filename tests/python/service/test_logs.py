"""The log: its two forms, a line for every call, and nothing in it of what a client sent."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from serve_process import TIMEOUT, InProcess, ServerFactory

import draftwerk
import fake_core
from draftwerk.acceptance import AcceptanceWarning
from draftwerk.acceptance_causes import Cause
from draftwerk.requests import RequestError
from draftwerk.server import logs
from draftwerk.server.calls import cancellation
from draftwerk_client.v1 import generation_pb2_grpc, models_pb2_grpc
from draftwerk_client.v1.generation_pb2 import GenerateRequest
from draftwerk_client.v1.models_pb2 import GetModelRequest
from draftwerk_client.v1.parameters_pb2 import Prompt, StopConditions
from draftwerk_client.v1.session_pb2 import SessionRequest

SECRET = "the patient's diagnosis"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def restored() -> Iterator[None]:
    """Leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def log(restored: None) -> io.StringIO:
    """What is logged from now on, as JSON lines."""
    stream = io.StringIO()
    logs.configure("json", "info", stream)
    return stream


def entries(log: io.StringIO, event: str | None = None) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in log.getvalue().splitlines()]
    return [entry for entry in parsed if event in (None, entry["event"])]


def test_json_lines_begin_with_what_people_look_for(log: io.StringIO) -> None:
    structlog.stdlib.get_logger("here").warning("something", figure=1.5, text='"\n')
    (line,) = log.getvalue().splitlines()
    entry = json.loads(line)
    assert list(entry)[:3] == ["timestamp", "level", "event"]
    assert entry["level"] == "warning"
    assert entry["logger"] == "here"
    assert (entry["figure"], entry["text"]) == (1.5, '"\n')
    assert entry["timestamp"].endswith("Z")


def test_what_libraries_log_has_the_same_form(log: io.StringIO) -> None:
    logging.getLogger("some.library").error("failed: %s", "why")
    (entry,) = entries(log)
    assert (entry["event"], entry["level"], entry["logger"]) == ("failed: why", "error", "some.library")


def test_what_an_engine_warns_of_keeps_its_fields(log: io.StringIO) -> None:
    cause = Cause("wrong_drafter", "it is another's")
    fields = AcceptanceWarning("mtp", 90, (90, 4), (1, 0), None, (cause,)).log_fields()
    logging.getLogger("draftwerk.acceptance").warning("%s", "hardly any", extra={**fields, "prompt": SECRET})
    (entry,) = entries(log, "hardly any")
    assert (entry["level"], entry["drafter"], entry["rounds"]) == ("warning", "mtp", 90)
    assert (entry["drafted_by_position"], entry["accepted_by_position"]) == ([90, 4], [1, 0])
    assert entry["likely_causes"] == ["wrong_drafter"]
    assert SECRET not in log.getvalue()


@pytest.mark.parametrize(
    ("form", "stream", "is_json"),
    [
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
        ("json", Terminal(), True),
        ("console", io.StringIO(), False),
    ],
)
def test_a_terminal_gets_lines_for_people(form: Any, stream: io.StringIO, is_json: bool, restored: None) -> None:
    logs.configure(form, "info", stream)
    structlog.stdlib.get_logger("here").info("serving", listen="a:1")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("{") == is_json
    assert "serving" in line
    assert ("\x1b[" in line) == (isinstance(stream, Terminal) and not is_json)


def test_the_level_holds_for_all(restored: None) -> None:
    stream = io.StringIO()
    logs.configure("json", "warning", stream)
    structlog.stdlib.get_logger("here").info("quiet")
    logging.getLogger("library").info("quiet")
    structlog.stdlib.get_logger("here").warning("loud")
    assert [entry["event"] for entry in entries(stream)] == ["loud"]


# --- exceptions ------------------------------------------------------------------------------------------------------


def fail_with_a_secret() -> None:
    prompt = SECRET  # tracebacks with local variables would show it
    try:
        raise KeyError(prompt)
    except KeyError as error:
        raise ValueError(f"cannot encode {prompt}") from error


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("through", ["structlog", "logging"])
def test_an_exception_shows_where_but_not_what(form: Any, through: str, restored: None) -> None:
    stream = io.StringIO()
    logs.configure(form, "info", stream)
    logger: Any = structlog.stdlib.get_logger("here") if through == "structlog" else logging.getLogger("here")
    try:
        fail_with_a_secret()
    except ValueError:
        logger.exception("failed")
    text = stream.getvalue()
    assert SECRET not in text
    assert "ValueError" in text
    assert "caused by KeyError" in text
    assert "in fail_with_a_secret" in text


async def test_what_asyncio_reports_is_without_its_objects(log: io.StringIO) -> None:
    loop = asyncio.get_running_loop()
    previous = loop.get_exception_handler()
    logs.log_loop_exceptions(loop)
    try:
        called = asyncio.Event()
        loop.call_soon(lambda text: (called.set(), {}[text]), SECRET)
        await asyncio.wait_for(called.wait(), TIMEOUT)
        loop.call_exception_handler({"message": "unclosed something"})
    finally:
        loop.set_exception_handler(previous)
    failed, unclosed = entries(log)
    assert failed["exception"].startswith("KeyError\n")
    assert unclosed["event"] == "unclosed something"
    assert SECRET not in log.getvalue()


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def channel(
    log: io.StringIO, engine: draftwerk.Engine, figures: dict[str, Any], inprocess_server: InProcess
) -> AsyncIterator[grpc.aio.Channel]:
    async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as opened:
        yield opened


async def call_line(log: io.StringIO) -> dict[str, Any]:
    """The line of the one call; it may come after the client has its answer."""

    async def logged() -> dict[str, Any]:
        while not (found := entries(log, "call")):
            await asyncio.sleep(0)
        (entry,) = found
        return entry

    return await asyncio.wait_for(logged(), TIMEOUT)


def generate(channel: grpc.aio.Channel, text: str = "hello", **options: Any) -> Any:
    request = GenerateRequest(prompt=Prompt(text=text), stop=StopConditions(max_tokens=options.pop("max_tokens", 4)))
    stub = generation_pb2_grpc.GenerationStub(channel)
    return stub.Generate(request, metadata=(("x-request-id", "r1"),), **{"timeout": TIMEOUT, **options})


async def test_a_call_has_one_line_with_its_figures(channel: grpc.aio.Channel, log: io.StringIO) -> None:
    async for _ in generate(channel):
        pass
    entry = await call_line(log)
    assert entry["request_id"] == "r1"
    assert entry["method"] == "Generation/Generate"
    assert entry["code"] == "OK"
    assert entry["level"] == "info"
    assert entry["peer"].startswith("ipv4:127.0.0.1:")
    assert 0 < entry["seconds"] < TIMEOUT
    assert (entry["prompt_tokens"], entry["generated_tokens"], entry["finish_reason"]) == (6, 4, "length")


async def test_a_unary_call_has_one_too(channel: grpc.aio.Channel, log: io.StringIO) -> None:
    await models_pb2_grpc.ModelsStub(channel).GetModel(GetModelRequest(), timeout=TIMEOUT)
    entry = await call_line(log)
    assert (entry["method"], entry["code"], len(entry["request_id"])) == ("Models/GetModel", "OK", 32)


async def test_a_refused_call_says_which_field_and_not_what(channel: grpc.aio.Channel, log: io.StringIO) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in generate(channel, SECRET, max_tokens=-1):
            pass
    entry = await call_line(log)
    assert (entry["code"], entry["error"]) == ("INVALID_ARGUMENT", "invalid stop.max_tokens")
    assert entry["level"] == "info"


async def test_a_cancelled_call(channel: grpc.aio.Channel, log: io.StringIO, scripted: fake_core.Engine) -> None:
    scripted.gate.clear()
    call = generate(channel)
    await call.initial_metadata()
    call.cancel()
    assert (await call_line(log))["code"] == "CANCELLED"


async def test_a_deadline_that_passes(channel: grpc.aio.Channel, log: io.StringIO, scripted: fake_core.Engine) -> None:
    scripted.gate.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, timeout=0.2).read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await call_line(log))["code"] == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    ("elapsed", "remaining", "code"),
    [
        (5.0, None, grpc.StatusCode.CANCELLED),
        (0.5, -0.1, grpc.StatusCode.DEADLINE_EXCEEDED),
        (0.1, 0.05, grpc.StatusCode.DEADLINE_EXCEEDED),  # the client was faster than the clock here
        (60.02, 0.08, grpc.StatusCode.DEADLINE_EXCEEDED),  # gRPC makes 60.1 s of it
        (0.1, 0.2, grpc.StatusCode.CANCELLED),
        (59.0, 1.5, grpc.StatusCode.CANCELLED),
    ],
)
def test_a_client_may_end_a_call_before_its_deadline_is_here(
    elapsed: float, remaining: float | None, code: grpc.StatusCode
) -> None:
    assert cancellation(elapsed, remaining) is code


async def test_a_failed_generation_keeps_its_reason(
    channel: grpc.aio.Channel, log: io.StringIO, scripted: fake_core.Engine
) -> None:
    scripted.fail_with = "the logits are not finite"
    with pytest.raises(grpc.aio.AioRpcError):
        async for _ in generate(channel):
            pass
    entry = await call_line(log)
    assert (entry["code"], entry["level"]) == ("INTERNAL", "error")
    assert "the logits are not finite" in entry["error"]


async def test_no_word_of_a_client_is_in_the_log(
    channel: grpc.aio.Channel, log: io.StringIO, engine: draftwerk.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async for _ in generate(channel, SECRET):
        pass
    session = generation_pb2_grpc.GenerationStub(channel).Session(timeout=TIMEOUT)
    await session.write(SessionRequest(request_number=1, open=SessionRequest.Open()))
    await session.write(SessionRequest(request_number=2, append=SessionRequest.Append(content=Prompt(text=SECRET))))
    await session.write(SessionRequest(request_number=3, generate=SessionRequest.Generate()))
    for _ in range(3):
        await session.read()
    await session.done_writing()
    while await session.read() is not grpc.aio.EOF:
        pass

    errors: list[Exception] = [
        RequestError("prompt", SECRET, f"something else than {SECRET}"),
        ValueError(SECRET),
        UnicodeEncodeError("utf-8", SECRET, 0, 1, SECRET),
    ]
    for error in errors:

        def broken(*_: Any, raised: Exception = error, **__: Any) -> None:
            raise raised

        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", broken)
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in generate(channel, SECRET):
                    pass
    while len(entries(log, "call")) < 5:
        await asyncio.sleep(0)
    assert len(entries(log, "a call failed")) == 2
    assert SECRET not in log.getvalue()
    assert SECRET.split()[1] not in log.getvalue()


def test_the_default_is_stderr(restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", "info")
    structlog.stdlib.get_logger("here").info("hello")
    sys.stderr.flush()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["event"] == "hello"


async def test_a_failed_handshake_leaves_no_line_that_is_not_json(
    server_process: ServerFactory, certificates: Path
) -> None:
    pair = ("--tls-certificate", str(certificates / "server.pem"), "--tls-key", str(certificates / "server.key"))
    running = server_process(*pair)
    async with grpc.aio.insecure_channel(running.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await models_pb2_grpc.ModelsStub(channel).GetModel(GetModelRequest(), timeout=TIMEOUT)
    trusted = grpc.ssl_channel_credentials((certificates / "server.pem").read_bytes())
    async with grpc.aio.secure_channel(running.address, trusted) as channel:
        await models_pb2_grpc.ModelsStub(channel).GetModel(GetModelRequest(), timeout=TIMEOUT)
    running.server.wait_for("call")
    assert all(line.startswith("{") for line in running.server.lines), running.server.lines
