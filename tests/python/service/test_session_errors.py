"""Generation.Session over a real port and a scripted core: what is refused, and how calls end."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from session_client import (
    CLOSE,
    FORK,
    INTERRUPT,
    LENGTH,
    TIMEOUT,
    Request,
    SessionClient,
    append,
    at_most,
    code_of,
    detail_of,
    eventually,
    inject,
    start_and_hold,
    tokens_of,
)

from draftwerk.server.server import Server
from draftwerk_client.v1 import parameters_pb2
from draftwerk_client.v1 import session_pb2 as pb
from fake_checkpoint import VOCABULARY
from fake_core import Engine as ScriptedEngine
from fake_core import QueueFull as CoreQueueFull

INVALID_ARGUMENT, FAILED_PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


# --- what is wrong with an action is answered, and the session goes on ----------------------------------------------


def sampling(**values: Any) -> Request.Generate:
    return Request.Generate(sampling=parameters_pb2.SamplingParameters(**values))


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"append": append([10, VOCABULARY])}, "content.token_ids.ids[1]"),
        ({"append": append([-1])}, "content.token_ids.ids[0]"),
        ({"append": append([10] * 4096)}, "content"),
        ({"append": append([10] * 5000)}, "content.token_ids.ids"),
        ({"append": Request.Append()}, "content"),
        ({"append": Request.Append(content={"messages": {}})}, "content.messages.messages"),
        ({"generate": Request.Generate(output=parameters_pb2.OutputOptions(logprobs=21))}, "output.logprobs"),
        ({"generate": Request.Generate(stop=at_most(0))}, "stop.max_tokens"),
        ({"generate": sampling(logit_bias={-1: 1.0})}, "sampling.logit_bias"),
        ({"generate": Request.Generate(stop=parameters_pb2.StopConditions(token_ids=[-1]))}, "stop.token_ids[0]"),
        ({"fork": Request.Fork(position=2)}, "position"),
    ],
)
async def test_wrong_values_name_their_field(session: SessionClient, action: dict[str, Any], field: str) -> None:
    await session.append(10)
    response = await session.answer(**action)
    assert code_of(response) is INVALID_ARGUMENT
    violation = detail_of(response, error_details_pb2.BadRequest()).field_violations[0]
    assert violation.field == field
    assert "must be" in violation.description
    assert tokens_of(await session.generate(stop=at_most(2))) == [10, 10]


@pytest.mark.parametrize(
    ("branch", "action", "remedy"),
    [
        (0, {"generate": Request.Generate()}, "append to it first"),
        (0, {"interrupt": INTERRUPT}, "between `generate`"),
        (0, {"inject": inject([10])}, "between `generate`"),
        (1, {"append": append([10])}, "branch 0"),
        (-1, {"close": CLOSE}, "branch 0"),
    ],
)
async def test_actions_out_of_order_say_what_to_do(
    session: SessionClient, branch: int, action: dict[str, Any], remedy: str
) -> None:
    response = await session.answer(branch, **action)
    assert code_of(response) is FAILED_PRECONDITION
    violation = detail_of(response, error_details_pb2.PreconditionFailure()).violations[0]
    assert (violation.type, violation.subject) == ("SESSION_STATE", f"branch {branch}")
    assert remedy in violation.description
    assert (await session.append(10)).appended.length == 1


@pytest.mark.parametrize("action", [{"append": append([10])}, {"generate": Request.Generate()}])
async def test_a_branch_that_generates_takes_nothing_else(
    session: SessionClient, scripted: ScriptedEngine, action: dict[str, Any]
) -> None:
    await start_and_hold(session, scripted, after=2, stop=at_most(4))
    number = session.last_request_number
    response = await session.answer(**action)
    assert code_of(response) is FAILED_PRECONDITION
    assert f"branch 0 is generating, since request {number}" in response.error.message
    scripted.gate.set()
    assert len(tokens_of(await session.generated())) == 2


async def test_messages_cannot_be_injected(session: SessionClient, scripted: ScriptedEngine) -> None:
    await start_and_hold(session, scripted, after=2, stop=at_most(4))
    response = await session.answer(inject=Request.Inject(content={"messages": {}}))
    assert code_of(response) is INVALID_ARGUMENT
    assert detail_of(response, error_details_pb2.BadRequest()).field_violations[0].field == "content.messages"


async def test_a_full_queue_is_answered_with_a_delay(
    session: SessionClient, scripted: ScriptedEngine, figures: dict[str, Any]
) -> None:
    await session.append(10)
    scripted.refuse_with = CoreQueueFull("full")
    response = await session.answer(generate=Request.Generate())
    assert code_of(response) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail_of(response, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() >= 100
    scripted.refuse_with = None
    assert tokens_of(await session.generate(stop=at_most(2))) == [10, 10]


async def test_a_generation_that_fails_in_the_engine(session: SessionClient, scripted: ScriptedEngine) -> None:
    await session.append(10)
    scripted.fail_with = "out of smoke"
    response = await session.answer(generate=Request.Generate())
    assert code_of(response) is grpc.StatusCode.INTERNAL
    assert "out of smoke" in response.error.message
    assert detail_of(response, error_details_pb2.RequestInfo()).request_id
    scripted.fail_with = ""
    assert tokens_of(await session.generate(stop=at_most(2))) == [10, 10]


async def test_the_end_of_the_context(session: SessionClient) -> None:
    await session.append(*[10] * 4090)
    messages = await session.generate()  # names no max_tokens
    assert (len(tokens_of(messages)), messages[-1].finish_reason) == (6, LENGTH)
    response = await session.answer(generate=Request.Generate())
    assert code_of(response) is FAILED_PRECONDITION
    assert "fork it at an earlier position" in response.error.message


# --- what breaks the protocol ends the call -------------------------------------------------------------------------


def newer_action() -> pb.SessionRequest:
    return pb.SessionRequest.FromString(b"\x08\x05\xf2\x3f\x00")  # request number 5, field 1022 of length 0


@pytest.mark.parametrize(
    ("requests", "code", "message"),
    [
        ([Request(request_number=1, append=append([10]))], FAILED_PRECONDITION, "append came before open"),
        ([Request(request_number=2, open={}), Request(request_number=3, open={})], FAILED_PRECONDITION, "open already"),
        ([Request(open={})], INVALID_ARGUMENT, "request_number = 0: must be more than 0"),
        (
            [Request(request_number=2, open={}), Request(request_number=2, fork={})],
            INVALID_ARGUMENT,
            "request_number = 2: must be more than 2",
        ),
        ([Request(request_number=1, open={}), Request(request_number=2)], INVALID_ARGUMENT, "action = absent"),
        ([Request(request_number=1, open={}), newer_action()], INVALID_ARGUMENT, "1022 = set: must be absent"),
        ([Request(request_number=1, branch=1, open={})], INVALID_ARGUMENT, "branch = 1: must be 0"),
        ([Request(request_number=1, open={"model": "llama"})], grpc.StatusCode.NOT_FOUND, "'fake-model'"),
        ([Request(request_number=1, open={"output": {"logprobs": 21}})], INVALID_ARGUMENT, "output.logprobs = 21"),
        ([Request(request_number=1, open={"cache_salt": "x" * 257})], INVALID_ARGUMENT, "cache_salt"),
    ],
)
async def test_violations(
    scripted_channel: grpc.aio.Channel,
    scripted: ScriptedEngine,
    requests: list[pb.SessionRequest],
    code: grpc.StatusCode,
    message: str,
) -> None:
    client = SessionClient(scripted_channel)
    for request in requests:
        await client.call.write(request)
    for _ in requests[1:]:
        assert (await client.next()).HasField("opened")
    assert await client.code() is code
    assert message in await client.call.details()
    assert not scripted.conversations


async def test_a_violation_ends_what_runs(session: SessionClient, scripted: ScriptedEngine) -> None:
    await start_and_hold(session, scripted, after=2)
    await session.call.write(Request(request_number=1, fork={}))
    assert await session.code() is INVALID_ARGUMENT
    assert scripted.cancelled
    await eventually(lambda: not scripted.conversations)


# --- the end of a call ----------------------------------------------------------------------------------------------


async def test_a_call_without_actions(scripted_channel: grpc.aio.Channel) -> None:
    assert await SessionClient(scripted_channel).end() is grpc.StatusCode.OK


async def test_what_runs_finishes_after_the_client_has_ended_its_side(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await start_and_hold(session, scripted, after=2, stop=at_most(6))
    await session.call.done_writing()
    scripted.gate.set()
    assert (await session.generated())[-1].finish_reason == LENGTH
    assert await session.code() is grpc.StatusCode.OK
    assert not scripted.conversations


async def test_a_cancelled_call_stops_its_generations_and_frees_its_branches(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await start_and_hold(session, scripted, after=2)
    await session.answer(fork=FORK)
    session.call.cancel()
    await eventually(lambda: set(scripted.cancelled) == {1} and not scripted.conversations)


async def test_a_deadline_stops_its_generations(scripted_channel: grpc.aio.Channel, scripted: ScriptedEngine) -> None:
    client = SessionClient(scripted_channel, timeout=2.0)
    await client.open()
    await start_and_hold(client, scripted, after=2)
    assert await client.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: set(scripted.cancelled) == {1} and not scripted.conversations)


async def test_a_server_that_shuts_down_finishes_what_runs_and_ends_the_call(
    session: SessionClient, scripted: ScriptedEngine, serving: Server
) -> None:
    await start_and_hold(session, scripted, after=2, stop=at_most(6))
    await session.answer(fork=FORK)
    stopping = asyncio.create_task(serving.stop(TIMEOUT))
    await session.act(1, append=append([10]))
    assert code_of(await session.next()) is grpc.StatusCode.UNAVAILABLE
    scripted.gate.set()
    assert (await session.generated())[-1].finish_reason == LENGTH
    assert await session.code() is grpc.StatusCode.UNAVAILABLE
    assert not scripted.conversations
    await asyncio.wait_for(stopping, TIMEOUT)


async def test_an_idle_session_ends_when_the_server_shuts_down(session: SessionClient, serving: Server) -> None:
    stopping = asyncio.create_task(serving.stop(TIMEOUT))
    assert await session.code() is grpc.StatusCode.UNAVAILABLE
    await asyncio.wait_for(stopping, TIMEOUT)


# --- a client that does not read ------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_pauses_its_own_sequences_only(
    session: SessionClient, scripted_channel: grpc.aio.Channel, scripted: ScriptedEngine
) -> None:
    await session.append(10, 11, 12)
    heavy = parameters_pb2.OutputOptions(logprobs=20, token_bytes=True)
    await session.act(generate=Request.Generate(stop=at_most(4000), output=heavy))
    await eventually(lambda: scripted.pauses == [1])  # more than what flow control lets through is unread

    other = SessionClient(scripted_channel)
    await other.open()
    await other.append(20)
    assert len(tokens_of(await other.generate(stop=at_most(50)))) == 50
    assert scripted.pauses == [1]

    messages = await session.generated()
    assert len(tokens_of(messages)) == 4000
    assert [message.position for message in messages] == list(range(3, 4003, 2))
    assert scripted.resumes
    other.call.cancel()
