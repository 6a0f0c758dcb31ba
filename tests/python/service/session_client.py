"""The client's side of Generation.Session on the raw stubs: sends actions, shows every message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from draftwerk_client.v1 import generation_pb2_grpc, output_pb2, parameters_pb2
from draftwerk_client.v1 import session_pb2 as pb
from fake_core import Engine as ScriptedEngine
from fake_core import Request as CoreRequest
from fake_core import repeat_prompt

TIMEOUT = 20.0

Request = pb.SessionRequest
INTERRUPT, FORK, CLOSE = Request.Interrupt(), Request.Fork(), Request.Close()
STOP, LENGTH, CANCELLED = (
    output_pb2.FINISH_REASON_STOP,
    output_pb2.FINISH_REASON_LENGTH,
    output_pb2.FINISH_REASON_CANCELLED,
)


class SessionClient:
    """One call. `act` sends, `next` receives."""

    def __init__(self, channel: grpc.aio.Channel, **call_options: Any) -> None:
        self.call = generation_pb2_grpc.GenerationStub(channel).Session(**call_options)
        self.last_request_number = 0

    async def act(self, branch: int = 0, **action: Message) -> int:
        """Sends an action and returns its number."""
        self.last_request_number += 1
        request = Request(request_number=self.last_request_number, branch=branch, **action)  # type: ignore[arg-type]
        await asyncio.wait_for(self.call.write(request), TIMEOUT)
        return self.last_request_number

    async def next(self) -> pb.SessionResponse:
        """The next message."""
        response = await asyncio.wait_for(self.call.read(), TIMEOUT)
        assert response is not grpc.aio.EOF, "the call has ended"
        return response

    async def answer(self, branch: int = 0, **action: Message) -> pb.SessionResponse:
        """Sends an action while nothing generates, and returns its answer."""
        number = await self.act(branch, **action)
        response = await self.next()
        assert (response.request_number, response.branch) == (number, branch)
        return response

    async def open(self, **fields: Any) -> pb.SessionResponse:
        return await self.answer(open=Request.Open(**fields))

    async def append(self, *token_ids: int, branch: int = 0) -> pb.SessionResponse:
        return await self.answer(branch, append=append(token_ids))

    async def generated(self) -> list[output_pb2.GenerateResponse]:
        """The messages of the generation that runs, which must be the next ones, up to its last."""
        messages = []
        while True:
            response = await self.next()
            assert response.HasField("generated"), response
            messages.append(response.generated)
            if response.generated.finish_reason:
                return messages

    async def generate(self, branch: int = 0, **fields: Any) -> list[output_pb2.GenerateResponse]:
        """Generates while nothing else does."""
        await self.act(branch, generate=Request.Generate(**fields))
        return await self.generated()

    async def end(self) -> grpc.StatusCode:
        """Ends the client's side and returns the call's code; nothing may come any more."""
        await self.call.done_writing()
        assert await asyncio.wait_for(self.call.read(), TIMEOUT) is grpc.aio.EOF
        return await self.code()

    async def code(self) -> grpc.StatusCode:
        """The code that the call ends with."""
        return await asyncio.wait_for(self.call.code(), TIMEOUT)


def ids_prompt(token_ids: Sequence[int]) -> parameters_pb2.Prompt:
    return parameters_pb2.Prompt(token_ids=parameters_pb2.TokenIds(ids=token_ids))


def append(content: str | Sequence[int]) -> pb.SessionRequest.Append:
    return Request.Append(
        content=parameters_pb2.Prompt(text=content) if isinstance(content, str) else ids_prompt(content)
    )


def inject(content: str | Sequence[int]) -> pb.SessionRequest.Inject:
    return Request.Inject(
        content=parameters_pb2.Prompt(text=content) if isinstance(content, str) else ids_prompt(content)
    )


def at_most(tokens: int) -> parameters_pb2.StopConditions:
    return parameters_pb2.StopConditions(max_tokens=tokens)


def tokens_of(messages: Sequence[output_pb2.GenerateResponse]) -> list[int]:
    return [token_id for message in messages for token_id in message.token_ids]


def text_of(messages: Sequence[output_pb2.GenerateResponse]) -> str:
    return "".join(message.text for message in messages)


def hold_after(core: ScriptedEngine, tokens: int) -> None:
    """The model stops, without an end, once any request has this many tokens; core.gate.set() lets it go on."""

    def next_token(request: CoreRequest, index: int) -> int:
        if index == tokens - 1:
            core.gate.clear()
        return repeat_prompt(request, index)

    core.next_token = next_token


async def start_and_hold(session: SessionClient, core: ScriptedEngine, *, after: int, **fields: Any) -> list[int]:
    """Generates on branch 0 from the tokens 10, 11, 12 and returns the tokens that came before the model stopped."""
    hold_after(core, after)
    await session.append(10, 11, 12)
    await session.act(generate=Request.Generate(**fields))
    tokens: list[int] = []
    while len(tokens) < after:
        tokens += (await session.next()).generated.token_ids
    return tokens


async def eventually(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), TIMEOUT)


def code_of(response: pb.SessionResponse) -> grpc.StatusCode:
    assert response.HasField("error"), response
    return next(code for code in grpc.StatusCode if code.value[0] == response.error.code)


def detail_of(response: pb.SessionResponse, detail: Any) -> Any:
    found = [any_ for any_ in response.error.details if any_.Unpack(detail)]
    assert len(found) == 1, response
    return detail
