"""From the protos' form of a request to the engine's: values, defaults, and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

from draftwerk import Chat, Engine, SamplingParams
from draftwerk.server.conversion import (
    check_known_fields,
    check_model,
    check_token_ids,
    prompt_of,
    sampling_params,
    token_ids_of,
)
from draftwerk.server.encoding import LONG_PROMPT_BYTES
from draftwerk.server.errors import InvalidField, ModelNotFound
from draftwerk_client.v1 import generation_pb2, parameters_pb2, session_pb2
from fake_checkpoint import BOS, FakeCheckpoint

TOKENS = parameters_pb2.TokenIds


def params_of(
    sampling: parameters_pb2.SamplingParameters | None = None,
    stop: parameters_pb2.StopConditions | None = None,
    drafting: parameters_pb2.DraftingOptions | None = None,
    output: parameters_pb2.OutputOptions | None = None,
    cache_salt: str = "",
    room: int = 4000,
) -> SamplingParams:
    return sampling_params(
        sampling or parameters_pb2.SamplingParameters(),
        stop or parameters_pb2.StopConditions(),
        drafting or parameters_pb2.DraftingOptions(),
        output or parameters_pb2.OutputOptions(),
        cache_salt,
        room,
    )


# --- parameters ------------------------------------------------------------------------------------------------


def test_absent_parameters_are_the_engines_defaults() -> None:
    assert params_of() == SamplingParams()


def test_every_parameter_arrives() -> None:
    params = params_of(
        parameters_pb2.SamplingParameters(
            temperature=0.5,
            top_k=5,
            top_p=0.75,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=0.125,
            frequency_penalty=-0.125,
            logit_bias={7: 2.5, 9: -1.0},
            seed=2**64 - 1,
        ),
        parameters_pb2.StopConditions(
            max_tokens=12, min_tokens=3, strings=["END", "é"], token_ids=[9, 8], ignore_end_tokens=True
        ),
        parameters_pb2.DraftingOptions(enabled=False, max_length=3),
        parameters_pb2.OutputOptions(logprobs=2, token_bytes=True),
        "tenant",
    )
    assert params == SamplingParams(
        max_tokens=12,
        min_tokens=3,
        temperature=0.5,
        top_k=5,
        top_p=0.75,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.125,
        frequency_penalty=-0.125,
        logit_bias={7: 2.5, 9: -1.0},
        seed=2**64 - 1,
        logprobs=2,
        stop=("END", "é"),
        stop_token_ids=(9, 8),
        ignore_eos=True,
        drafting=False,
        max_draft_length=3,
        salt="tenant",
    )


def test_values_that_equal_zero_are_not_taken_for_absent() -> None:
    params = params_of(
        parameters_pb2.SamplingParameters(top_p=0.0, repetition_penalty=0.0),
        parameters_pb2.StopConditions(max_tokens=0),
        parameters_pb2.DraftingOptions(max_length=0),
        parameters_pb2.OutputOptions(logprobs=0),
    )
    assert (params.top_p, params.repetition_penalty, params.max_tokens) == (0.0, 0.0, 0)
    assert (params.max_draft_length, params.logprobs) == (0, 0)


def test_max_tokens_ends_at_the_context_only_where_the_client_names_none() -> None:
    assert params_of(room=10).max_tokens == 10
    assert params_of(room=0).max_tokens == 1
    assert params_of(stop=parameters_pb2.StopConditions(max_tokens=99), room=10).max_tokens == 99


@pytest.mark.parametrize("logprobs", [-1, 21, 2**31 - 1])
def test_logprobs_out_of_range(logprobs: int) -> None:
    with pytest.raises(InvalidField, match=rf"output.logprobs = {logprobs}: must be 0 to 20"):
        params_of(output=parameters_pb2.OutputOptions(logprobs=logprobs))


def test_a_salt_is_measured_in_bytes() -> None:
    assert params_of(cache_salt="é" * 128).salt == "é" * 128
    with pytest.raises(InvalidField, match="cache_salt = 258 bytes: must be at most 256 bytes"):
        params_of(cache_salt="é" * 129)


def test_another_model_is_refused() -> None:
    check_model("", "gemma")
    check_model("gemma", "gemma")
    with pytest.raises(ModelNotFound, match=r"'llama'.*'gemma'"):
        check_model("llama", "gemma")


# --- prompts ---------------------------------------------------------------------------------------------------


def chat(*said: str) -> parameters_pb2.Prompt:
    messages = [parameters_pb2.ChatMessage(role="user", content=content) for content in said]
    return parameters_pb2.Prompt(messages=parameters_pb2.ChatMessages(messages=messages))


def test_the_three_forms_of_a_prompt(engine: Engine) -> None:
    assert prompt_of(parameters_pb2.Prompt(text="a"), engine) == "a"
    assert prompt_of(parameters_pb2.Prompt(token_ids=TOKENS(ids=[5, 6])), engine) == [5, 6]
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompt_of(chat("a", "b"), engine) == Chat(messages, tools=[])


async def test_token_ids_of_the_three_forms(engine: Engine) -> None:
    assert await token_ids_of(parameters_pb2.Prompt(text="a"), engine) == [BOS, 101]
    assert await token_ids_of(parameters_pb2.Prompt(text="a"), engine, add_bos=False) == [101]
    assert await token_ids_of(parameters_pb2.Prompt(token_ids=TOKENS(ids=[5, 6])), engine) == [5, 6]
    assert await token_ids_of(chat("hi"), engine) == engine.encode_prompt([{"role": "user", "content": "hi"}])


async def test_long_text_is_tokenised_in_another_thread(
    engine: Engine, checkpoint: FakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    encode = engine.tokenize

    def recording(text: str, *, add_bos: bool = True) -> list[int]:
        threads.append(threading.current_thread())
        return encode(text, add_bos=add_bos)

    monkeypatch.setattr(engine, "tokenize", recording)
    short, long = "a" * 100, "a" * LONG_PROMPT_BYTES
    assert len(await token_ids_of(parameters_pb2.Prompt(text=short), engine)) == len(short) + 1
    assert len(await token_ids_of(parameters_pb2.Prompt(text=long), engine)) == len(long) + 1
    assert [thread is threading.current_thread() for thread in threads] == [True, False]


def refusal(prompt: parameters_pb2.Prompt, engine: Engine, path: str = "prompt") -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        prompt_of(prompt, engine, path)
    return caught.value


def test_prompts_that_are_refused_name_their_path(engine: Engine) -> None:
    assert refusal(parameters_pb2.Prompt(), engine).field == "prompt"
    assert refusal(chat(), engine).field == "prompt.messages.messages"
    wrong = refusal(parameters_pb2.Prompt(token_ids=TOKENS(ids=[1, 260, -1])), engine, "content")
    assert (wrong.field, wrong.value, wrong.allowed) == ("content.token_ids.ids[1]", 260, "0 to 259")


def test_a_prompt_of_more_tokens_than_a_sequence_may_have(engine: Engine) -> None:
    wrong = refusal(parameters_pb2.Prompt(token_ids=TOKENS(ids=[5] * 4097)), engine)
    assert (wrong.field, wrong.allowed) == ("prompt.token_ids.ids", "at most 4096 (the longest sequence)")


# --- chats -----------------------------------------------------------------------------------------------------------


def chat_prompt(*messages: parameters_pb2.ChatMessage, **fields: Any) -> parameters_pb2.Prompt:
    return parameters_pb2.Prompt(messages=parameters_pb2.ChatMessages(messages=messages, **fields))


MESSAGE, CALL = parameters_pb2.ChatMessage, parameters_pb2.ToolCall


def test_everything_that_a_message_may_have(engine: Engine) -> None:
    prompt = chat_prompt(
        MESSAGE(role="user", structured_content='[{"type": "text", "text": "hi"}]'),
        MESSAGE(
            role="assistant",
            reasoning_content="hm",
            tool_calls=[CALL(id="c1", name="f", arguments='{"b": 1, "a": 2.0}'), CALL(name="g")],
        ),
        MESSAGE(role="tool", tool_call_id="c1", name="f", content="text"),
        MESSAGE(role="tool", structured_content='{"t": null}'),
        tools=['{"type": "function", "function": {"name": "f"}}'],
        enable_thinking=False,
        template_variables={"mood": '"good"', "level": "3"},
    )
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": 2.0}}},
        {"id": "", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    read = prompt_of(prompt, engine)
    assert read == Chat(
        [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
            {"role": "tool", "content": "text", "tool_call_id": "c1", "name": "f"},
            {"role": "tool", "content": {"t": None}},
        ],
        tools=[{"type": "function", "function": {"name": "f"}}],
        enable_thinking=False,
        template_variables={"mood": "good", "level": 3},
    )
    assert isinstance(read, Chat)
    arguments = read.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert list(arguments) == ["b", "a"], "in the order in which they were given"
    assert [type(value) for value in arguments.values()] == [int, float]


@pytest.mark.parametrize(
    ("prompt", "field", "allowed"),
    [
        (chat_prompt(MESSAGE(), tools=["{"]), "prompt.messages.tools[0]", "JSON: "),
        (chat_prompt(MESSAGE(), tools=["[" * 100_000]), "prompt.messages.tools[0]", "JSON: "),
        (chat_prompt(MESSAGE(), tools=["{}", "[]"]), "prompt.messages.tools[1]", "a JSON object"),
        (chat_prompt(MESSAGE(), template_variables={"x": "NaN"}), "prompt.messages.template_variables", "NaN is no"),
        (
            chat_prompt(MESSAGE(), MESSAGE(content="a", structured_content="[]")),
            "prompt.messages.messages[1].structured_content",
            "absent beside content",
        ),
        (
            chat_prompt(MESSAGE(tool_calls=[CALL(name="f", arguments="5")])),
            "prompt.messages.messages[0].tool_calls[0].arguments",
            "a JSON object",
        ),
        (chat_prompt(*[MESSAGE(role="user")] * 4097), "prompt.messages.messages", "at most 4096"),
    ],
)
def test_a_chat_that_is_refused_names_its_part(
    engine: Engine, prompt: parameters_pb2.Prompt, field: str, allowed: str
) -> None:
    wrong = refusal(prompt, engine)
    assert wrong.field == field
    assert allowed in wrong.allowed


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tools": ['{"function": {"name": "f"}}']}, "content.messages.tools"),
        ({"enable_thinking": True}, "content.messages.enable_thinking"),
        ({"template_variables": {"x": "1"}}, "content.messages.template_variables"),
    ],
)
async def test_what_the_chat_template_overlooks_is_refused(engine: Engine, fields: Any, field: str) -> None:
    prompt = chat_prompt(MESSAGE(role="user", content="hi"), **fields)
    with pytest.raises(InvalidField, match="must be") as caught:
        await token_ids_of(prompt, engine, "content")
    assert caught.value.field == field
    with pytest.raises(InvalidField, match="they belong to the beginning of a chat") as caught:
        await token_ids_of(prompt, engine, "content", after=[5])
    assert caught.value.field == "content.messages"


async def test_a_long_chat_is_read_and_tokenised_in_another_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    render = engine.render_chat

    def recording(prompt: Any) -> str:
        threads.append(threading.current_thread())
        return render(prompt)

    monkeypatch.setattr(engine, "render_chat", recording)
    for length in (100, LONG_PROMPT_BYTES):
        message = MESSAGE(role="user", content="a", reasoning_content="b" * length)
        assert await token_ids_of(chat_prompt(message), engine) == engine.encode_prompt(
            [{"role": "user", "content": "a"}]
        )
    assert [thread is threading.current_thread() for thread in threads] == [True, False]


def test_prompts_of_a_model_without_tokenizer(checkpoint: FakeCheckpoint) -> None:
    checkpoint.tokenizer = None
    with Engine("fake") as engine:
        assert refusal(parameters_pb2.Prompt(text="a"), engine).field == "prompt.text"
        assert refusal(chat("a"), engine).field == "prompt.messages"
        assert prompt_of(parameters_pb2.Prompt(token_ids=TOKENS(ids=[5])), engine) == [5]


def test_messages_for_a_model_without_chat_template(checkpoint: FakeCheckpoint) -> None:
    checkpoint.chat_template = None
    with Engine("fake") as engine:
        wrong = refusal(chat("a"), engine)
        assert (wrong.field, wrong.allowed) == ("prompt.messages", "text or token_ids: the model has no chat template")


def test_token_ids_at_the_edges_of_the_vocabulary() -> None:
    check_token_ids([], 260, "x")
    check_token_ids([0, 259], 260, "x")
    for wrong in (-1, 260):
        with pytest.raises(InvalidField, match=rf"x\[2\] = {wrong}: must be 0 to 259"):
            check_token_ids([0, 1, wrong], 260, "x")


# --- fields of newer clients -----------------------------------------------------------------------------------


def newer(message: Message, **fields: int) -> bytes:
    """Bytes of a message that has further fields, as a client of a later API version writes them."""
    file = descriptor_pb2.FileDescriptorProto(name="newer.proto", package="newer", syntax="proto3")
    described = file.message_type.add(name="Newer")
    for name, number in fields.items():
        described.field.add(name=name, number=number, type="TYPE_INT32", label="LABEL_OPTIONAL")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call]
    added = message_factory.GetMessageClass(pool.FindMessageTypeByName("newer.Newer"))()
    for name in fields:
        setattr(added, name, 1)
    return message.SerializeToString() + added.SerializeToString()


def test_known_fields_pass() -> None:
    check_known_fields(generation_pb2.GenerateRequest())
    check_known_fields(
        generation_pb2.GenerateRequest(
            prompt=chat("a", "b"),
            sampling=parameters_pb2.SamplingParameters(temperature=1.0, logit_bias={1: 2.0}),
            stop=parameters_pb2.StopConditions(strings=["a"], token_ids=[1]),
        )
    )


@pytest.mark.parametrize(
    ("path", "build"),
    [
        (
            "99",
            lambda: generation_pb2.GenerateRequest.FromString(newer(generation_pb2.GenerateRequest(), x=99)),
        ),
        (
            "sampling.99",
            lambda: generation_pb2.GenerateRequest(
                sampling=parameters_pb2.SamplingParameters.FromString(newer(parameters_pb2.SamplingParameters(), x=99))
            ),
        ),
        (
            "prompt.messages.messages[1].99",
            lambda: generation_pb2.GenerateRequest(
                prompt=parameters_pb2.Prompt(
                    messages=parameters_pb2.ChatMessages(
                        messages=[
                            parameters_pb2.ChatMessage(role="user"),
                            parameters_pb2.ChatMessage.FromString(newer(parameters_pb2.ChatMessage(), x=99)),
                        ]
                    )
                )
            ),
        ),
        (
            "append.content.99",
            lambda: session_pb2.SessionRequest(
                append=session_pb2.SessionRequest.Append(
                    content=parameters_pb2.Prompt.FromString(newer(parameters_pb2.Prompt(text="a"), x=99))
                )
            ),
        ),
    ],
)
def test_a_field_of_a_newer_client_is_refused_at_any_depth(path: str, build: object) -> None:
    with pytest.raises(InvalidField, match=r"99 = set: must be absent: .*the client is newer") as caught:
        check_known_fields(build())  # type: ignore[operator]
    assert caught.value.field == path
