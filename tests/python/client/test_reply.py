"""What a model says in its parts: thoughts, calls of functions, the answer; whole and piece by piece."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftwerk_client import Reply, ReplyPart, ReplyReader, ToolCall, read_reply, reply_opening

MARKERS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|turn>"]


def call(arguments: str, name: str = "f") -> str:
    return f"<|tool_call>call:{name}{arguments}<tool_call|>"


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("plain <b>text</b>\n", "plain <b>text</b>\n", ""),
        ("", "", ""),
        ("<|channel>thought\nSo.\n<channel|>Yes.", "Yes.", "So."),
        ("<|channel>thought\n<channel|>Yes.", "Yes.", ""),
        ("<|channel>thought<channel|>Yes.", "Yes.", ""),
        ("<|channel>thoughtless\n<channel|>Yes.", "Yes.", "less"),
        ("<|channel>other\nSo.<channel|>Yes.", "Yes.", "other\nSo."),
        ("A<|channel>thought\none<channel|>B<|channel>thought\ntwo<channel|>C", "ABC", "onetwo"),
        ("<|channel>thought\nnever ends", "", "never ends"),
        ("<|channel>tho", "", "tho"),
        ("begun in the prompt<channel|>Yes.", "Yes.", "begun in the prompt"),
        ("Yes.<tool_call|> <|turn>", "Yes.<tool_call|> <|turn>", ""),
        ("<|chan", "<|chan", ""),
    ],
)
def test_thoughts_and_answer(text: str, content: str, reasoning: str) -> None:
    assert read_reply(text) == Reply(content, reasoning, ())


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ("{}", {}),
        ('{city:<|"|>Oslo<|"|>}', {"city": "Oslo"}),
        ('{a:<|"|>}{,:"<|"|>,b:<|"|><|"|>}', {"a": '}{,:"', "b": ""}),
        ('{ city : "Os\\u006co" , n : 1 }', {"city": "Oslo", "n": 1}),
        ('{<|"|>a key<|"|>:1,"b":2,c-d:3,日本:4}', {"a key": 1, "b": 2, "c-d": 3, "日本": 4}),
        ("{a:-1,b:2.50,c:1e3,d:true,e:false,f:null}", {"a": -1, "b": 2.5, "c": 1e3, "d": True, "e": False, "f": None}),
        ('{a:[],b:[1,[<|"|>x<|"|>],{c:{}}]}', {"a": [], "b": [1, ["x"], {"c": {}}]}),
    ],
)
def test_arguments_of_a_call(arguments: str, value: Any) -> None:
    reply = read_reply(call(arguments))
    assert reply == Reply("", "", (ToolCall("call_0", "f", value),))
    assert all(type(value[key]) is type(read) for key, read in reply.tool_calls[0].arguments.items())


@pytest.mark.parametrize(
    "text",
    [
        call(""),
        call("{a:1"),
        call("{a:1}}"),
        call("{a:1,}"),
        call("{a:1 b:2}"),
        call("{a 1}"),
        call("{a:}"),
        call("{:1}"),
        call("{a:Oslo}"),
        call("{a:truely}"),
        call("{a:007}"),
        call("{a:1e999}"),
        call("{a:" + "9" * 5000 + "}"),
        call('{a:<|"|>no end}'),
        call('{a:"no end}'),
        call("{a:" + "[" * 100_000),
        call("[1]"),
        call("{}", name=""),
        call("{}", name="f g"),
        "<|tool_call>f{}<tool_call|>",
        "<|tool_call>call:f{}",
        "<|tool_call>",
    ],
)
def test_what_is_no_call_stays_in_the_text(text: str) -> None:
    assert read_reply(f"A{text}") == Reply(f"A{text}", "", ())


def test_several_calls_have_ids_of_their_own() -> None:
    reply = read_reply(
        f"<|channel>thought\nBoth.<channel|>Look: {call('{}', 'f')}{call('{}', 'bad name')}{call('{}', 'g')}"
    )
    assert [(one.id, one.name) for one in reply.tool_calls] == [("call_0", "f"), ("call_1", "g")]
    assert reply.content == f"Look: {call('{}', 'bad name')}"


def test_a_reply_is_a_message_for_the_chat_to_go_on_with() -> None:
    assert read_reply("Yes.").message() == {"role": "assistant", "content": "Yes."}
    assert read_reply(f"<|channel>thought\nSo.<channel|>{call('{a:1}')}").message() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "So.",
        "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|turn>model\n", ""),
        ("<|turn>model\n<|channel>thought\n<channel|>", ""),
        ("<|channel>thought\nold<channel|><tool_response|><|channel>thought\n", "<|channel>thought\n"),
    ],
)
def test_thoughts_that_the_prompt_began(prompt: str, opening: str) -> None:
    assert reply_opening(prompt) == opening
    assert read_reply("So.", opening=opening) == (Reply("", "So.", ()) if opening else Reply("So.", "", ()))


# --- piece by piece ------------------------------------------------------------------------------------------------


def test_pieces_come_as_soon_as_they_are_certain() -> None:
    reader = ReplyReader()
    assert reader.push("Let") == [ReplyPart("content", "Let")]
    assert reader.push(" me<|chan") == [ReplyPart("content", " me")]
    assert reader.push("nel>tho") == []
    assert reader.push("ught\nSo") == [ReplyPart("reasoning", "So")]
    assert reader.push(" <") == [ReplyPart("reasoning", " ")]
    assert reader.push("b><channel|>Yes") == [ReplyPart("reasoning", "<b>"), ReplyPart("content", "Yes")]
    assert reader.push('<|tool_call>call:f{a:<|"|>') == []
    (part,) = reader.push('x<|"|>}<tool_call|>')
    assert (part.kind, part.tool_call) == ("tool_call", ToolCall("call_0", "f", {"a": "x"}))
    assert part.text == '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    assert reader.push("<") == []
    assert reader.finish() == [ReplyPart("content", "<")]
    assert reader.finish() == []


TEXTS = st.lists(st.sampled_from([*MARKERS, "thought", "\n", "call:f{", "a:1", "}", "<", "|", "é", " x"]), max_size=20)


@given(TEXTS, st.lists(st.integers(0, 7), max_size=30))
def test_however_the_text_is_cut_the_parts_are_the_same(pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)

    def joined(parts: list[ReplyPart]) -> list[tuple[str, str]]:
        result: list[tuple[str, str]] = []
        for part in parts:
            if result and result[-1][0] == part.kind != "tool_call":
                result[-1] = (part.kind, result[-1][1] + part.text)
            else:
                result.append((part.kind, part.text))
        return result

    whole, cut = ReplyReader(), ReplyReader()
    parts, at = [], 0
    for size in sizes:
        parts += cut.push(text[at : at + size])
        at += size
    parts += [*cut.push(text[at:]), *cut.finish()]
    assert joined(parts) == joined([*whole.push(text), *whole.finish()])


@given(TEXTS)
def test_nothing_but_markers_and_the_name_of_the_channel_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    reader = ReplyReader()
    shown = "".join(part.text for part in [*reader.push(text), *reader.finish()])
    for marker in (*MARKERS, "thought\n", "thought"):
        text, shown = text.replace(marker, ""), shown.replace(marker, "")
    assert shown.replace("\n", "") == text.replace("\n", "")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda v: st.lists(v) | st.dictionaries(st.text("abc_-", min_size=1), v),
        max_leaves=12,
    )
)
def test_any_data_that_the_notation_can_write_is_read_back(value: Any) -> None:
    def written(data: Any) -> str:
        if isinstance(data, str):
            return f'<|"|>{data}<|"|>'
        if isinstance(data, dict):
            return "{" + ",".join(f"{key}:{written(item)}" for key, item in data.items()) + "}"
        if isinstance(data, list):
            return f"[{','.join(map(written, data))}]"
        return json.dumps(data)

    reply = read_reply(call("{value:" + written(value) + "}"))
    assert [dict(one.arguments) for one in reply.tool_calls] == [{"value": value}]
