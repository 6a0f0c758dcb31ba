"""Generation.Generate over a real port and a scripted core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from session_client import TIMEOUT, at_most, eventually, hold_after, ids_prompt, text_of, tokens_of

from draftwerk import Engine, SamplingParams
from draftwerk.requests import output_fingerprint
from draftwerk_client.v1 import generation_pb2_grpc, output_pb2, parameters_pb2
from draftwerk_client.v1.generation_pb2 import GenerateRequest
from fake_checkpoint import BOS, EOS, VOCABULARY, FakeCheckpoint
from fake_core import Engine as ScriptedEngine
from fake_core import QueueFull as CoreQueueFull

Generate = Callable[..., Any]


@pytest.fixture
async def generate(engine: Engine, inprocess_server: Any) -> AsyncIterator[Generate]:
    """Calls Generate with fields of the request; returns the call."""
    async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub: Any = generation_pb2_grpc.GenerationStub(channel)

        def call(metadata: Any = None, timeout: float = TIMEOUT, **fields: Any) -> Any:
            return stub.Generate(GenerateRequest(**fields), metadata=metadata, timeout=timeout)

        yield call


async def messages_of(call: Any) -> list[output_pb2.GenerateResponse]:
    return [message async for message in call]


# --- what comes ------------------------------------------------------------------------------------------------


async def test_one_message_for_each_step(generate: Generate) -> None:
    call = generate(prompt=parameters_pb2.Prompt(text="ab"), stop=at_most(5))
    messages = await messages_of(call)
    assert [list(message.token_ids) for message in messages] == [[BOS, 101], [102, BOS], [101]]
    assert [message.drafted_tokens for message in messages] == [1, 1, 0]
    assert [message.position for message in messages] == [3, 5, 7]
    assert text_of(messages) == "aba"
    assert [message.finish_reason for message in messages] == [0, 0, output_pb2.FINISH_REASON_LENGTH]
    assert [message.HasField("statistics") for message in messages] == [False, False, True]
    assert messages[-1].statistics.generated_tokens == 5
    assert await call.code() is grpc.StatusCode.OK


async def test_the_request_id_is_in_the_first_message_and_the_metadata(generate: Generate) -> None:
    call = generate(metadata=(("x-request-id", "mine"),), prompt=ids_prompt([10]), stop=at_most(5))
    messages = await messages_of(call)
    assert [message.request_id for message in messages] == ["mine", "", ""]
    assert dict(await call.initial_metadata())["x-request-id"] == "mine"


async def test_the_fingerprint_is_in_every_message_and_tells_outputs_apart(generate: Generate, engine: Engine) -> None:
    async def fingerprint(**fields: Any) -> int:
        messages = await messages_of(generate(**{"prompt": ids_prompt([10, 11]), "stop": at_most(4), **fields}))
        (only,) = {message.fingerprint for message in messages}
        return only

    first = await fingerprint()
    assert first == output_fingerprint(engine.info.fingerprint, [10, 11], SamplingParams(max_tokens=4))
    assert await fingerprint(drafting=parameters_pb2.DraftingOptions(enabled=False)) == first
    assert await fingerprint(output=parameters_pb2.OutputOptions(logprobs=1), cache_salt="x") == first
    assert await fingerprint(sampling=parameters_pb2.SamplingParameters(seed=1)) != first
    assert await fingerprint(prompt=ids_prompt([10, 12])) != first


async def test_the_three_forms_of_a_prompt(generate: Generate, scripted: ScriptedEngine, engine: Engine) -> None:
    chat = parameters_pb2.ChatMessages(messages=[parameters_pb2.ChatMessage(role="user", content="hi")])
    for prompt in (
        parameters_pb2.Prompt(text="a"),
        ids_prompt([10, 11]),
        parameters_pb2.Prompt(messages=chat),
        parameters_pb2.Prompt(text="a" * 20_000 if engine.info.max_context > 20_001 else "a" * 4000),
    ):
        await messages_of(generate(prompt=prompt, stop=at_most(1)))
    assert [request.prompt for request in scripted.requests] == [
        [BOS, 101],
        [10, 11],
        engine.encode_prompt([{"role": "user", "content": "hi"}]),
        [BOS] + [101] * 4000,
    ]


async def test_every_parameter_reaches_the_core(generate: Generate, scripted: ScriptedEngine) -> None:
    call = generate(
        prompt=ids_prompt([10]),
        sampling=parameters_pb2.SamplingParameters(temperature=0.5, top_k=3, logit_bias={5: 1.5}, seed=2**64 - 1),
        stop=parameters_pb2.StopConditions(max_tokens=3, strings=["é"], token_ids=[9], ignore_end_tokens=True),
        drafting=parameters_pb2.DraftingOptions(enabled=False, max_length=2),
        output=parameters_pb2.OutputOptions(logprobs=2),
        cache_salt="tenant",
        model="fake-model",
    )
    await messages_of(call)
    sent = scripted.requests[-1]
    assert (sent.temperature, sent.top_k, sent.logit_bias, sent.seed) == (0.5, 3, {5: 1.5}, 2**64 - 1)
    assert (sent.max_tokens, sent.stop_strings, sent.stop_token_ids, sent.ignore_eos) == (3, ["é".encode()], [9], True)
    assert (sent.drafting, sent.max_draft_length, sent.logprobs, sent.salt) == (False, 2, 2, "tenant")


async def test_log_probabilities_and_bytes(generate: Generate) -> None:
    output = parameters_pb2.OutputOptions(logprobs=2, token_bytes=True)
    messages = await messages_of(generate(prompt=ids_prompt([101, EOS + 1]), stop=at_most(2), output=output))
    assert [list(message.token_bytes) for message in messages] == [[b"a", b""]]
    assert [len(entry.top) for entry in messages[0].logprobs] == [2, 2]


async def test_a_stop_string_is_never_sent(generate: Generate, scripted: ScriptedEngine) -> None:
    text = b"one EN two END three"
    scripted.next_token = lambda request, index: 4 + text[index]
    stop = parameters_pb2.StopConditions(strings=["END"])
    messages = await messages_of(generate(prompt=ids_prompt([10]), stop=stop))
    assert text_of(messages) == "one EN two "
    assert messages[-1].finish_reason == output_pb2.FINISH_REASON_STOP


async def test_without_max_tokens_the_context_is_the_limit(generate: Generate) -> None:
    messages = await messages_of(generate(prompt=ids_prompt([10] * 4090)))
    assert len(tokens_of(messages)) == 6
    assert messages[-1].finish_reason == output_pb2.FINISH_REASON_LENGTH


async def test_many_streams_at_the_same_time(generate: Generate) -> None:
    calls = [generate(prompt=ids_prompt([10 + i, 11 + i]), stop=at_most(30 + i)) for i in range(40)]
    for i, messages in enumerate(await asyncio.gather(*map(messages_of, calls))):
        assert tokens_of(messages) == ([10 + i, 11 + i] * 40)[: 30 + i]


# --- what is refused -------------------------------------------------------------------------------------------


async def refusal(call: Any) -> tuple[grpc.StatusCode, Any]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await messages_of(call)
    return caught.value.code(), rpc_status.from_call(caught.value)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "prompt"),
        ({"prompt": ids_prompt([])}, "prompt"),
        ({"prompt": ids_prompt([10, VOCABULARY])}, "prompt.token_ids.ids[1]"),
        ({"prompt": ids_prompt([10] * 5000)}, "prompt.token_ids.ids"),
        ({"prompt": {"messages": {}}}, "prompt.messages.messages"),
        ({"prompt": ids_prompt([10]), "stop": at_most(0)}, "stop.max_tokens"),
        ({"prompt": ids_prompt([10]), "stop": {"strings": ["ok", ""]}}, "stop.strings[1]"),
        ({"prompt": ids_prompt([10]), "output": {"logprobs": 21}}, "output.logprobs"),
        ({"prompt": ids_prompt([10]), "cache_salt": "x" * 257}, "cache_salt"),
        ({"prompt": ids_prompt([10]), "drafting": {"max_length": -1}}, "drafting.max_length"),
    ],
)
async def test_invalid_requests_name_the_field(generate: Generate, fields: dict[str, Any], path: str) -> None:
    code, status = await refusal(generate(**fields))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    detail = error_details_pb2.BadRequest()
    assert [v.field for any_ in status.details if any_.Unpack(detail) for v in detail.field_violations] == [path]
    assert status.message.startswith(f"{path} = ")


async def test_another_model_is_not_found(generate: Generate) -> None:
    code, status = await refusal(generate(prompt=ids_prompt([10]), model="llama"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "fake-model" in status.message


async def test_a_full_queue_is_told_before_anything_is_sent(
    generate: Generate, scripted: ScriptedEngine, figures: dict[str, Any]
) -> None:
    scripted.refuse_with = CoreQueueFull("the queue holds 5 tokens")
    call = generate(prompt=ids_prompt([10]))
    code, status = await refusal(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert any(any_.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for any_ in status.details)
    # A client retries transparently only what has no initial metadata yet.
    assert "x-request-id" not in dict(await call.initial_metadata() or ())


async def test_a_failure_in_the_engine_is_internal(generate: Generate, scripted: ScriptedEngine) -> None:
    scripted.fail_with = "out of smoke"
    code, status = await refusal(generate(prompt=ids_prompt([10])))
    assert code is grpc.StatusCode.INTERNAL
    assert "out of smoke" in status.message


# --- the end of a call -----------------------------------------------------------------------------------------


async def test_a_cancelled_call_ends_its_generation(generate: Generate, scripted: ScriptedEngine) -> None:
    hold_after(scripted, 2)
    call = generate(prompt=ids_prompt([10]))
    assert list((await call.read()).token_ids) == [10, 10]
    assert not scripted.cancelled
    call.cancel()
    await eventually(lambda: scripted.cancelled == [1])


async def test_a_deadline_ends_its_generation(generate: Generate, scripted: ScriptedEngine) -> None:
    hold_after(scripted, 2)
    code, _ = await refusal(generate(prompt=ids_prompt([10]), timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: scripted.cancelled == [1])


async def test_a_client_that_does_not_read_pauses_its_own_sequence_only(
    generate: Generate, scripted: ScriptedEngine
) -> None:
    heavy = parameters_pb2.OutputOptions(logprobs=20, token_bytes=True)
    slow = generate(prompt=ids_prompt([10, 11]), stop=at_most(4000), output=heavy)
    await eventually(lambda: scripted.pauses == [1])
    assert len(tokens_of(await messages_of(generate(prompt=ids_prompt([12]), stop=at_most(50))))) == 50
    assert len(tokens_of(await messages_of(slow))) == 4000
    assert scripted.resumes


async def test_a_model_without_tokenizer(checkpoint: FakeCheckpoint, inprocess_server: Any) -> None:
    checkpoint.tokenizer = None
    with Engine("fake") as engine:
        async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
            stub: Any = generation_pb2_grpc.GenerationStub(channel)
            output = parameters_pb2.OutputOptions(token_bytes=True)
            request = GenerateRequest(prompt=ids_prompt([10]), stop=at_most(2), output=output)
            messages = await messages_of(stub.Generate(request, timeout=TIMEOUT))
            assert (tokens_of(messages), text_of(messages), list(messages[0].token_bytes)) == ([10, 10], "", [])
