"""Chats in a session: after every append a branch is what one request with the whole chat is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from session_client import FORK, LENGTH, STOP, Request, SessionClient, at_most, code_of, detail_of, text_of

import chat_templates
import draftwerk
from chat_templates import WEATHER, ControlTokenizer
from draftwerk import Engine
from draftwerk.loading import ChatTemplate
from draftwerk.server import chat_history
from draftwerk_client import Chat
from draftwerk_client.parameters import prompt_message
from draftwerk_client.v1 import output_pb2, parameters_pb2
from draftwerk_client.v1 import session_pb2 as pb
from fake_checkpoint import FakeCheckpoint
from fake_core import Engine as ScriptedEngine
from fake_core import Request as CoreRequest

FIRST, SECOND = {"role": "user", "content": "Weather in Oslo?"}, {"role": "user", "content": "And in Rome?"}
CALL = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call_0", "content": "rain"}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    ],
}


@pytest.fixture
def engine(checkpoint: FakeCheckpoint) -> Iterator[Engine]:
    """An engine that chats as Gemma 4 does, over the scripted core."""
    chat_templates.chats_like_gemma_4(checkpoint)
    with Engine("gemma-4") as opened:
        yield opened


def says(core: ScriptedEngine, *texts: str) -> None:
    """Makes the scripted model give these answers, one for each request from now on."""
    answers = [ControlTokenizer().encode(text, add_bos=False) for text in texts]
    given: dict[int, list[int]] = {}

    def next_token(request: CoreRequest, index: int) -> int:
        answer = given.get(id(request))
        if answer is None:
            answer = given[id(request)] = answers.pop(0)
        return answer[index]

    core.next_token = next_token


class Chatting:
    """A branch that is chatted in, with what it must have."""

    def __init__(self, session: SessionClient, engine: Engine, branch: int = 0) -> None:
        self.session = session
        self.engine = engine
        self.branch = branch
        self.tokens: list[int] = []

    async def append(self, prompt: Any) -> pb.SessionResponse.Appended:
        response = await self.session.answer(self.branch, append=Request.Append(content=prompt_message(prompt)))
        assert response.HasField("appended"), response
        appended = response.appended
        del self.tokens[appended.length - len(appended.token_ids) :]
        self.tokens += appended.token_ids
        assert len(self.tokens) == appended.length
        return appended

    async def generate(self, **fields: Any) -> list[output_pb2.GenerateResponse]:
        output = parameters_pb2.OutputOptions(special_tokens=True)
        messages = await self.session.generate(self.branch, **{"output": output, **fields})
        assert messages[0].position == len(self.tokens)
        self.tokens += [token for message in messages for token in message.token_ids]
        return messages

    def is_the_chat(self, *messages: Any, **fields: Any) -> bool:
        """Whether the branch has the tokens that one request with these messages has."""
        expected = self.engine.encode_prompt(draftwerk.Chat(messages, **fields))
        assert self.text() == self.engine.detokenize(expected, special_tokens=True)
        return self.tokens == expected

    def text(self) -> str:
        return self.engine.detokenize(self.tokens, special_tokens=True)


@pytest.fixture
async def chat(session: SessionClient, engine: Engine) -> Chatting:
    return Chatting(session, engine)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def test_turn_by_turn_the_branch_is_the_whole_chat(chat: Chatting, scripted: ScriptedEngine) -> None:
    says(scripted, "Rain.<turn|>", "Sun.<turn|>")
    await chat.append([FIRST])
    assert chat.is_the_chat(FIRST)
    assert text_of(await chat.generate()) == "Rain."
    await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND)
    assert text_of(await chat.generate()) == "Sun."
    await chat.append([FIRST])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND, answer("Sun."), FIRST)


async def test_what_the_template_drops_is_dropped_and_what_stands_before_it_stays(
    chat: Chatting, scripted: ScriptedEngine
) -> None:
    """The prompt of each request is that of the chat, and begins with what was there as far as both agree."""
    says(scripted, "<|channel>thought\nHm.\n<channel|>Rain.<turn|>", "Sun.<turn|>")
    appended = await chat.append(Chat([FIRST], enable_thinking=True))
    await chat.generate()
    before = list(chat.tokens)
    appended = await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND, enable_thinking=True)
    kept = appended.length - len(appended.token_ids)
    assert chat.engine.detokenize(before[:kept], special_tokens=True).endswith("<|turn>model\n")
    assert chat.tokens[:kept] == before[:kept] and chat.tokens[kept] != before[kept]
    await chat.generate()
    assert scripted.requests[-1].prompt == chat.tokens[: appended.length]


async def test_an_opening_that_only_the_last_answer_has(chat: Chatting, scripted: ScriptedEngine) -> None:
    """Without thinking the prompt ends with an empty thought, which the turn loses once it is an earlier one."""
    says(scripted, "Rain.<turn|>")
    await chat.append([FIRST])
    assert chat.text().endswith("<|turn>model\n<|channel>thought\n<channel|>")
    await chat.generate()
    await chat.append([SECOND])
    assert "<|turn>model\nRain.<turn|>\n<|turn>user\nAnd in Rome?" in chat.text()
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND)


async def test_a_function_is_called_and_its_result_goes_into_the_turn(chat: Chatting, scripted: ScriptedEngine) -> None:
    thought = "<|channel>thought\nAsk.\n<channel|>"
    says(scripted, f"{thought}{CALL}<|tool_response>", "Rain.<turn|>", "Sun.<turn|>")
    options = {"tools": [WEATHER], "enable_thinking": True}
    await chat.append(Chat([FIRST], **options))
    called = await chat.generate()
    assert (text_of(called), called[-1].finish_reason) == (f"{thought}{CALL}", STOP)
    before = list(chat.tokens)
    appended = await chat.append([RESULT])
    calling = {**CALLING, "reasoning_content": "Ask."}
    assert chat.is_the_chat(FIRST, calling, RESULT, **options)
    # The turn goes on, so its thoughts stay; all that was generated is as the template writes it.
    assert list(appended.token_ids) == chat.tokens[len(before) :]
    assert text_of(await chat.generate()) == "Rain."
    await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, calling, RESULT, answer("Rain."), SECOND, **options)
    assert "Ask." not in chat.text()


async def test_thinking_and_tools_hold_until_others_are_given(chat: Chatting, scripted: ScriptedEngine) -> None:
    says(scripted, "A<turn|>", "B<turn|>", "C<turn|>")
    said: list[Any] = [FIRST]
    await chat.append(Chat([FIRST], tools=[WEATHER], enable_thinking=True))
    for text, fields, expected in (
        ("A", {}, {"tools": [WEATHER], "enable_thinking": True}),
        ("B", {"enable_thinking": False}, {"tools": [WEATHER], "enable_thinking": False}),
        ("C", {"tools": [{"function": {"name": "f"}}]}, {"tools": [{"function": {"name": "f"}}]}),
    ):
        await chat.generate()
        await chat.append(Chat([SECOND], **fields))
        said += [answer(text), SECOND]
        assert chat.is_the_chat(*said, **expected)


async def test_an_answer_that_was_cut_off_is_what_there_is_of_it(chat: Chatting, scripted: ScriptedEngine) -> None:
    says(scripted, "<|channel>thought\nHm.<channel|>Rain", "<|channel>thought\nLong thou")
    await chat.append(Chat([FIRST], enable_thinking=True))
    assert (await chat.generate(stop=at_most(14)))[-1].finish_reason == LENGTH
    assert chat.text().endswith("Hm.<channel|>R")
    await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, answer("R"), SECOND, enable_thinking=True)
    assert (await chat.generate(stop=at_most(15)))[-1].finish_reason == LENGTH
    await chat.append([FIRST])
    assert chat.is_the_chat(FIRST, answer("R"), SECOND, answer(""), FIRST, enable_thinking=True)


async def test_an_answer_may_be_begun_for_the_model_and_go_on_in_pieces(
    chat: Chatting, scripted: ScriptedEngine
) -> None:
    says(scripted, "ai", "n.<turn|>")
    await chat.append([FIRST])
    await chat.append("R")
    await chat.generate(stop=at_most(2))
    await chat.generate()
    await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND)


async def test_messages_may_come_one_by_one(chat: Chatting) -> None:
    system = {"role": "system", "content": "Be brief."}
    for messages in ([system], [FIRST], [answer("Rain."), SECOND]):
        await chat.append(messages)
    assert chat.is_the_chat(system, FIRST, answer("Rain."), SECOND)


async def test_a_turn_that_the_prompt_opened_with_thoughts(chat: Chatting, scripted: ScriptedEngine) -> None:
    opening = "{%- if add_generation_prompt and enable_thinking -%}{{ '<|channel>thought\\n' }}{%- endif -%}"
    chat.engine._chat_template = ChatTemplate(chat_templates.GEMMA_4 + opening, {"bos_token": "<bos>"})
    says(scripted, "Hm.<channel|>Rain.<turn|>", "cut")
    await chat.append(Chat([FIRST], enable_thinking=True))
    await chat.generate()
    await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND, enable_thinking=True)
    await chat.generate(stop=at_most(3))
    await chat.append([FIRST])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND, answer(""), FIRST, enable_thinking=True)


HALF = len(chat_templates.CONTROLS) + 0xC3  # of a character
REPLACED = "\N{REPLACEMENT CHARACTER}"


async def test_tokens_stay_as_the_model_chose_them_while_their_text_is_the_templates(
    chat: Chatting, scripted: ScriptedEngine
) -> None:
    scripted.next_token = lambda _request, index: (HALF, chat_templates.END_OF_TURN)[index]
    await chat.append(Chat([FIRST], enable_thinking=True))
    assert text_of(await chat.generate()) == REPLACED
    before = list(chat.tokens)
    appended = await chat.append([SECOND])
    assert appended.length - len(appended.token_ids) == len(before)
    assert not chat.is_the_chat(FIRST, answer(REPLACED), SECOND, enable_thinking=True), "the same text in other tokens"


async def test_where_the_template_rewrites_all_tokens_are_those_of_the_tokenizer(
    chat: Chatting, scripted: ScriptedEngine
) -> None:
    answers = [[HALF, chat_templates.END_OF_TURN], ControlTokenizer().encode("<|channel>Hm.<channel|>Sun.<turn|>")[1:]]
    scripted.next_token = lambda request, index: answers[len(scripted.requests) - 1][index]
    await chat.append(Chat([FIRST], enable_thinking=True))
    await chat.generate()
    await chat.append([SECOND])
    await chat.generate()
    await chat.append([FIRST])
    assert chat.is_the_chat(FIRST, answer(REPLACED), SECOND, answer("Sun."), FIRST, enable_thinking=True)


async def test_another_end_token_than_the_templates_is_taken_off(chat: Chatting, scripted: ScriptedEngine) -> None:
    scripted.next_token = lambda _request, index: (HALF, chat_templates.EOS)[index]
    await chat.append(Chat([FIRST], enable_thinking=True))
    await chat.generate()
    ended = len(chat.tokens)
    appended = await chat.append([SECOND])
    assert appended.length - len(appended.token_ids) == ended - 1
    assert f"<|turn>model\n{REPLACED}<turn|>\n<|turn>user\n" in chat.text()


# --- forks ---------------------------------------------------------------------------------------------------------


async def fork(chat: Chatting, position: int | None = None) -> Chatting:
    action = FORK if position is None else Request.Fork(position=position)
    forked = (await chat.session.answer(chat.branch, fork=action)).forked
    copy = Chatting(chat.session, chat.engine, forked.branch)
    copy.tokens = chat.tokens[: forked.length]
    return copy


async def test_a_fork_goes_on_with_the_chat_by_itself(chat: Chatting, scripted: ScriptedEngine) -> None:
    says(scripted, "<|channel>thought\nHm.<channel|>Rain.<turn|>", "A<turn|>", "B<turn|>")
    await chat.append(Chat([FIRST], enable_thinking=True))
    await chat.generate()
    copy = await fork(chat)
    await chat.append([SECOND])
    await copy.append([FIRST])
    for branch, text in ((chat, "A"), (copy, "B")):
        await branch.generate()
        await branch.append([SECOND])
        asked = SECOND if branch is chat else FIRST
        assert branch.is_the_chat(FIRST, answer("Rain."), asked, answer(text), SECOND, enable_thinking=True)


async def test_a_fork_at_an_earlier_turn_is_the_chat_up_to_there(chat: Chatting, scripted: ScriptedEngine) -> None:
    says(scripted, "Rain.<turn|>", "Sun.<turn|>", "Other.<turn|>")
    await chat.append(Chat([FIRST], enable_thinking=True))
    asked = len(chat.tokens)
    await chat.generate()
    answered = len(chat.tokens)
    await chat.append([SECOND])
    await chat.generate()
    again, replied, empty = await fork(chat, asked), await fork(chat, answered), await fork(chat, 0)
    await again.generate()
    await again.append([SECOND])
    assert again.is_the_chat(FIRST, answer("Other."), SECOND, enable_thinking=True)
    await replied.append([FIRST])
    assert replied.is_the_chat(FIRST, answer("Rain."), FIRST, enable_thinking=True)
    await empty.append([SECOND])
    assert empty.is_the_chat(SECOND)


async def test_a_fork_within_the_first_message_is_no_chat(chat: Chatting) -> None:
    await chat.append(Chat([FIRST], enable_thinking=True))
    cut = await fork(chat, 5)
    response = await chat.session.answer(cut.branch, append=Request.Append(content=prompt_message([SECOND])))
    # What follows text is written behind it, as behind an answer.
    assert chat.engine.detokenize(response.appended.token_ids, special_tokens=True).startswith("<turn|>\n<|turn>user\n")


# --- refusals ------------------------------------------------------------------------------------------------------


async def test_what_is_refused_changes_nothing(chat: Chatting, scripted: ScriptedEngine) -> None:
    says(scripted, "Rain.<turn|>")
    await chat.append([FIRST])
    await chat.generate()
    for prompt, field in (
        (Chat([SECOND], template_variables={"x": 1}), "content.messages.template_variables"),
        (Chat([SECOND], tools=[{"name": "f"}]), "content.messages.tools[0]"),
        ([{"role": "assistant", "content": [5]}], "content.messages"),
        ([{"role": "user", "content": "x" * 5000}], "content"),
    ):
        response = await chat.session.answer(append=Request.Append(content=prompt_message(prompt)))  # type: ignore[arg-type]
        assert code_of(response) is grpc.StatusCode.INVALID_ARGUMENT
        violations = detail_of(response, error_details_pb2.BadRequest()).field_violations
        assert violations[0].field == field
    await chat.append([SECOND])
    assert chat.is_the_chat(FIRST, answer("Rain."), SECOND)


async def test_a_message_that_is_no_unicode_text_names_its_field(chat: Chatting) -> None:
    content = parameters_pb2.Prompt()
    content.messages.messages.add(role="user", structured_content='"\\ud800"')
    response = await chat.session.answer(append=Request.Append(content=content))
    assert code_of(response) is grpc.StatusCode.INVALID_ARGUMENT
    violation = detail_of(response, error_details_pb2.BadRequest()).field_violations[0]
    assert violation.field == "content.messages"
    assert "valid Unicode text" in violation.description


async def test_a_chat_does_not_grow_without_end(
    chat: Chatting, scripted: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template may leave out most of what it is given: thoughts, say."""
    monkeypatch.setattr(chat_history, "MAX_CHAT_BYTES", 10_000)
    thoughtful = {"role": "assistant", "content": "Hm.", "reasoning_content": "x" * 2000}
    refused = 0
    for _ in range(8):
        content = prompt_message([FIRST, thoughtful])
        response = await chat.session.answer(append=Request.Append(content=content))
        refused += response.HasField("error")
    assert refused == 4
    monkeypatch.setattr(chat_history, "MAX_CHAT_MESSAGES", 9)
    assert (await chat.session.answer(append=Request.Append(content=prompt_message([FIRST])))).HasField("appended")
    assert (await chat.session.answer(append=Request.Append(content=prompt_message([FIRST])))).HasField("error")
