"""Conversations: what one request computed is where the next one starts; the tokens stay the same."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from draftwerk import Conversation, Engine, EngineClosed, RequestError, SamplingParams
from fake_checkpoint import NATIVE_MODULE_BUILT, FakeCheckpoint
from fake_core import Engine as ScriptedEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import fuzz_requests
import tiny_files as tiny


def test_requests_name_their_conversation(engine: Engine, scripted: ScriptedEngine) -> None:
    first, second = engine.conversation(), engine.conversation()
    for conversation in (first, second, None, first):
        engine.submit("a", SamplingParams(max_tokens=1), conversation=conversation).result()
    assert [request.conversation for request in scripted.requests] == [first.id, second.id, 0, first.id]
    assert first.id != second.id
    assert engine.stats()["conversations"] == 2


def test_a_turn_computes_only_what_is_new(engine: Engine) -> None:
    with engine.conversation() as conversation:
        first = engine.submit([101, 102, 103], SamplingParams(max_tokens=5), conversation=conversation).result()
        assert first.stats.cached_tokens == 0
        sequence = [*first.prompt_token_ids, *first.token_ids, 110]
        second = engine.submit(sequence, SamplingParams(max_tokens=5), conversation=conversation).result()
        assert second.stats.cached_tokens == 7  # all but the last generated token, which nothing followed
        assert second.token_ids == engine.generate(sequence, SamplingParams(max_tokens=5)).token_ids
        other = engine.submit([101, 109], SamplingParams(max_tokens=5), conversation=conversation).result()
        assert other.stats.cached_tokens == 0


def test_closing_gives_back_what_is_kept(engine: Engine, scripted: ScriptedEngine) -> None:
    with engine.conversation() as conversation:
        assert not conversation.closed
        assert list(scripted.conversations) == [conversation.id]
    assert conversation.closed
    assert not scripted.conversations
    conversation.close()  # again: nothing happens
    forgotten = engine.conversation()
    assert scripted.conversations
    del forgotten
    gc.collect()
    assert not scripted.conversations


def test_a_request_goes_on_when_its_conversation_is_closed(engine: Engine, scripted: ScriptedEngine) -> None:
    scripted.gate.clear()
    conversation = engine.conversation()
    generation = engine.submit([101], SamplingParams(max_tokens=4), conversation=conversation)
    conversation.close()
    scripted.gate.set()
    assert generation.result(timeout=10).text == "aaaa"


def test_a_conversation_that_cannot_be_used(engine: Engine, checkpoint: FakeCheckpoint) -> None:
    closed = engine.conversation()
    closed.close()
    with Engine("other") as other:
        for conversation in (closed, other.conversation()):
            with pytest.raises(RequestError, match=r"conversation = .*: must be an open one of this engine"):
                engine.submit("a", conversation=conversation)
    left = engine.conversation()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.conversation()
    with pytest.raises(EngineClosed):
        engine.submit("a", conversation=left)
    left.close()


# --- on the native engine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if not NATIVE_MODULE_BUILT:
        pytest.skip("the native module is not built")
    with fuzz_requests.tiny_engine(tmp_path_factory.mktemp("tiny")) as engine:
        yield engine


def turn(engine: Engine, sequence: list[int], params: SamplingParams, conversation: Conversation | None) -> list[int]:
    """The sequence with what the engine generates behind it."""
    completion = engine.submit(sequence, params, conversation=conversation, max_unread_tokens=4).result(timeout=60)
    return [*sequence, *completion.token_ids]


def test_turns_of_a_conversation_are_those_of_whole_prompts(tiny_engine: Engine) -> None:
    rng = random.Random(5)
    warm = {i: tiny_engine.conversation() for i in range(3)}
    sequences: dict[int, list[int]] = {i: [2] for i in warm}
    for step in range(18):
        i = rng.choice(list(warm))
        if rng.random() < 0.3:  # an edit: back to an earlier position
            sequences[i] = sequences[i][: rng.randint(1, len(sequences[i]))]
        sequences[i] = [*sequences[i][-40:], *(rng.randrange(4, 300) for _ in range(rng.randint(1, 5)))]
        params = SamplingParams(max_tokens=rng.randint(1, 9), temperature=1.0, seed=step, ignore_eos=True)
        expected = turn(tiny_engine, sequences[i], params, None)
        sequences[i] = turn(tiny_engine, sequences[i], params, warm[i])
        assert sequences[i] == expected
    for conversation in warm.values():
        conversation.close()


def test_the_native_engine_starts_where_the_last_turn_ended(tmp_path: Path) -> None:
    if not NATIVE_MODULE_BUILT:
        pytest.skip("the native module is not built")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    path = tiny.TinyGguf().write(tmp_path / "tiny.gguf")
    with Engine(path, threads=1, kv_memory="4MiB", prefix_cache=False) as engine, engine.conversation() as conversation:
        sequence = [2, 30, 31]
        for _ in range(3):
            before = len(sequence)
            completion = engine.submit(sequence, params, conversation=conversation).result(timeout=60)
            expected_warm = 0 if before == 3 else before - 3
            assert completion.stats.cached_tokens == expected_warm
            sequence = [*sequence, *completion.token_ids, 32, 33]
        assert engine.stats()["conversations"] == 1
        conversation.close()
        engine.generate([2], params)  # commands are taken in order: then it is closed
        assert engine.stats()["conversations"] == 0
        steps = engine.stats()["steps"]
    assert engine.stats()["steps"] == steps  # figures can be asked for after the end
    conversation.close()


async def test_paused_requests_of_the_native_engine_go_on(tiny_engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True)
    expected = [tiny_engine.generate([2, 20 + i], replace(params, seed=i)).token_ids for i in range(3)]
    tiny_engine.deliver_on(asyncio.get_running_loop())
    generations = [tiny_engine.submit([2, 20 + i], replace(params, seed=i), max_unread_tokens=i) for i in range(3)]
    for generation, tokens in reversed(list(zip(generations, expected, strict=True))):
        read = [token async for chunk in generation for token in chunk.token_ids]
        assert tuple(read) == tokens
