"""Chats as prompts of the engine: thinking, tools, template variables, and the text of control tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import chat_templates
from chat_templates import CONTROLS, END_OF_TURN, EOS, GEMMA_4, TOOL_RESPONSE, WEATHER, ControlTokenizer
from draftwerk import Chat, Engine, RequestError, SamplingParams
from draftwerk.loading import ChatTemplate
from draftwerk.output_text import OutputText
from draftwerk_client import ToolCall, read_reply
from fake_checkpoint import FakeCheckpoint
from fake_core import Engine as ScriptedEngine
from fake_core import Request

QUESTION = {"role": "user", "content": "Weather in Oslo?"}


@pytest.fixture
def gemma_4(checkpoint: FakeCheckpoint) -> Iterator[Engine]:
    """An engine that chats as Gemma 4 does, over the scripted core."""
    chat_templates.chats_like_gemma_4(checkpoint)
    with Engine("gemma-4") as engine:
        yield engine


def answers(engine: Engine, text: str) -> None:
    """Makes the scripted model say this, once."""
    ids = engine.tokenize(text, add_bos=False)

    def next_token(_: Request, index: int) -> int:
        return ids[index]

    ScriptedEngine.instances[-1].next_token = next_token


def rendered(**variables: Any) -> list[int]:
    text = ChatTemplate(GEMMA_4, {"bos_token": "<bos>"}).render([QUESTION], **variables)
    return ControlTokenizer().encode(text, add_bos=False)


# --- prompts -------------------------------------------------------------------------------------------------------


def test_a_chat_is_what_the_template_writes_for_it(gemma_4: Engine) -> None:
    assert gemma_4.encode_prompt(Chat([QUESTION])) == gemma_4.encode_prompt([QUESTION]) == rendered()
    assert gemma_4.encode_prompt(Chat([QUESTION], enable_thinking=True)) == rendered(enable_thinking=True)
    assert gemma_4.encode_prompt(Chat([QUESTION], enable_thinking=False)) == rendered()
    assert gemma_4.encode_prompt(Chat([QUESTION], tools=[WEATHER])) == rendered(tools=[WEATHER])


async def test_a_chat_is_a_prompt_wherever_one_is(gemma_4: Engine) -> None:
    answers(gemma_4, "Rain.<turn|>")
    chat, asked = Chat([QUESTION], enable_thinking=True), tuple(rendered(enable_thinking=True))
    assert gemma_4.generate(chat).prompt_token_ids == asked
    assert [one.prompt_token_ids for one in gemma_4.generate([chat, Chat([QUESTION])])] == [asked, tuple(rendered())]
    assert "".join(chunk.text for chunk in gemma_4.stream(chat)) == "Rain."
    assert (await gemma_4.agenerate(chat)).prompt_token_ids == asked
    assert "".join([chunk.text async for chunk in gemma_4.astream(chat)]) == "Rain."


def test_variables_of_the_template(checkpoint: FakeCheckpoint) -> None:
    checkpoint.chat_template = ChatTemplate("{{ mood }}{{ messages[0].content }}")
    with Engine("moody") as engine:
        assert engine.detokenize(engine.encode_prompt(Chat([QUESTION], template_variables={"mood": 5}))) == (
            "5Weather in Oslo?"
        )


def test_what_a_chat_template_can_do(gemma_4: Engine, checkpoint: FakeCheckpoint) -> None:
    assert gemma_4.has_thinking and gemma_4.has_tools
    checkpoint.chat_template = ChatTemplate("{{ messages[0].content }}{{ tools }}")
    with Engine("other") as engine:
        assert (engine.has_thinking, engine.has_tools) == (False, True)
    checkpoint.chat_template = None
    with Engine("none") as engine:
        assert not engine.has_thinking and not engine.has_tools


@pytest.mark.parametrize(
    ("chat", "field", "allowed"),
    [
        (Chat([]), "prompt.messages", "at least one message"),
        (Chat("hi"), "prompt.messages", "at least one message"),  # type: ignore[arg-type]
        (Chat([QUESTION, 5]), "prompt.messages[1]", "a chat message"),  # type: ignore[list-item]
        (Chat([QUESTION], tools=[{"name": "f"}]), "prompt.tools[0]", "of the form"),
        (Chat([QUESTION], tools=[WEATHER, {"function": {"name": 5}}]), "prompt.tools[1]", "of the form"),
        (Chat([QUESTION], tools=WEATHER), "prompt.tools", "a sequence of functions"),  # type: ignore[arg-type]
        (Chat([QUESTION], enable_thinking=1), "prompt.enable_thinking", "True, False or None"),  # type: ignore[arg-type]
        (Chat([QUESTION], template_variables={"enable_thnking": 1}), "prompt.template_variables", "reads none"),
        (Chat([QUESTION], template_variables={"enable_thinking": 1}), "prompt.template_variables", "reads none"),
        (Chat([QUESTION], template_variables={"bos_token": ""}), "prompt.template_variables", "reads none"),
        (Chat([QUESTION], template_variables=[]), "prompt.template_variables", "a mapping"),  # type: ignore[arg-type]
        (Chat([{"role": "assistant", "content": 5}]), "prompt.messages", "as the chat template wants it"),
    ],
)
def test_a_chat_that_is_refused(gemma_4: Engine, chat: Chat, field: str, allowed: str) -> None:
    with pytest.raises(RequestError, match=allowed) as caught:
        gemma_4.generate(chat)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (Chat([QUESTION], tools=[WEATHER]), "prompt.tools"),
        (Chat([QUESTION], enable_thinking=True), "prompt.enable_thinking"),
        (Chat([QUESTION], template_variables={"moody": 1}), "prompt.template_variables"),
    ],
)
def test_what_the_template_would_overlook_is_refused(checkpoint: FakeCheckpoint, chat: Chat, field: str) -> None:
    checkpoint.chat_template = ChatTemplate("{{ mood }}{{ messages[0].content }}")
    with Engine("plain") as engine:
        with pytest.raises(RequestError) as caught:
            engine.encode_prompt(chat)
        assert caught.value.field == field
        assert "absent" in caught.value.allowed or caught.value.allowed == "of the chat template's own: mood"
        engine.encode_prompt(Chat([QUESTION], enable_thinking=False))  # it does not think


# --- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [EOS, END_OF_TURN, TOOL_RESPONSE])
@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_turn_ends_at_each_end_token_which_is_no_text(gemma_4: Engine, end: int, special_tokens: bool) -> None:
    answers(gemma_4, f"Rain.{CONTROLS[end]}never")
    completion = gemma_4.generate([QUESTION], SamplingParams(special_tokens=special_tokens))
    assert (completion.text, completion.finish_reason) == ("Rain.", "stop")
    assert completion.token_ids[-1] == end
    assert gemma_4.info.end_token_ids == (EOS, END_OF_TURN, TOOL_RESPONSE)


def test_thoughts_and_calls_are_in_the_text_if_wanted(gemma_4: Engine) -> None:
    said = '<|channel>thought\nAsk.<channel|>Wait.<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
    answers(gemma_4, f"{said}<|tool_response>response:made up")
    chat = Chat([QUESTION], tools=[WEATHER], enable_thinking=True)
    assert gemma_4.generate(chat).text == "thought\nAsk.Wait.call:weather{city:Oslo}"
    completion = gemma_4.generate(chat, SamplingParams(special_tokens=True))
    assert (completion.text, completion.finish_reason) == (said, "stop")
    reply = read_reply(completion.text)
    assert (reply.reasoning_content, reply.content) == ("Ask.", "Wait.")
    assert reply.tool_calls == (ToolCall("call_0", "weather", {"city": "Oslo"}),)
    # And on, as the template writes the turn so far: thoughts are in it as long as the turn is not over.
    result = {"role": "tool", "name": "weather", "content": "rain"}
    going_on = Chat([QUESTION, reply.message(), result], tools=[WEATHER], enable_thinking=True)
    assert gemma_4.detokenize(gemma_4.encode_prompt(going_on), special_tokens=True).endswith(
        "<|turn>model\n<|channel>thought\nAsk.\n<channel|>Wait."
        '<|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'
        '<|tool_response>response:weather{value:<|"|>rain<|"|>}<tool_response|>'
    )


def test_stop_strings_do_not_see_the_names_of_control_tokens(gemma_4: Engine) -> None:
    params = SamplingParams(special_tokens=True, stop=["thought", "EN", "<channel|>"])
    answers(gemma_4, "<|channel>thinking<channel|>E<|think|>ND")
    completion = gemma_4.generate([QUESTION], params)
    assert (completion.text, completion.finish_reason) == ("<|channel>thinking<channel|>", "stop")


def test_token_bytes_and_texts_with_names(gemma_4: Engine) -> None:
    ids = gemma_4.tokenize("é<turn|>x")
    assert gemma_4.token_bytes(ids) == [b"", b"\xc3", b"\xa9", b"", b"x"]
    assert gemma_4.token_bytes(ids, special_tokens=True) == [b"<bos>", b"\xc3", b"\xa9", b"<turn|>", b"x"]
    assert gemma_4.detokenize(ids) == "éx"
    assert gemma_4.detokenize(ids, special_tokens=True) == "<bos>é<turn|>x"


# --- text of control tokens as it comes ----------------------------------------------------------------------------

PIECES = st.lists(st.sampled_from(["a", "b", "ab", "é", "<turn|>", "<|think|>"]), max_size=20)


def steps_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    steps = []
    for size in sizes:
        steps.append(ids[:size])
        ids = ids[size:]
    return [*steps, ids]


@given(PIECES, st.lists(st.sampled_from([b"ab", b"ba", b"bb", "bé".encode()]), max_size=2), st.data())
def test_names_stand_where_their_tokens_do(pieces: list[str], stops: list[bytes], data: st.DataObject) -> None:
    tokenizer = ControlTokenizer()
    ids = tokenizer.encode("".join(pieces), add_bos=False)
    # As the engine does: after each token, the first place where a stop string is complete, names aside.
    plain, end, cut = b"", len(ids), -1
    for i, token in enumerate(ids):
        plain += tokenizer.token_bytes(token)
        found = [place for stop in stops if (place := plain.find(stop)) >= 0]
        if found:
            end, cut = i + 1, min(found)
            break
    *steps, last = steps_of(ids[:end], data.draw(st.lists(st.integers(1, 4), max_size=20)))
    while not last and steps:
        last = steps.pop()
    output = OutputText(tokenizer, stops, special_tokens=True)
    streamed = "".join([output.push(step) for step in steps]) + output.finish(last, cut)
    # Up to the cut, with the names that come before what is cut.
    expected, length = b"", 0
    for token in ids[:end]:
        piece = tokenizer.token_bytes(token)
        if cut >= 0 and length + len(piece) > cut:
            break
        expected += piece or tokenizer.piece_of(token).encode()
        length += len(piece)
    assert streamed == expected.decode()


def test_a_control_token_within_a_character() -> None:
    tokenizer = ControlTokenizer()
    first, second = tokenizer.encode("é", add_bos=False)
    output = OutputText(tokenizer, special_tokens=True)
    assert output.push([first]) == ""
    assert output.push([END_OF_TURN]) == "\N{REPLACEMENT CHARACTER}<turn|>"
    assert output.finish([second]) == "\N{REPLACEMENT CHARACTER}"
