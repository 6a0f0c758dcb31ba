"""Generation.Session over a real port and a scripted core: what each action does, and in which order answers come."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from session_client import (
    CANCELLED,
    CLOSE,
    FORK,
    INTERRUPT,
    LENGTH,
    STOP,
    TIMEOUT,
    Request,
    SessionClient,
    append,
    at_most,
    code_of,
    detail_of,
    eventually,
    hold_after,
    ids_prompt,
    inject,
    start_and_hold,
    text_of,
    tokens_of,
)

from draftwerk import Engine
from draftwerk.server.metrics import Metrics
from draftwerk.server.session import MAX_BRANCHES, Session
from draftwerk_client.v1 import generation_pb2, generation_pb2_grpc, output_pb2, parameters_pb2
from draftwerk_client.v1 import session_pb2 as pb
from fake_checkpoint import BOS
from fake_core import Engine as ScriptedEngine
from fake_core import QueueFull as CoreQueueFull
from fake_core import repeat_prompt

INVALID_ARGUMENT, FAILED_PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


# --- turns -----------------------------------------------------------------------------------------------------


async def test_open_tells_the_id_of_the_call(scripted_channel: grpc.aio.Channel) -> None:
    client = SessionClient(scripted_channel, metadata=(("x-request-id", "my-session"),))
    assert (await client.open()).opened.request_id == "my-session"
    assert await client.end() is grpc.StatusCode.OK


async def test_turns_continue_the_branch_and_compute_only_what_is_new(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    answer = await session.append(10, 11, 12)
    assert (list(answer.appended.token_ids), answer.appended.length) == ([10, 11, 12], 3)
    first = await session.generate(stop=at_most(5))
    assert tokens_of(first) == [10, 11, 12, 10, 11]
    assert [message.position for message in first] == [3, 5, 7]
    assert first[-1].finish_reason == LENGTH
    assert first[-1].statistics.cached_tokens == 0
    assert (await session.append(20, 21)).appended.length == 10
    second = await session.generate(stop=at_most(1))
    assert scripted.requests[-1].prompt == [10, 11, 12, 10, 11, 12, 10, 11, 20, 21]
    assert second[-1].statistics.prompt_tokens == 10
    assert second[-1].statistics.cached_tokens == 7  # all but the last one generated, and the two new ones
    assert second[-1].position == 10


async def test_a_client_may_append_as_soon_as_it_has_the_last_message(session: SessionClient) -> None:
    await session.append(10)
    for turn in range(100):
        await session.generate(stop=at_most(1 + turn % 3))
        assert (await session.append(11)).HasField("appended")


class QuickClient:
    """A context whose client has each message at once, long before the write of it returns."""

    def __init__(self) -> None:
        self.actions: asyncio.Queue[Any] = asyncio.Queue()
        self.messages: asyncio.Queue[pb.SessionResponse] = asyncio.Queue()
        self.may_return = asyncio.Event()

    async def read(self) -> Any:
        return await self.actions.get()

    async def write(self, message: pb.SessionResponse) -> None:
        self.messages.put_nowait(message)
        if message.generated.finish_reason:
            await self.may_return.wait()


async def test_a_branch_is_idle_before_the_write_of_its_last_message_returns(engine: Engine) -> None:
    client: Any = QuickClient()
    call: Any = SimpleNamespace(request_id="id", note=lambda **_: None)
    session = asyncio.create_task(
        Session(engine, Metrics(engine), "fake-model", 256, asyncio.Event(), call, client).run()
    )
    client.actions.put_nowait(Request(request_number=1, open={}))
    client.actions.put_nowait(Request(request_number=2, append=append([10])))
    client.actions.put_nowait(Request(request_number=3, generate=Request.Generate(stop=at_most(1))))
    messages = [await asyncio.wait_for(client.messages.get(), TIMEOUT) for _ in range(3)]
    assert messages[-1].generated.finish_reason == LENGTH
    client.actions.put_nowait(Request(request_number=4, append=append([11])))
    await eventually(client.actions.empty)
    client.may_return.set()
    assert (await asyncio.wait_for(client.messages.get(), TIMEOUT)).appended.length == 3
    client.actions.put_nowait(grpc.aio.EOF)
    await asyncio.wait_for(session, TIMEOUT)


async def test_actions_may_be_sent_ahead(session: SessionClient) -> None:
    await session.act(append=append([10, 11]))
    await session.act(append=append([12]))
    await session.act(generate=Request.Generate(stop=at_most(2)))
    assert [(await session.next()).appended.length for _ in range(2)] == [2, 3]
    assert tokens_of(await session.generated()) == [10, 11]


async def test_text_gets_bos_only_at_the_start_of_the_branch(session: SessionClient) -> None:
    assert list((await session.answer(append=append("a"))).appended.token_ids) == [BOS, 101]
    assert list((await session.answer(append=append("b"))).appended.token_ids) == [102]
    assert list((await session.answer(append=append(""))).appended.token_ids) == []


async def test_chat_messages_follow_what_is_there(
    session: SessionClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[int], Any]] = []

    def continue_chat(token_ids: Any, messages: Any) -> list[int]:
        asked.append((list(token_ids), messages))
        return [30, 31]

    monkeypatch.setattr(engine, "continue_chat", continue_chat)
    await session.append(10, 11)
    messages = [parameters_pb2.ChatMessage(role="user", content="hi")]
    content = parameters_pb2.Prompt(messages=parameters_pb2.ChatMessages(messages=messages))
    answer = await session.answer(append=Request.Append(content=content))
    assert (list(answer.appended.token_ids), answer.appended.length) == ([30, 31], 4)
    assert asked == [([10, 11], [{"role": "user", "content": "hi"}])]


async def test_a_generation_brings_its_own_parameters_or_has_those_of_open(
    scripted_channel: grpc.aio.Channel, scripted: ScriptedEngine
) -> None:
    client = SessionClient(scripted_channel)
    await client.open(
        sampling=parameters_pb2.SamplingParameters(temperature=0.5, seed=7),
        stop=at_most(3),
        drafting=parameters_pb2.DraftingOptions(enabled=False),
        output=parameters_pb2.OutputOptions(logprobs=1, token_bytes=True),
        cache_salt="tenant",
    )
    await client.append(101, 102)
    messages = await client.generate()
    assert [list(message.token_bytes) for message in messages] == [[b"a"], [b"b"], [b"a"]]
    assert [len(message.logprobs) for message in messages] == [1, 1, 1]
    by_open = scripted.requests[-1]
    assert (by_open.temperature, by_open.seed, by_open.max_tokens, by_open.drafting) == (0.5, 7, 3, False)
    messages = await client.generate(
        sampling=parameters_pb2.SamplingParameters(top_k=2), output=parameters_pb2.OutputOptions()
    )
    own = scripted.requests[-1]
    # Each group replaces that of `open` as a whole.
    assert (own.temperature, own.seed, own.top_k, own.max_tokens, own.drafting) == (0.0, 0, 2, 3, False)
    assert not any(message.token_bytes or message.logprobs for message in messages)
    assert {request.salt for request in scripted.requests} == {"tenant"}
    client.call.cancel()


async def test_the_fingerprint_is_that_of_a_one_shot_generation(
    session: SessionClient, scripted_channel: grpc.aio.Channel
) -> None:
    await session.append(10, 11)
    turn = await session.generate(stop=at_most(4))
    call = generation_pb2_grpc.GenerationStub(scripted_channel).Generate(
        generation_pb2.GenerateRequest(prompt=ids_prompt([10, 11]), stop=at_most(4)), timeout=TIMEOUT
    )
    one_shot = [response async for response in call]
    assert {message.fingerprint for message in turn} == {message.fingerprint for message in one_shot}
    again = await session.generate(stop=at_most(4))
    assert again[0].fingerprint != turn[0].fingerprint


async def test_a_stop_token_is_part_of_the_branch(session: SessionClient) -> None:
    await session.append(10, 11, 12)
    messages = await session.generate(stop=parameters_pb2.StopConditions(token_ids=[11]))
    assert (tokens_of(messages), messages[-1].finish_reason) == ([10, 11], STOP)
    assert (await session.append(13)).appended.length == 6


async def test_all_tokens_before_a_stop_string_are_part_of_the_branch(session: SessionClient) -> None:
    await session.answer(append=append("abc"))
    messages = await session.generate(stop=parameters_pb2.StopConditions(strings=["b"]))
    assert (tokens_of(messages), text_of(messages)) == ([BOS, 101, 102], "a")
    assert (await session.append()).appended.length == 7


# --- interrupt -------------------------------------------------------------------------------------------------


async def test_interrupt_ends_the_generation_and_keeps_what_was_sent(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    tokens = await start_and_hold(session, scripted, after=4)
    number = await session.act(interrupt=INTERRUPT)
    last = await session.generated()
    assert last[-1].finish_reason == CANCELLED
    assert last[-1].statistics.generated_tokens == 4
    response = await session.next()
    assert (response.request_number, response.interrupted.length) == (number, 7)
    scripted.gate.set()
    await session.append(20)
    await session.generate(stop=at_most(1))
    assert scripted.requests[-1].prompt == [10, 11, 12, *tokens, 20]


async def test_actions_sent_right_after_an_interrupt_find_the_branch_idle(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await start_and_hold(session, scripted, after=2)
    await session.act(interrupt=INTERRUPT)
    await session.act(append=append([20]))
    await session.generated()
    assert (await session.next()).interrupted.length == 5
    assert (await session.next()).appended.length == 6


async def test_interrupt_of_a_free_running_generation_accounts_for_every_token(session: SessionClient) -> None:
    length = (await session.append(10, 11, 12)).appended.length
    for _ in range(20):
        await session.act(generate=Request.Generate(stop=at_most(150)))
        received = len((await session.next()).generated.token_ids)
        await session.act(interrupt=INTERRUPT)
        messages = await session.generated()
        received += len(tokens_of(messages))
        assert messages[-1].finish_reason in (CANCELLED, LENGTH)
        length += received
        response = await session.next()
        if response.HasField("interrupted"):
            assert response.interrupted.length == length
        else:  # it was over before
            assert messages[-1].finish_reason == LENGTH
            assert code_of(response) is FAILED_PRECONDITION
    assert (await session.append()).appended.length == length


# --- inject ----------------------------------------------------------------------------------------------------


async def test_inject_goes_on_after_the_injected_tokens_with_what_is_left(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    stop = parameters_pb2.StopConditions(max_tokens=7, min_tokens=5)
    tokens = await start_and_hold(session, scripted, after=4, stop=stop)
    generate_number = session.last_request_number
    number = await session.act(inject=inject([30, 31]))
    response = await session.next()
    assert (response.request_number, list(response.injected.token_ids), response.injected.position) == (
        number,
        [30, 31],
        7,
    )
    scripted.next_token = repeat_prompt
    scripted.gate.set()
    rest = []
    while not rest or not rest[-1].generated.finish_reason:
        rest.append(await session.next())
    assert {response.request_number for response in rest} == {generate_number}
    messages = [response.generated for response in rest]
    assert (messages[0].position, tokens_of(messages)) == (9, [10, 11, 12])
    assert messages[-1].finish_reason == LENGTH
    first, second = scripted.requests[-2:]
    assert second.prompt == [10, 11, 12, *tokens, 30, 31]
    assert (second.max_tokens, second.min_tokens) == (3, 1)
    assert first.conversation == second.conversation
    statistics = messages[-1].statistics
    assert (statistics.prompt_tokens, statistics.cached_tokens) == (3, 0)
    assert (statistics.generated_tokens, statistics.steps) == (7, 4)
    assert list(statistics.drafts.drafted_by_position) == [7]
    assert (await session.append()).appended.length == 12


async def test_injected_text_is_no_beginning_of_a_sequence(session: SessionClient, scripted: ScriptedEngine) -> None:
    await start_and_hold(session, scripted, after=2)
    await session.act(inject=inject("ab"))
    assert list((await session.next()).injected.token_ids) == [101, 102]


async def test_text_that_was_held_back_comes_before_the_injection(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await session.answer(append=append([101, 102]))
    hold_after(scripted, 2)
    await session.act(generate=Request.Generate(stop=parameters_pb2.StopConditions(strings=["bX"], max_tokens=4)))
    assert (await session.next()).generated.text == "a"  # b may be the start of bX
    await session.act(inject=inject("."))
    held = (await session.next()).generated
    assert (held.text, list(held.token_ids), held.finish_reason) == ("b", [], 0)
    assert (await session.next()).HasField("injected")
    scripted.next_token = repeat_prompt
    scripted.gate.set()
    assert text_of(await session.generated()) == "ab"


async def test_several_injections_then_an_interrupt(session: SessionClient, scripted: ScriptedEngine) -> None:
    tokens = await start_and_hold(session, scripted, after=2)
    for token_id in (30, 31, 32):
        await session.act(inject=inject([token_id]))
        assert list((await session.next()).injected.token_ids) == [token_id]
    await session.act(interrupt=INTERRUPT)
    last = await session.generated()
    assert (last[-1].finish_reason, last[-1].statistics.generated_tokens) == (CANCELLED, 2)
    assert (await session.next()).interrupted.length == 8
    assert scripted.requests[-1].prompt == [10, 11, 12, *tokens, 30, 31, 32]


async def test_inject_after_the_end_changes_nothing(session: SessionClient) -> None:
    await session.append(10)
    await session.generate(stop=at_most(2))
    response = await session.answer(inject=inject([30]))
    assert code_of(response) is FAILED_PRECONDITION
    assert (await session.append()).appended.length == 3


async def test_an_injection_without_room_changes_nothing_and_the_generation_goes_on(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await start_and_hold(session, scripted, after=4, stop=at_most(6))
    response = await session.answer(inject=inject([30] * 4089))
    assert code_of(response) is INVALID_ARGUMENT
    assert detail_of(response, error_details_pb2.BadRequest()).field_violations[0].field == "content"
    scripted.gate.set()
    assert len(tokens_of(await session.generated())) == 2
    assert (await session.append()).appended.length == 9


async def test_a_generation_goes_on_after_an_injection_though_the_queue_is_full(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await start_and_hold(session, scripted, after=2, stop=at_most(4))
    scripted.refuse_with = CoreQueueFull("full")
    assert (await session.answer(inject=inject([30]))).HasField("injected")
    scripted.gate.set()
    assert len(tokens_of(await session.generated())) == 2
    assert scripted.requests[-1].continues


async def test_a_generation_that_cannot_go_on_after_an_injection_ends_with_an_error(
    session: SessionClient, scripted: ScriptedEngine, figures: dict[str, Any]
) -> None:
    await start_and_hold(session, scripted, after=2)
    generate_number = session.last_request_number
    scripted.device_failure = "out of smoke"
    await session.act(inject=inject([30]))
    assert (await session.next()).HasField("injected")
    response = await session.next()
    assert (response.request_number, code_of(response)) == (generate_number, grpc.StatusCode.UNAVAILABLE)
    assert (await session.append()).appended.length == 6


# --- fork and close --------------------------------------------------------------------------------------------


async def test_a_fork_is_a_copy_that_goes_its_own_way(session: SessionClient, scripted: ScriptedEngine) -> None:
    await session.append(10, 11, 12)
    response = await session.answer(fork=FORK)
    assert (response.branch, response.forked.branch, response.forked.length) == (0, 1, 3)
    await session.append(20, branch=1)
    await session.generate(1, stop=at_most(1))
    assert scripted.requests[-1].prompt == [10, 11, 12, 20]
    await session.generate(0, stop=at_most(1))
    assert scripted.requests[-1].prompt == [10, 11, 12]
    assert scripted.requests[-1].conversation != scripted.requests[-2].conversation


@pytest.mark.parametrize("position", [0, 2, 3])
async def test_a_fork_at_a_position(session: SessionClient, position: int) -> None:
    await session.append(10, 11, 12)
    assert (await session.answer(fork=Request.Fork(position=position))).forked.length == position
    assert (await session.append(branch=1)).appended.length == position


@pytest.mark.parametrize("position", [-1, 4, 2**40])
async def test_a_fork_outside_the_branch(session: SessionClient, position: int) -> None:
    await session.append(10, 11, 12)
    response = await session.answer(fork=Request.Fork(position=position))
    assert code_of(response) is INVALID_ARGUMENT
    assert detail_of(response, error_details_pb2.BadRequest()).field_violations[0].field == "position"


async def test_a_fork_of_a_running_generation_has_what_was_sent(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    tokens = await start_and_hold(session, scripted, after=4)
    assert (await session.answer(fork=FORK)).forked.length == 7
    scripted.gate.set()
    await session.act(1, generate=Request.Generate(stop=at_most(1)))
    await eventually(lambda: len(scripted.requests) == 2)
    assert scripted.requests[-1].prompt == [10, 11, 12, *tokens]


async def test_a_fork_of_a_free_running_generation_has_all_tokens_before_the_answer(session: SessionClient) -> None:
    await session.append(10, 11, 12)
    for _ in range(20):
        length = (await session.append()).appended.length
        await session.act(generate=Request.Generate(stop=at_most(120)))
        length += len((await session.next()).generated.token_ids)
        await session.act(fork=FORK)
        ended = False
        while (response := await session.next()).HasField("generated"):
            length += len(response.generated.token_ids)
            ended = response.generated.finish_reason != 0
        assert response.forked.length == length
        await session.act(response.forked.branch, close=CLOSE)
        closed = False
        while not (closed and ended):
            response = await session.next()
            closed = closed or response.HasField("closed")
            ended = ended or response.generated.finish_reason != 0


async def test_branches_generate_at_the_same_time(session: SessionClient, scripted: ScriptedEngine) -> None:
    await session.append(10, 11, 12)
    await session.answer(fork=FORK)
    await session.append(13, branch=1)
    hold_after(scripted, 2)
    numbers = [await session.act(branch, generate=Request.Generate(stop=at_most(4))) for branch in (0, 1)]
    await eventually(lambda: len(scripted.requests) == 2)
    scripted.gate.set()
    messages: dict[tuple[int, int], list[output_pb2.GenerateResponse]] = {(numbers[0], 0): [], (numbers[1], 1): []}
    scripted.next_token = repeat_prompt
    scripted.gate.set()
    while not all(of and of[-1].finish_reason for of in messages.values()):
        response = await session.next()
        messages[response.request_number, response.branch].append(response.generated)
    assert [tokens_of(of) for of in messages.values()] == [[10, 11, 12, 10], [10, 11, 12, 13]]


async def test_close_ends_what_runs_and_frees_the_conversation(
    session: SessionClient, scripted: ScriptedEngine
) -> None:
    await start_and_hold(session, scripted, after=2)
    assert len(scripted.conversations) == 1
    number = await session.act(close=CLOSE)
    assert (await session.generated())[-1].finish_reason == CANCELLED
    response = await session.next()
    assert (response.request_number, response.HasField("closed")) == (number, True)
    assert not scripted.conversations
    assert code_of(await session.answer(append=append([1]))) is FAILED_PRECONDITION


async def test_a_closed_branch_leaves_the_others(session: SessionClient) -> None:
    await session.append(10)
    await session.answer(fork=FORK)
    await session.answer(close=CLOSE)
    assert tokens_of(await session.generate(1, stop=at_most(2))) == [10, 10]


async def test_the_number_of_branches_is_bounded(session: SessionClient) -> None:
    for number in range(1, MAX_BRANCHES):
        assert (await session.answer(fork=FORK)).forked.branch == number
    response = await session.answer(fork=FORK)
    assert code_of(response) is FAILED_PRECONDITION
    assert f"{MAX_BRANCHES} branches" in response.error.message
    await session.answer(5, close=CLOSE)
    assert (await session.answer(fork=FORK)).forked.branch == MAX_BRANCHES
