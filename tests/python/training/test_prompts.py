"""Files of prompts: every form, and every way to get one wrong, with the line."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftwerk.training.errors import TrainingError
from draftwerk.training.prompts import PromptsFile, TextPrompt, read_prompts, set_aside


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "prompts"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    read = read_prompts(write(tmp_path, "\ufeffThe first\r\n\n  indented\n"))
    assert read.prompts == (TextPrompt("The first", line=1), TextPrompt("  indented", line=3))


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    entries = [
        {"prompt": "Once", "category": "prose"},
        {"messages": messages, "category": None},
        {"question_id": 7, "category": "maths", "turns": ["One", "Two"]},
    ]
    read = read_prompts(write(tmp_path, "\n".join(map(json.dumps, entries))))
    assert read.prompts == (
        TextPrompt("Once", "prose", 1),
        TextPrompt(tuple(messages), "", 2),
        TextPrompt("One", "maths", 3),
    )


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('{"prompt": "a"}\n{"prompt": }', 2, "not JSON (Expecting value)"),
        ('{"prompt": "a"}\ntext', 2, "not JSON"),
        ('{"prompt": "a"}\n\n[1]', 3, "not a JSON object"),
        ('{"text": "a"}', 1, "no prompt"),
        ('{"prompt": "a", "messages": []}', 1, "prompt and messages exclude each other"),
        ('{"prompt": ""}', 1, "prompt is not text"),
        ('{"prompt": 3}', 1, "prompt is not text"),
        ('{"turns": []}', 1, "turns is not text"),
        ('{"messages": []}', 1, "messages is not a list of messages"),
        ('{"messages": ["hi"]}', 1, "messages is not a list of messages"),
        ('{"messages": [{"role": "user"}]}', 1, "messages[0].content = absent: must be text, or a list of parts"),
        ('{"messages": [{"role": "user", "content": " "}]}', 1, 'messages[0].content = " ": must be text'),
        ('{"messages": [{"role": "user", "content": {"a": 1}}]}', 1, 'messages[0].content = {"a": 1}: must be'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', 1, "messages[0].content = [{"),
        ('{"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}', 1, "messages[0].content = [{"),
        ('{"messages": [{"role": "system", "content": null}]}', 1, "messages[0].content = null: must be"),
        ('{"messages": [{"role": "system", "content": "Be brief."}]}', 1, 'no message has the role "user"'),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', 1, 'no message has the role "user"'),
        ('{"prompt": "\\ud800"}', 1, "prompt holds a lone surrogate"),
        ('{"turns": ["\\ud800"]}', 1, "turns holds a lone surrogate"),
        ('{"prompt": "a", "category": "\\ud800"}', 1, "category holds a lone surrogate"),
        ('{"messages": [{"role": "user", "content": "a\\udcff"}]}', 1, "messages holds a lone surrogate"),
        ("{" * 5000, 1, "not JSON"),
        ('{"a":' * 5000, 1, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, content: str, line: int, reason: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TrainingError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: {reason}")
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('["One", "Two"]', 1, "a JSON array"),
        ('\n[\n  {"prompt": "One"}\n]\n', 2, "a JSON array"),
        ('[["One"]]\n[["Two"]]', 1, "a JSON array"),
        (' "One"\n"Two"', 1, "a JSON string"),
        ('One\n\n{"prompt": "Two"}', 3, "JSON, in a file that begins with plain text"),
        ('prompt,category\nOne,a\n {"turns": ["Two"]}', 3, "JSON, in a file that begins with plain text"),
        ('One\n{"messages": []}', 2, "JSON, in a file that begins with plain text"),
    ],
)
def test_json_that_would_be_read_as_text_is_refused(tmp_path: Path, content: str, line: int, reason: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TrainingError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: {reason}")
    assert 'like {"prompt": "..."}, {"messages": ' in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "content",
    [
        '"Yes," she said\n"No"',
        "[1] A first note\n[2]",
        'Print as JSON:\n{"name": "value"}',
        "A line\n{not JSON}",
        "[" * 5000,
    ],
)
def test_text_may_look_like_json(tmp_path: Path, content: str) -> None:
    read = read_prompts(write(tmp_path, content))
    assert [prompt.content for prompt in read.prompts] == content.split("\n")
    assert read.form == "text"


def test_the_form_is_told(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, '{"prompt": "One"}')).form == "JSON"


def test_a_file_with_a_nul_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"One\n" + "Two\n".encode("utf-16-le"))
    with pytest.raises(TrainingError, match=r":2: holds a NUL byte: prompts are text in UTF-8, not in UTF-16"):
        read_prompts(path)


@pytest.mark.parametrize("content", [b"", b"\n  \n\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TrainingError, match="no prompts: the file is empty"):
        read_prompts(write(tmp_path, content))


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = write(tmp_path, b"good\nna\xefve\n")
    with pytest.raises(TrainingError, match=r":2: not UTF-8 text \(byte 0xEF\)"):
        read_prompts(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none")


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "a")).sha256 != read_prompts(write(tmp_path, "b")).sha256


@given(st.binary(max_size=200))
def test_any_file_gives_prompts_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.getbasetemp(), content)
    try:
        assert read_prompts(path).prompts
    except TrainingError as error:
        assert "\n" not in str(error)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["prompt", "messages", "turns", "category", "role", "content"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_json_gives_prompts_or_one_line(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = write(tmp_path_factory.getbasetemp(), '{"prompt": "a"}\n' + json.dumps(value))
    try:
        assert len(read_prompts(path).prompts) == 2
    except TrainingError as error:
        assert "\n" not in str(error)


def test_lines_may_be_what_a_user_says(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "Hi"}]
    path.write_text("\n".join(map(json.dumps, [{"prompt": "One", "category": "c"}, {"messages": messages}])))
    said, chat = read_prompts(path, chat=True).prompts
    assert said == TextPrompt(({"role": "user", "content": "One"},), "c", 1)
    assert chat.content == tuple(messages)
    assert read_prompts(path, chat=True).sha256 != read_prompts(path).sha256


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


CALLS = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
TOOL_TURNS = [user("Rain?"), answer(None, tool_calls=CALLS), {"role": "tool", "content": {"rain": False}}]


@pytest.mark.parametrize(
    ("messages", "kept"),
    [
        ([user("Hi"), answer("Hello.")], 1),
        ([user("Hi"), {"role": "model", "content": "Hello."}], 1),
        ([{"role": "system", "content": ""}, user("Hi"), answer("Hello."), user("More"), answer("No.")], 4),
        ([user([{"type": "text", "text": "Hi"}, {"type": "image"}]), answer("")], 1),
        ([*TOOL_TURNS, answer("No.")], 3),
        (TOOL_TURNS, 3),
    ],
)
def test_the_answer_at_the_end_of_messages_is_left_out(tmp_path: Path, messages: list[Any], kept: int) -> None:
    (prompt,) = read_prompts(write(tmp_path, json.dumps({"messages": messages}))).prompts
    assert prompt.content == tuple(messages[:kept])


def test_the_digest_tells_whether_answers_were_left_out(tmp_path: Path) -> None:
    content = json.dumps({"messages": [user("Hi")]})
    assert read_prompts(write(tmp_path, content)).sha256 == hashlib.sha256(content.encode()).hexdigest()
    content = json.dumps({"messages": [user("Hi"), answer("Hello.")]})
    assert read_prompts(write(tmp_path, content)).sha256 != hashlib.sha256(content.encode()).hexdigest()


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_some_prompts_are_set_aside_where_there_are_enough(count: int, seed: int) -> None:
    prompts = prompts_of(*(TextPrompt(str(i), line=i + 1) for i in range(count)))
    written, aside = set_aside(prompts, seed)
    if count < 32:
        assert (written, aside) == (prompts, None)
        return
    assert aside is not None
    assert len(aside.prompts) == min(max(count // 16, 8), 64)
    together = sorted((*written.prompts, *aside.prompts), key=lambda prompt: prompt.line)
    assert tuple(together) == prompts.prompts
    assert set_aside(prompts, seed) == (written, aside)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=300), st.integers(0, 2**63 - 1))
def test_a_prompt_that_comes_again_is_on_one_side(contents: list[int], seed: int) -> None:
    prompts = prompts_of(*(TextPrompt(str(i), "xy"[line % 2], line) for line, i in enumerate(contents, 1)))
    written, aside = set_aside(prompts, seed)
    if len(set(contents)) < 32:
        assert (written, aside) == (prompts, None)
        return
    assert aside is not None
    assert len(aside.prompts) == 8
    evaluated = {prompt.content for prompt in aside.prompts}
    assert len(evaluated) == 8
    assert written.prompts == tuple(prompt for prompt in prompts.prompts if prompt.content not in evaluated)


def test_every_category_is_set_aside_by_its_share() -> None:
    categories = ["a"] * 64 + ["b"] * 32 + ["c"] * 32
    prompts = prompts_of(*(TextPrompt(str(i), category, i + 1) for i, category in enumerate(categories)))
    chosen = set()
    for seed in range(8):
        _, aside = set_aside(prompts, seed)
        assert aside is not None
        assert Counter(prompt.category for prompt in aside.prompts) == {"a": 4, "b": 2, "c": 2}
        chosen.add(aside)
    assert len(chosen) == 8


def prompts_of(*prompts: TextPrompt) -> PromptsFile:
    return PromptsFile(Path("p"), b"", prompts, "digest")
