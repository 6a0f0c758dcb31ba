"""64 streams, of which 8 stop reading, 8 are cancelled and 8 outlive their deadline: the others notice nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from conformance.served import MAX_CONTEXT, Served
from conformance.sessions import text_of, token_prompt, tokens_of
from draftwerk import Engine, SamplingParams
from draftwerk_client.v1 import generation_pb2, generation_pb2_grpc, output_pb2, parameters_pb2
from service.serve_process import TIMEOUT

STEADY, STALLED, CANCELLED, LATE = 40, 8, 8, 8
STEADY_TOKENS, STALLED_TOKENS = 200, 2500
# A stalled stream fills the windows of HTTP/2 before the server notices; small ones and long messages make that soon.
CHANNEL_OPTIONS = [("grpc.http2.lookahead_bytes", 16 << 10), ("grpc.http2.bdp_probe", 0)]

Call = Any  # grpc.aio.UnaryStreamCall; its types say less than this


@dataclass(frozen=True)
class Asked:
    """One request, for the server and for the engine in this process."""

    prompt: tuple[int, ...]
    seed: int
    tokens: int
    logprobs: int | None = None

    @property
    def request(self) -> generation_pb2.GenerateRequest:
        return generation_pb2.GenerateRequest(
            prompt=token_prompt(self.prompt),
            sampling=parameters_pb2.SamplingParameters(temperature=1.0, seed=self.seed),
            stop=parameters_pb2.StopConditions(max_tokens=self.tokens, ignore_end_tokens=True),
            output=parameters_pb2.OutputOptions(logprobs=self.logprobs),
        )

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=1.0, seed=self.seed, max_tokens=self.tokens, ignore_eos=True)


def asked(kind: int, count: int, tokens: int, logprobs: int | None = None) -> list[Asked]:
    random_ids = random.Random(kind)
    return [
        Asked((2, *(random_ids.randrange(3, 300) for _ in range(number))), 100 * kind + number, tokens, logprobs)
        for number in range(count)
    ]


@pytest.fixture
async def stubs(server: Served) -> AsyncIterator[list[generation_pb2_grpc.GenerationStub]]:
    """Four connections, for well-behaved and other streams alike."""
    channels = [
        grpc.aio.insecure_channel(server.address, options=[*CHANNEL_OPTIONS, ("grpc.channel_id", number)])
        for number in range(4)
    ]
    yield [generation_pb2_grpc.GenerationStub(channel) for channel in channels]
    for channel in channels:
        await channel.close()
    # Calls that were cancelled end a moment later. grpc.aio tells the loop of it, and takes a closed one badly.
    if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(tasks, timeout=TIMEOUT)


async def read_all(call: Call) -> list[output_pb2.GenerateResponse]:
    """What is left of a stream."""
    responses: list[output_pb2.GenerateResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def cancel_after(call: Call, messages: int) -> None:
    for _ in range(messages):
        await call.read()
    call.cancel()


async def outlive_deadline(call: Call) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await read_all(call)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_misbehaving_streams_cost_the_others_nothing(
    server: Served, reference: Engine, stubs: list[generation_pb2_grpc.GenerationStub]
) -> None:
    steady = asked(1, STEADY, STEADY_TOKENS)
    stalled = asked(2, STALLED, STALLED_TOKENS, logprobs=20)
    endless = asked(3, CANCELLED + LATE, MAX_CONTEXT - 100)
    chance = random.Random(0)
    before = await asyncio.to_thread(server.wait_idle)

    def call(number: int, one: Asked, timeout: float = TIMEOUT) -> Call:
        return stubs[number % len(stubs)].Generate(one.request, timeout=timeout)

    stalled_calls = [call(number, one) for number, one in enumerate(stalled)]
    begun = [await one.read() for one in stalled_calls]  # and no more for now
    cancelled = [cancel_after(call(i, one), chance.randrange(40)) for i, one in enumerate(endless[:CANCELLED])]
    late = [outlive_deadline(call(i, one, chance.uniform(0.05, 0.5))) for i, one in enumerate(endless[CANCELLED:])]
    reading = [read_all(call(number, one)) for number, one in enumerate(steady)]
    outputs, *_ = await asyncio.wait_for(
        asyncio.gather(asyncio.gather(*reading), asyncio.gather(*cancelled), asyncio.gather(*late)), TIMEOUT
    )
    for expected, output in zip(
        reference.generate([list(one.prompt) for one in steady], [one.params for one in steady]), outputs, strict=True
    ):
        assert tokens_of(output) == list(expected.token_ids)
        assert text_of(output) == expected.text

    # Only stalled ones are left, and they hold no place. Some may have got to their end before the server noticed:
    # this model gives a thousand tokens while the event loop is busy with others.
    stats = await asyncio.to_thread(server.wait_for_stats, running=0, waiting=0)
    assert 0 < stats.paused == stats.requests - stats.finished <= STALLED
    assert stats.generated_tokens - before.generated_tokens > STEADY * STEADY_TOKENS
    assert stats.cache.used_bytes == stats.cache.reclaimable_bytes
    more = asked(5, 8, STEADY_TOKENS)
    await asyncio.wait_for(asyncio.gather(*(read_all(call(number, one)) for number, one in enumerate(more))), TIMEOUT)
    later = await asyncio.to_thread(server.wait_for_stats, running=0, waiting=0, paused=stats.paused)
    assert later.generated_tokens - stats.generated_tokens == len(more) * STEADY_TOKENS  # the stalled ones: none

    # They read on, and miss nothing.
    rest = await asyncio.wait_for(asyncio.gather(*map(read_all, stalled_calls)), TIMEOUT)
    for one, first, others in zip(stalled, begun, rest, strict=True):
        expected = reference.generate(list(one.prompt), one.params)
        assert tokens_of([first, *others]) == list(expected.token_ids)
        assert text_of([first, *others]) == expected.text
        assert sum(len(response.logprobs) for response in [first, *others]) == one.tokens

    after = await asyncio.to_thread(server.wait_idle)
    assert after.requests - before.requests == after.finished - before.finished
    assert after.cache.used_bytes == after.cache.reclaimable_bytes


async def test_stalled_streams_are_cancelled_too(
    server: Served, stubs: list[generation_pb2_grpc.GenerationStub]
) -> None:
    """Nobody has to read for a cancellation to arrive."""
    calls: list[Call] = [
        stubs[0].Generate(one.request, timeout=TIMEOUT) for one in asked(4, 4, MAX_CONTEXT - 100, logprobs=20)
    ]
    for call in calls:
        await call.read()
    await asyncio.to_thread(server.wait_for_stats, running=0, waiting=0, paused=4)
    for call in calls:
        call.cancel()
    after = await asyncio.to_thread(server.wait_idle)
    assert after.cache.used_bytes == after.cache.reclaimable_bytes
