"""Chat messages behind a sequence: the same tokens as the whole conversation in one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny_files as tiny

from draftwerk import Engine, RequestError
from draftwerk.loading import ChatTemplate, open_checkpoint
from fake_checkpoint import BOS, ByteTokenizer, FakeCheckpoint

START, END = 0, 3
GEMMA_3 = """{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
GEMMA_4 = (
    GEMMA_3.replace("<start_of_turn>", "<|turn>")
    .replace("<end_of_turn>", "<turn|>")
    .replace("(message['role'] == 'user') != (loop.index0 % 2 == 0)", "false")
)
FIRST, SECOND = {"role": "user", "content": "Hello"}, {"role": "user", "content": "And\n\nnow?"}
ANSWER = "Good day."


class TurnTokenizer(ByteTokenizer):
    """Knows the names of control tokens, as real ones do."""

    def __init__(self, start: str, end: str) -> None:
        self._controls = {"<bos>": BOS, start: START, end: END}

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        ids = [BOS] * add_bos
        while text:
            name = next((name for name in self._controls if text.startswith(name)), None)
            ids += [4 + byte for byte in text[0].encode()] if name is None else [self._controls[name]]
            text = text[len(name or " ") :]
        return ids


@pytest.fixture(params=["gemma 3", "gemma 4", "gemma 3, real tokenizer"])
def chat(request: pytest.FixtureRequest, checkpoint: FakeCheckpoint) -> Iterator[Engine]:
    """An engine that chats, over the scripted core."""
    source = GEMMA_4 if request.param == "gemma 4" else GEMMA_3
    checkpoint.chat_template = ChatTemplate(source, {"bos_token": "<bos>"})
    if "real" in request.param:
        checkpoint.tokenizer = request.getfixturevalue("real_tokenizer")
    elif request.param == "gemma 3":
        checkpoint.tokenizer = TurnTokenizer("<start_of_turn>", "<end_of_turn>")
    else:
        checkpoint.tokenizer = TurnTokenizer("<|turn>", "<turn|>")
    with Engine("chat") as engine:
        yield engine


@pytest.fixture(scope="session")
def real_tokenizer(real_model: str) -> object:
    return open_checkpoint(real_model).tokenizer


def closing_of(engine: Engine) -> list[int]:
    """The tokens that close an answer."""
    return next(
        engine.tokenize(marker + "\n", add_bos=False)
        for marker in ("<end_of_turn>", "<turn|>")
        if engine.token_bytes(engine.tokenize(marker, add_bos=False)) == [b""]
    )


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_however_the_answer_ended_the_sequence_is_that_of_the_whole_conversation(chat: Engine, closed: int) -> None:
    closing = closing_of(chat)
    assert len(closing) == 2
    sequence = [*chat.encode_prompt([FIRST]), *chat.tokenize(ANSWER, add_bos=False), *closing[:closed]]
    sequence += chat.continue_chat(sequence, [SECOND])
    assert sequence == chat.encode_prompt([FIRST, {"role": "assistant", "content": ANSWER}, SECOND])
    # And on, turn by turn.
    sequence += [*chat.tokenize("Later.", add_bos=False), closing[0]]
    sequence += chat.continue_chat(sequence, [FIRST])
    answers = [{"role": "assistant", "content": text} for text in (ANSWER, "Later.")]
    assert sequence == chat.encode_prompt([FIRST, answers[0], SECOND, answers[1], FIRST])


def test_an_answer_without_tokens_is_closed_too(chat: Engine) -> None:
    sequence = chat.encode_prompt([FIRST])
    added = chat.continue_chat(sequence, [SECOND])
    assert added[: len(closing_of(chat))] == closing_of(chat)


def test_on_an_empty_sequence_the_messages_begin_the_conversation(chat: Engine) -> None:
    assert chat.continue_chat([], [FIRST]) == chat.encode_prompt([FIRST])


def test_several_messages(chat: Engine) -> None:
    answer = {"role": "assistant", "content": ANSWER}
    sequence = [*chat.encode_prompt([FIRST]), *chat.tokenize(ANSWER, add_bos=False)]
    sequence += chat.continue_chat(sequence, [SECOND, answer, FIRST])
    assert sequence == chat.encode_prompt([FIRST, answer, SECOND, answer, FIRST])


def test_messages_that_cannot_follow_are_refused(checkpoint: FakeCheckpoint) -> None:
    checkpoint.tokenizer = TurnTokenizer("<start_of_turn>", "<end_of_turn>")
    checkpoint.chat_template = ChatTemplate(GEMMA_3)
    with Engine("chat") as engine:
        sequence = engine.encode_prompt([FIRST])
        for messages, why in (
            ([{"role": "assistant", "content": "x"}], "roles must alternate"),
            ([], "at least one message"),
            ([FIRST, "text"], "a mapping with role and content"),
        ):
            for so_far in (sequence, []):
                with pytest.raises(RequestError, match=why) as caught:
                    engine.continue_chat(so_far, messages)  # type: ignore[arg-type]
                assert caught.value.field.startswith("messages")


def test_it_needs_a_template_and_a_tokenizer(checkpoint: FakeCheckpoint) -> None:
    tokenizer, checkpoint.tokenizer = checkpoint.tokenizer, None
    with Engine("fake") as engine:
        assert not engine.has_chat_template
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.continue_chat([5], [FIRST])
    checkpoint.tokenizer, checkpoint.chat_template = tokenizer, None
    with Engine("fake") as engine:
        assert not engine.has_chat_template
        with pytest.raises(RequestError, match="no chat template") as caught:
            engine.continue_chat([], [FIRST])
        assert caught.value.field == "messages"


def test_a_checkpoint_that_brings_its_template(core: ModuleType, tmp_path: Path) -> None:
    path = tiny.TinyGguf(tokenizer__chat_template=(tiny.STRING, GEMMA_3)).write(tmp_path / "tiny.gguf")
    with Engine(path) as engine:
        assert engine.has_chat_template
        end = engine.info.end_token_ids[-1]
        sequence = [*engine.encode_prompt([FIRST]), *engine.tokenize("hello", add_bos=False), end]
        sequence += engine.continue_chat(sequence, [SECOND])
        assert sequence == engine.encode_prompt([FIRST, {"role": "assistant", "content": "hello"}, SECOND])
