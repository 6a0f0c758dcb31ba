"""A consumer that stops reading pauses its own request, in bounded memory, and nobody else's."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from draftwerk import Engine, EngineClosed, Generation, RequestError, SamplingParams
from fake_core import Engine as ScriptedEngine

TIMEOUT = 10.0


@pytest.mark.parametrize("limit", [0, 1, 4, 7])
def test_a_request_pauses_above_the_limit_and_goes_on_when_all_is_read(
    engine: Engine, scripted: ScriptedEngine, limit: int
) -> None:
    generation = engine.submit("xyz", SamplingParams(max_tokens=100), max_unread_tokens=limit)
    scripted.wait_for(lambda: scripted.pauses)
    assert limit < scripted.written(1) <= limit + 2  # two tokens a step
    unread = scripted.written(1)
    while unread > 2:
        unread -= len(next(generation).token_ids)
        assert scripted.resumes == []
    next(generation)
    assert scripted.resumes == [1]
    scripted.wait_for(lambda: len(scripted.pauses) == 2)
    assert generation.result().token_ids == engine.generate("xyz", SamplingParams(max_tokens=100)).token_ids


@pytest.mark.parametrize("limit", [0, 1, 5, 1000])
def test_the_output_is_the_same(engine: Engine, scripted: ScriptedEngine, limit: int) -> None:
    params = SamplingParams(max_tokens=201, stop=["never"])
    chunks = list(engine.submit("some prompt", params, max_unread_tokens=limit))
    expected = engine.generate("some prompt", params)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected.token_ids
    assert len(scripted.resumes) <= len(scripted.pauses) <= len(scripted.resumes) + 1


async def test_a_consumer_that_keeps_up_is_never_paused(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(asyncio.get_running_loop())
    generation = engine.submit("xyz", SamplingParams(max_tokens=100), max_unread_tokens=2)
    assert len([chunk async for chunk in generation]) == 50
    assert scripted.pauses == []


async def test_only_the_request_of_the_slow_consumer_pauses(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(asyncio.get_running_loop())
    params = SamplingParams(max_tokens=60)
    slow = engine.submit([101], params, max_unread_tokens=8)
    fast = [engine.submit([102 + i], params, max_unread_tokens=8) for i in range(3)]
    texts = await asyncio.gather(*(asyncio.wait_for(read(generation), TIMEOUT) for generation in fast))
    assert texts == [letter * 60 for letter in "bcd"]
    assert scripted.pauses == [slow.request_id]
    assert scripted.written(slow.request_id) == 10
    assert await asyncio.wait_for(read(slow), TIMEOUT) == "a" * 60


async def read(generation: Generation) -> str:
    return "".join([chunk.text async for chunk in generation])


def test_what_was_under_way_when_it_paused_still_arrives(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.pause_lag = 3
    generation = engine.submit("xyz", SamplingParams(max_tokens=50), max_unread_tokens=4)
    scripted.wait_for(lambda: scripted.pauses and scripted.written(1) == 12)
    positions = [next(generation).position for _ in range(5)]
    assert (positions, scripted.pauses, scripted.resumes) == ([4, 6, 8, 10, 12], [1], [])
    next(generation)
    assert scripted.resumes == [1]
    assert len(generation.result().token_ids) == 50


def test_waiting_for_the_end_lifts_the_limit(engine: Engine, scripted: ScriptedEngine) -> None:
    params = SamplingParams(max_tokens=40)
    for wait in (Generation.wait, Generation.result):
        generation = engine.submit([101], params, max_unread_tokens=3)
        scripted.wait_for(lambda: len(scripted.pauses) == len(scripted.resumes) + 1)
        assert wait(generation, TIMEOUT)
        assert "".join(chunk.text for chunk in generation) in ("a" * 40, "")
        assert generation.result().text == "a" * 40
    assert scripted.pauses == scripted.resumes == [1, 2]


async def test_aresult_lifts_the_limit(engine: Engine, scripted: ScriptedEngine) -> None:
    engine.deliver_on(asyncio.get_running_loop())
    generation = engine.submit([101], SamplingParams(max_tokens=40), max_unread_tokens=3)
    await anext(generation)
    assert (await asyncio.wait_for(generation.aresult(), TIMEOUT)).text == "a" * 40


def test_a_paused_request_can_be_cancelled(engine: Engine, scripted: ScriptedEngine) -> None:
    generation = engine.submit([101], SamplingParams(max_tokens=1000), max_unread_tokens=4)
    scripted.wait_for(lambda: scripted.pauses)
    generation.cancel()
    chunks = list(generation)
    assert [chunk.text for chunk in chunks] == ["aa", "aa", "aa", ""]
    assert chunks[-1].finish_reason == "cancelled"


def test_closing_the_engine_ends_a_paused_request(engine: Engine, scripted: ScriptedEngine) -> None:
    generation = engine.submit([101], SamplingParams(max_tokens=1000), max_unread_tokens=4)
    scripted.wait_for(lambda: scripted.pauses)
    engine.close()
    assert [next(generation).text for _ in range(3)] == ["aa"] * 3
    with pytest.raises(EngineClosed):
        next(generation)


@pytest.mark.parametrize("value", [-1, 1.5, "5", True])
def test_a_limit_that_is_none(engine: Engine, value: object) -> None:
    with pytest.raises(RequestError, match="max_unread_tokens"):
        engine.submit("a", max_unread_tokens=value)  # type: ignore[arg-type]


def test_threads_that_read_at_their_own_speed_all_finish(engine: Engine) -> None:
    texts: dict[int, str] = {}

    def work(i: int) -> None:
        rng = random.Random(i)
        generation = engine.submit([101 + i], SamplingParams(max_tokens=1500), max_unread_tokens=rng.randrange(6))
        pieces = []
        for chunk in generation:
            pieces.append(chunk.text)
            if rng.random() < 0.3:
                threading.Event().wait(0.0001)  # lets others run
        texts[i] = "".join(pieces)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == {i: chr(97 + i) * 1500 for i in range(6)}
