"""The service Models over a real port and a scripted core."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from session_client import TIMEOUT, ids_prompt

import draftwerk
from draftwerk import Engine
from draftwerk_client.v1 import models_pb2 as pb
from draftwerk_client.v1 import models_pb2_grpc, parameters_pb2
from fake_checkpoint import BOS, EOS, VOCABULARY, FakeCheckpoint


@pytest.fixture
async def models(engine: Engine, inprocess_server: Any) -> AsyncIterator[models_pb2_grpc.ModelsStub]:
    async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield models_pb2_grpc.ModelsStub(channel)


async def tokenize(models: Any, prompt: parameters_pb2.Prompt, **fields: Any) -> pb.TokenizeResponse:
    response: pb.TokenizeResponse = await models.Tokenize(pb.TokenizeRequest(prompt=prompt, **fields), timeout=TIMEOUT)
    return response


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, message and violated field of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    detail = error_details_pb2.BadRequest()
    fields = [v.field for any_ in status.details if any_.Unpack(detail) for v in detail.field_violations]
    return caught.value.code(), status.message, "".join(fields)


@pytest.mark.parametrize("name", ["", "fake-model"])
async def test_get_model(models: Any, engine: Engine, name: str) -> None:
    model = (await models.GetModel(pb.GetModelRequest(name=name), timeout=TIMEOUT)).model
    assert model == pb.Model(
        name="fake-model",
        architecture="gemma3",
        backend="fake backend",
        drafter="lookup",
        vocabulary_size=VOCABULARY,
        max_context=4096,
        end_token_ids=[EOS],
        has_tokenizer=True,
        has_chat_template=True,
        fingerprint=engine.info.fingerprint,
        weight_bytes=1234,
        server_version=draftwerk.__version__,
    )
    assert model.fingerprint != 0


async def test_another_model_is_not_found(models: Any) -> None:
    code, message, _ = await refusal(models.GetModel(pb.GetModelRequest(name="llama"), timeout=TIMEOUT))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "llama" in message
    assert "fake-model" in message


async def test_tokenize(models: Any, engine: Engine) -> None:
    response = await tokenize(models, parameters_pb2.Prompt(text="aé"))
    assert list(response.token_ids) == [BOS, 101, 4 + 0xC3, 4 + 0xA9]
    assert list(response.token_bytes) == [b"", b"a", b"\xc3", b"\xa9"]
    assert list((await tokenize(models, parameters_pb2.Prompt(text="a"), no_bos=True)).token_ids) == [101]
    assert list((await tokenize(models, ids_prompt([5, 101]))).token_bytes) == [b"\x01", b"a"]
    message = parameters_pb2.ChatMessage(role="user", content="hi")
    chat = await tokenize(models, parameters_pb2.Prompt(messages=parameters_pb2.ChatMessages(messages=[message])))
    assert list(chat.token_ids) == engine.encode_prompt([{"role": "user", "content": "hi"}])


async def test_a_long_text(models: Any) -> None:
    response = await tokenize(models, parameters_pb2.Prompt(text="ab" * 20_000))
    assert len(response.token_ids) == len(response.token_bytes) == 40_001
    text = (await models.Detokenize(pb.DetokenizeRequest(token_ids=response.token_ids), timeout=TIMEOUT)).text
    assert text == "ab" * 20_000


async def test_detokenize(models: Any) -> None:
    request = pb.DetokenizeRequest(token_ids=[BOS, 101, 4 + 0xC3, 4 + 0xA9, EOS, 4 + 0xC3])
    assert (await models.Detokenize(request, timeout=TIMEOUT)).text == "aé\ufffd"
    assert (await models.Detokenize(pb.DetokenizeRequest(), timeout=TIMEOUT)).text == ""


async def test_what_is_wrong_is_named(models: Any) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    code, _, field = await refusal(models.Detokenize(pb.DetokenizeRequest(token_ids=[5, VOCABULARY]), timeout=TIMEOUT))
    assert (code, field) == (invalid, "token_ids[1]")
    code, _, field = await refusal(tokenize(models, ids_prompt([-1])))
    assert (code, field) == (invalid, "prompt.token_ids.ids[0]")
    code, _, field = await refusal(tokenize(models, parameters_pb2.Prompt()))
    assert (code, field) == (invalid, "prompt")
    newer = pb.GetModelRequest.FromString(b"\xf2\x3f\x00")
    code, message, field = await refusal(models.GetModel(newer, timeout=TIMEOUT))
    assert (code, field) == (invalid, "1022")
    assert "the client is newer" in message


async def test_a_model_without_tokenizer(checkpoint: FakeCheckpoint, inprocess_server: Any) -> None:
    checkpoint.tokenizer = None
    with Engine("fake") as engine:
        async with inprocess_server(engine) as server, grpc.aio.insecure_channel(server.address) as channel:
            models: Any = models_pb2_grpc.ModelsStub(channel)
            model = (await models.GetModel(pb.GetModelRequest(), timeout=TIMEOUT)).model
            assert (model.has_tokenizer, model.has_chat_template) == (False, False)
            code, _, field = await refusal(tokenize(models, parameters_pb2.Prompt(text="a")))
            assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "prompt.text")
            code, _, field = await refusal(models.Detokenize(pb.DetokenizeRequest(token_ids=[5]), timeout=TIMEOUT))
            assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "token_ids")
            response = await tokenize(models, ids_prompt([5, 6]))
            assert (list(response.token_ids), list(response.token_bytes)) == ([5, 6], [])
