"""Chats with a served model that has Gemma 4's control tokens and such a chat template, from the client to the core.

The model is random, and so is where it writes markers of thoughts and calls: whatever it says, the text of a session is
that of the whole chat, and its answers are those of one-shot generation.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from serve_process import InProcess
from test_chat_command import chat

import chat_templates
import draftwerk
from draftwerk import _core
from draftwerk.cli.answer_parts import AnswerParts
from draftwerk_client import AsyncClient, Chat

QUESTION = {"role": "user", "content": "hello world, what is the weather in the north or in the west?"}
NEXT = {"role": "user", "content": "and then?"}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "special_tokens": True}
# Pieces of the tiny vocabulary that stand for nothing that a chat needs.
RENAMED = {
    "<start_of_turn>": "<|turn>",
    "<end_of_turn>": "<turn|>",
    "\n\n": "<|channel>",
    "\n\n\n": "<channel|>",
    "\n\n\n\n": "<|think|>",
    "<table>": "<|tool_call>",
    "</table>": "<tool_call|>",
    "\t": "<|tool_response>",
}


@pytest.fixture(scope="module")
def gemma_4_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other control tokens, another chat template, and end tokens in generation_config.json."""
    if _core.__name__ == "fake_core":
        pytest.skip("the native module is not built")
    tokenizer = import_module("loading.tiny_files").tokenizer_json()
    for added in tokenizer["added_tokens"]:
        if added["content"] in RENAMED:
            added["content"] = RENAMED[added["content"]]
            added["special"] = True
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {RENAMED.get(piece, piece): index for piece, index in vocabulary.items()}
    tokenizer["model"]["merges"] = [
        pair for pair in tokenizer["model"]["merges"] if not {*pair, "".join(pair)} & set(RENAMED)
    ]
    directory = tmp_path_factory.mktemp("models") / "tiny-chat"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((tiny_model_path / name).read_bytes())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    (directory / "chat_template.jinja").write_text(chat_templates.GEMMA_4)
    ends = [vocabulary["<eos>"], vocabulary["<end_of_turn>"], vocabulary["\t"]]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory


@pytest.fixture(scope="module")
def engine(gemma_4_path: Path) -> Iterator[draftwerk.Engine]:
    with draftwerk.Engine(gemma_4_path, threads=1, kv_memory="32MiB") as opened:
        yield opened


@pytest.fixture
async def client(engine: draftwerk.Engine, inprocess_server: InProcess) -> AsyncIterator[AsyncClient]:
    async with inprocess_server(engine) as server, AsyncClient(server.address) as connected:
        yield connected


async def test_the_served_model_thinks_and_calls_functions(client: AsyncClient) -> None:
    model = await client.model()
    assert (model.has_chat_template, model.has_thinking, model.has_tools) == (True, True, True)


@pytest.mark.parametrize("name", ["<eos>", "<turn|>", "<|tool_response>"])
async def test_a_turn_ends_at_the_ids_of_generation_config(
    client: AsyncClient, engine: draftwerk.Engine, name: str
) -> None:
    (end,) = engine.tokenize(name, add_bos=False)
    assert end in (await client.model()).end_token_ids
    for special_tokens in (False, True):
        completion = await client.generate([QUESTION], logit_bias={end: 100.0}, special_tokens=special_tokens)
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("", (end,), "stop")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("thinking", [False, True])
async def test_a_session_is_what_one_request_with_the_whole_chat_is(
    client: AsyncClient, engine: draftwerk.Engine, seed: int, thinking: bool
) -> None:
    options = {**SAMPLED, "seed": seed}
    fields: Any = {"enable_thinking": thinking, "tools": [chat_templates.WEATHER] if seed % 2 else []}
    said: list[Any] = [QUESTION]
    branch: list[int] = []
    async with await client.session(**options) as session:
        appended = await session.append(Chat(said, **fields))
        for _ in range(4):
            changed = appended.position < len(branch) - 1  # an end token may go
            branch[appended.position :] = appended.token_ids
            whole = (await client.tokenize(Chat(said, **fields))).token_ids
            assert engine.detokenize(branch, special_tokens=True) == engine.detokenize(whole, special_tokens=True)
            if changed or len(said) == 1:
                assert tuple(branch) == whole
            answered, expected = await session.generate(), await client.generate(branch, **options)
            assert (answered.token_ids, answered.text) == (expected.token_ids, expected.text)
            branch += answered.token_ids
            reply = answered.reply()
            results = [
                {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": "rain"}
                for call in reply.tool_calls
            ]
            said += [reply.message(), *(results or [NEXT])]
            appended = await session.append(results or [NEXT])


async def test_what_stands_before_dropped_thoughts_stays_warm(client: AsyncClient, engine: draftwerk.Engine) -> None:
    thought = engine.tokenize("<|channel>thought\nweather north west<channel|>the", add_bos=False)
    async with await client.session(max_tokens=20) as session:
        await session.append(Chat([QUESTION], enable_thinking=True))
        asked = session.length
        await session.append(thought)
        await session.generate()
        appended = await session.append([NEXT])
        assert asked <= appended.position < asked + 3
        stats = (await session.generate()).stats
    # In blocks of 16 tokens; the layers with a window have to be warm too.
    assert appended.position - 16 < stats.cached_tokens <= appended.position


@pytest.mark.parametrize("thinking", [True, False])
def test_the_command_says_what_the_model_answers(engine: draftwerk.Engine, gemma_4_path: Path, thinking: bool) -> None:
    """With the parameters of the tests of the command."""
    params = draftwerk.SamplingParams(temperature=1.0, seed=3, max_tokens=12, special_tokens=True)
    asked = draftwerk.Chat([{"role": "user", "content": "hello world"}], enable_thinking=thinking)
    parts = AnswerParts(marked=True, thoughts=False)
    answer = "".join(text for text, _ in [*parts.push(engine.generate(asked, params).text), *parts.finish()])
    flag = "--thinking" if thinking else "--no-thinking"
    code, stdout, stderr = chat("-m", str(gemma_4_path), "--kv-memory", "32MiB", "-t", "1", flag, lines=["hello world"])
    assert (code, stdout, stderr) == (0, f"{answer}\n", "")


def test_the_two_answers_differ(engine: draftwerk.Engine) -> None:
    """Or the test of the command would prove nothing."""
    params = draftwerk.SamplingParams(temperature=1.0, seed=3, max_tokens=12)
    chats = [draftwerk.Chat([{"role": "user", "content": "hello world"}], enable_thinking=on) for on in (True, False)]
    first, second = engine.generate(chats, params)
    assert first.text != second.text
