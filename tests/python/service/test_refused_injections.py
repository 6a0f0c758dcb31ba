"""An injection that is refused leaves the generation as if it had not been asked for."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from session_client import LENGTH, TIMEOUT, eventually, hold_after, text_of, tokens_of

from draftwerk import Engine, SamplingParams
from draftwerk.server.branch import Branch, BranchGeneration
from draftwerk.server.chat_history import ChatHistory
from draftwerk.server.errors import InvalidField
from draftwerk.server.metrics import Metrics
from draftwerk_client.v1 import output_pb2
from draftwerk_client.v1 import session_pb2 as pb
from fake_checkpoint import NATIVE_MODULE_BUILT
from fake_core import Engine as ScriptedEngine

PROMPT = [2, 20, 30]


class Unread:
    """A generation that nobody reads until `read`."""

    def __init__(self, engine: Engine, params: SamplingParams, max_unread_tokens: int) -> None:
        self._reads = asyncio.Event()
        self._messages: list[output_pb2.GenerateResponse] = []
        branch = Branch(0, engine.conversation(), array("i", PROMPT), ChatHistory())
        metrics = Metrics(engine)
        self.generation = BranchGeneration(1, branch, params, engine, metrics, max_unread_tokens, None, self._send)
        self.generation.task = asyncio.create_task(self.generation.run())

    async def _send(self, response: pb.SessionResponse) -> None:
        await self._reads.wait()
        assert response.HasField("generated")
        self._messages.append(response.generated)

    async def read(self) -> list[output_pb2.GenerateResponse]:
        self._reads.set()
        assert self.generation.task is not None
        await asyncio.wait_for(self.generation.task, TIMEOUT)
        return self._messages


@asynccontextmanager
async def unread(engine: Engine, params: SamplingParams, max_unread_tokens: int) -> AsyncIterator[Unread]:
    engine.deliver_on(asyncio.get_running_loop())
    running = Unread(engine, params, max_unread_tokens)
    yield running
    running.generation.cancel()


@pytest.fixture
def tiny_engine(tiny_model_path: Path) -> Iterator[Engine]:
    if not NATIVE_MODULE_BUILT:
        pytest.skip("the native module is not built")
    with Engine(tiny_model_path, threads=1, device="cpu") as engine:
        yield engine


async def test_the_tokens_are_those_of_a_generation_without_it(tiny_engine: Engine) -> None:
    params = SamplingParams(max_tokens=1000, ignore_eos=True, presence_penalty=2.0, frequency_penalty=0.3)
    expected = await tiny_engine.agenerate(PROMPT, params)
    async with unread(tiny_engine, params, max_unread_tokens=500) as running:
        await eventually(lambda: tiny_engine.stats()["paused"] == 1)
        # There is room behind what was sent, not behind what was generated.
        injecting = asyncio.create_task(running.generation.inject(2, [40] * 600))
        await asyncio.sleep(0)
        messages = await running.read()
        with pytest.raises(InvalidField, match="content = 600 tokens: must be at most "):
            await injecting
    assert tokens_of(messages) == list(expected.token_ids)
    assert text_of(messages) == expected.text
    assert messages[-1].finish_reason == LENGTH
    assert {message.fingerprint for message in messages} == {messages[0].fingerprint}


@pytest.mark.parametrize("missing", [0, 1])
async def test_the_step_under_way_counts_with_all_that_it_may_bring(
    engine: Engine, scripted: ScriptedEngine, missing: int
) -> None:
    hold_after(scripted, 100)
    async with unread(engine, SamplingParams(max_tokens=104), max_unread_tokens=1000) as running:
        await eventually(lambda: not scripted.gate.is_set())
        longest = len(PROMPT) + 100 + engine.info.max_draft_length + 1
        injected = asyncio.create_task(running.generation.inject(2, [40] * (4096 - 1 - longest + missing)))
        await eventually(lambda: len(scripted.resumes) == missing == 1 or len(scripted.cancelled) == 1)
        assert scripted.pauses == [1]
        if missing:
            with pytest.raises(InvalidField, match="content = "):
                await injected
            scripted.gate.set()
            assert len(tokens_of(await running.read())) == 104
            assert (len(scripted.requests), scripted.cancelled) == (1, [])
        else:
            injected.cancel()


async def test_a_generation_that_waits_for_its_reader_goes_on_waiting(engine: Engine, scripted: ScriptedEngine) -> None:
    async with unread(engine, SamplingParams(max_tokens=200), max_unread_tokens=10) as running:
        await eventually(lambda: len(scripted.pauses) == 1)
        with pytest.raises(InvalidField):
            await running.generation.inject(2, [40] * 4090)
        assert scripted.resumes == []
        assert len(tokens_of(await running.read())) == 200
