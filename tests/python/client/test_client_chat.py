"""Chats of the client: what is sent of messages, thinking and tools, and what a reply is read as."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_server import ScriptedServer, last

from draftwerk_client import Appended, Chat, InvalidRequest, ToolCall
from draftwerk_client.parameters import prompt_message
from draftwerk_client.v1 import models_pb2, output_pb2, parameters_pb2

USER = {"role": "user", "content": "Weather in Oslo?"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"b": 1, "a": [2.0]}}}
REPLY = '<|channel>thought\nAsk.<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>'


def messages_of(prompt: Any) -> parameters_pb2.ChatMessages:
    return prompt_message(prompt).messages


def test_a_list_of_messages_is_a_chat_with_nothing_else() -> None:
    assert (
        messages_of([USER])
        == messages_of(Chat([USER]))
        == parameters_pb2.ChatMessages(messages=[parameters_pb2.ChatMessage(role="user", content="Weather in Oslo?")])
    )
    assert not messages_of(Chat([USER])).HasField("enable_thinking")


def test_thinking_tools_and_variables_are_sent_as_json() -> None:
    sent = messages_of(Chat([USER], tools=[WEATHER], enable_thinking=False, template_variables={"x": "y", "n": [1]}))
    assert list(sent.tools) == [
        '{"type": "function", "function": {"name": "weather", "parameters": {"b": 1, "a": [2.0]}}}'
    ]
    assert sent.HasField("enable_thinking") and not sent.enable_thinking
    assert dict(sent.template_variables) == {"x": '"y"', "n": "[1]"}


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_messages_as_openai_has_them(arguments: Any) -> None:
    sent = messages_of(
        [
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "reasoning": "Ask.",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}},
                    {"function": {"name": "time"}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"degrees": 5}},
            {"role": "user", "content": [{"type": "text", "text": "é"}]},
        ]
    )
    message, call = parameters_pb2.ChatMessage, parameters_pb2.ToolCall
    assert list(sent.messages) == [
        message(
            role="assistant",
            reasoning_content="Ask.",
            tool_calls=[
                call(id="c1", name="weather", arguments='{"city": "Oslo"}'),
                call(name="time", arguments="{}"),
            ],
        ),
        message(role="tool", tool_call_id="c1", name="weather", structured_content='{"degrees": 5}'),
        message(role="user", structured_content='[{"type": "text", "text": "\\u00e9"}]'),
    ]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (Chat("hi"), "prompt.messages.messages"),  # type: ignore[arg-type]
        (Chat([USER, "hi"]), "prompt.messages.messages[1]"),  # type: ignore[list-item]
        (Chat([USER], tools=WEATHER), "prompt.messages.tools"),  # type: ignore[arg-type]
        (Chat([USER], tools=[{"x": float("nan")}]), "prompt.messages.tools[0]"),
        (Chat([USER], tools=[{"x": object()}]), "prompt.messages.tools[0]"),
        (Chat([USER], template_variables=[1]), "prompt.messages.template_variables"),  # type: ignore[arg-type]
        (Chat([USER], template_variables={1: 1}), "prompt.messages.template_variables[1]"),  # type: ignore[dict-item]
        ([{**USER, "tool_calls": {"a": 1}}], "prompt.messages.messages[0].tool_calls"),
        ([{**USER, "tool_calls": [{"name": "f"}]}], "prompt.messages.messages[0].tool_calls[0]"),
        (
            [{**USER, "tool_calls": [{"function": {"name": "f", "arguments": {1j}}}]}],
            "prompt.messages.messages[0].tool_calls[0].function.arguments",
        ),
        ([{**USER, "name": 5}], "prompt.messages.messages[0].name"),
    ],
)
def test_what_cannot_be_sent_is_named(prompt: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_message(prompt)
    assert caught.value.violations[0].field == field


def test_a_chat_is_a_prompt_everywhere(client: Any, server: ScriptedServer) -> None:
    chat = Chat([USER], enable_thinking=True)
    client.generate(chat, special_tokens=True)
    sent = server.requests.get()
    assert sent.prompt == prompt_message(chat)
    assert sent.output == parameters_pb2.OutputOptions(special_tokens=True)
    server.unary[models_pb2.TokenizeRequest] = lambda *_: models_pb2.TokenizeResponse(token_ids=[5])
    assert client.tokenize(chat).token_ids == (5,)
    assert server.requests.get().prompt == prompt_message(chat)


def test_a_completion_is_read_as_a_reply(client: Any, server: ScriptedServer) -> None:
    server.generate = lambda *_: [last(REPLY, 9, reason=output_pb2.FINISH_REASON_STOP)]
    reply = client.generate([USER], special_tokens=True).reply()
    assert (reply.reasoning_content, reply.content) == ("Ask.", "")
    assert reply.tool_calls == (ToolCall("call_0", "weather", {"city": "Oslo"}),)
    sent = messages_of([USER, reply.message(), {"role": "tool", "tool_call_id": "call_0", "content": "rain"}])
    assert sent.messages[1] == parameters_pb2.ChatMessage(
        role="assistant",
        reasoning_content="Ask.",
        tool_calls=[parameters_pb2.ToolCall(id="call_0", name="weather", arguments='{"city": "Oslo"}')],
    )


def test_what_the_model_can_do(client: Any, server: ScriptedServer) -> None:
    server.unary[models_pb2.GetModelRequest] = lambda *_: models_pb2.GetModelResponse(
        model=models_pb2.Model(has_thinking=True)
    )
    model = client.model()
    assert (model.has_thinking, model.has_tools) == (True, False)


def test_text_with_control_tokens(client: Any, server: ScriptedServer) -> None:
    server.unary[models_pb2.DetokenizeRequest] = lambda request, _: models_pb2.DetokenizeResponse(
        text="<bos>" * request.special_tokens
    )
    assert client.detokenize([2]) == ""
    assert client.detokenize([2], special_tokens=True) == "<bos>"


def test_tokens_that_were_appended_take_the_place_of_what_was_there() -> None:
    assert Appended((7, 8), 10).position == 8
