"""Every way in which a call can fail: its code, Google's details with it, and the id that finds it in the log."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from conformance.served import ENDLESS, MAX_CONTEXT, Failure, Served, failure_of, serve, wait_for
from conformance.sessions import Actions, token_prompt, tokens_of
from draftwerk_client.v1 import generation_pb2, models_pb2, output_pb2, parameters_pb2, session_pb2
from service.serve_process import TIMEOUT

Action = session_pb2.SessionRequest


def call_failure(method: Any, request: Any, **options: Any) -> Failure:
    """How a call of either kind fails."""
    options.setdefault("timeout", TIMEOUT)
    with pytest.raises(grpc.RpcError) as raised:
        answer = method(request, **options)
        list(answer)
    error: Any = raised.value
    failure = failure_of(error)
    metadata = {**dict(error.initial_metadata() or ()), **dict(error.trailing_metadata())}
    assert failure.request_id
    assert metadata["x-request-id"] == failure.request_id
    return failure


# --- INVALID_ARGUMENT --------------------------------------------------------------------------------------------

# A request as JSON, and the path of the field that is wrong in it.
INVALID: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": {"token_ids": {}}}, "prompt"),
    ({"prompt": {"token_ids": {"ids": [2, 320, 3]}}}, "prompt.token_ids.ids[1]"),
    ({"prompt": {"token_ids": {"ids": [2, 3, -1]}}}, "prompt.token_ids.ids[2]"),
    ({"prompt": {"token_ids": {"ids": [2] * (MAX_CONTEXT + 1)}}}, "prompt.token_ids.ids"),
    ({"prompt": {"messages": {}}}, "prompt.messages.messages"),
    ({"sampling": {"temperature": -0.5}}, "sampling.temperature"),
    ({"sampling": {"temperature": 101.0}}, "sampling.temperature"),
    ({"sampling": {"temperature": "NaN"}}, "sampling.temperature"),
    ({"sampling": {"temperature": "Infinity"}}, "sampling.temperature"),
    ({"sampling": {"top_k": -1}}, "sampling.top_k"),
    ({"sampling": {"top_p": 1.5}}, "sampling.top_p"),
    ({"sampling": {"top_p": "NaN"}}, "sampling.top_p"),
    ({"sampling": {"min_p": -0.1}}, "sampling.min_p"),
    ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
    ({"sampling": {"presence_penalty": "NaN"}}, "sampling.presence_penalty"),
    ({"sampling": {"frequency_penalty": "-Infinity"}}, "sampling.frequency_penalty"),
    ({"sampling": {"logit_bias": {"320": 1.0}}}, "sampling.logit_bias"),
    ({"sampling": {"logit_bias": {"-1": 1.0}}}, "sampling.logit_bias"),
    ({"sampling": {"logit_bias": {"5": "NaN"}}}, "sampling.logit_bias[5]"),
    ({"stop": {"max_tokens": 0}}, "stop.max_tokens"),
    ({"stop": {"max_tokens": -3}}, "stop.max_tokens"),
    ({"stop": {"min_tokens": -1}}, "stop.min_tokens"),
    ({"stop": {"strings": ["a", ""]}}, "stop.strings[1]"),
    ({"stop": {"token_ids": [3, 320]}}, "stop.token_ids[1]"),
    ({"stop": {"token_ids": [-1]}}, "stop.token_ids[0]"),
    ({"drafting": {"max_length": -1}}, "drafting.max_length"),
    ({"output": {"logprobs": -1}}, "output.logprobs"),
    ({"output": {"logprobs": 21}}, "output.logprobs"),
    ({"cache_salt": "s" * 257}, "cache_salt"),
]


def request_of(fields: dict[str, Any]) -> generation_pb2.GenerateRequest:
    wrong_prompt = fields == {} or "prompt" in fields
    values = fields if wrong_prompt else {"prompt": {"token_ids": {"ids": [2]}}, **fields}
    return json_format.ParseDict(values, generation_pb2.GenerateRequest())


@pytest.mark.parametrize(("fields", "path"), INVALID, ids=[str(fields)[:70] for fields, _ in INVALID])
def test_generate_names_the_field(server: Served, fields: dict[str, Any], path: str) -> None:
    failure = call_failure(server.generation.Generate, request_of(fields))
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.fields == (path,)
    assert path in failure.message
    assert "must be" in failure.descriptions[0]
    assert failure.retry_delay is None


def test_a_field_of_a_newer_proto_is_refused(server: Served) -> None:
    """It might change the output: leaving it out would give another answer than the client asked for."""
    plain = generation_pb2.GenerateRequest(prompt=token_prompt([2]))
    nested = generation_pb2.GenerateRequest(prompt=token_prompt([2]))
    nested.sampling.MergeFromString(b"\xc0\x3e\x01")  # field 1000, varint 1
    for data in (plain.SerializeToString() + b"\xc0\x3e\x01", nested.SerializeToString()):
        call: Any = server.channel.unary_stream(
            "/draftwerk.v1.Generation/Generate", response_deserializer=output_pb2.GenerateResponse.FromString
        )
        failure = call_failure(call, data)
        assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "1000" in failure.fields[0] + failure.message
        assert "newer" in failure.message


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (models_pb2.TokenizeRequest(), "prompt"),
        (models_pb2.TokenizeRequest(prompt=token_prompt([320])), "prompt.token_ids.ids[0]"),
        (models_pb2.DetokenizeRequest(token_ids=[3, -1]), "token_ids[1]"),
        (models_pb2.DetokenizeRequest(token_ids=[320]), "token_ids[0]"),
    ],
    ids=["no prompt", "unknown token", "negative token", "token too large"],
)
def test_models_name_the_field(server: Served, request_: Any, path: str) -> None:
    method = server.models.Tokenize if isinstance(request_, models_pb2.TokenizeRequest) else server.models.Detokenize
    failure = call_failure(method, request_)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.fields == (path,)


# --- NOT_FOUND ---------------------------------------------------------------------------------------------------


def test_another_model_is_not_found(server: Served) -> None:
    failures = [
        call_failure(server.models.GetModel, models_pb2.GetModelRequest(name="gemma-9000")),
        call_failure(
            server.generation.Generate,
            generation_pb2.GenerateRequest(prompt=token_prompt([2]), model="gemma-9000"),
        ),
    ]
    for failure in failures:
        assert failure.code is grpc.StatusCode.NOT_FOUND
        assert "gemma-9000" in failure.message and "tiny" in failure.message


def test_an_unknown_method_is_unimplemented(server: Served) -> None:
    imagine: Any = server.channel.unary_unary("/draftwerk.v1.Generation/Imagine")
    with pytest.raises(grpc.RpcError) as raised:
        imagine(b"", timeout=TIMEOUT)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- in sessions -------------------------------------------------------------------------------------------------


def fresh(_: Actions) -> None:
    """Nothing was sent."""


def opened(session: Actions) -> None:
    session.open(stop=ENDLESS)


def filled(session: Actions) -> None:
    opened(session)
    session.append([2, 20])


def generating(session: Actions) -> None:
    filled(session)
    next(session.chunks(session.start()))


def closed(session: Actions) -> None:
    filled(session)
    session.answer(Action.Close())


OUT_OF_ORDER: dict[str, tuple[Callable[[Actions], None], Any, int]] = {
    "generate from nothing": (opened, Action.Generate(), 0),
    "interrupt without generation": (filled, Action.Interrupt(), 0),
    "inject without generation": (filled, Action.Inject(content=token_prompt([2])), 0),
    "append while it generates": (generating, Action.Append(content=token_prompt([2])), 0),
    "generate while it generates": (generating, Action.Generate(), 0),
    "a branch that was closed": (closed, Action.Generate(), 0),
    "a branch that never was": (filled, Action.Fork(), 7),
}


@pytest.mark.parametrize("name", OUT_OF_ORDER)
def test_actions_out_of_order(session: Actions, name: str) -> None:
    """They are answered with an error, and the session goes on."""
    prepare, action, branch = OUT_OF_ORDER[name]
    prepare(session)
    failure = session.failure(action, branch)
    assert failure.code is grpc.StatusCode.FAILED_PRECONDITION
    [violation] = failure.preconditions
    assert (violation.type, violation.subject) == ("SESSION_STATE", f"branch {branch}")
    assert violation.description
    assert failure.request_id == dict(session.call.initial_metadata())["x-request-id"]
    assert session.call.is_active()


SESSION_INVALID: dict[str, tuple[Callable[[Actions], None], Any, str]] = {
    "append nothing": (opened, Action.Append(), "content"),
    "append an unknown token": (opened, Action.Append(content=token_prompt([2, 320])), "content.token_ids.ids[1]"),
    "generate too cold": (
        filled,
        Action.Generate(sampling=parameters_pb2.SamplingParameters(temperature=-1.0)),
        "sampling.temperature",
    ),
    "generate without end": (
        filled,
        Action.Generate(stop=parameters_pb2.StopConditions(max_tokens=0)),
        "stop.max_tokens",
    ),
    "inject messages": (
        generating,
        Action.Inject(content=parameters_pb2.Prompt(messages=parameters_pb2.ChatMessages())),
        "content.messages",
    ),
    "fork past the end": (filled, Action.Fork(position=3), "position"),
    "fork before the start": (filled, Action.Fork(position=-1), "position"),
}


@pytest.mark.parametrize("name", SESSION_INVALID)
def test_sessions_name_the_field(session: Actions, name: str) -> None:
    """They are answered with an error, and the session goes on."""
    prepare, action, path = SESSION_INVALID[name]
    prepare(session)
    failure = session.failure(action)
    assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.fields == (path,)
    assert failure.request_id == dict(session.call.initial_metadata())["x-request-id"]
    forked = session.answer(Action.Fork(position=0))
    session.append([2, 20], forked.branch)
    stop = parameters_pb2.StopConditions(max_tokens=3, ignore_end_tokens=True)
    assert len(tokens_of(session.generate(forked.branch, stop=stop))) == 3


BROKEN_PROTOCOL: dict[str, tuple[Callable[[Actions], None], Any, dict[str, int], grpc.StatusCode]] = {
    "append before open": (
        fresh,
        Action.Append(content=token_prompt([2])),
        {},
        grpc.StatusCode.FAILED_PRECONDITION,
    ),
    "a second open": (filled, Action.Open(), {}, grpc.StatusCode.FAILED_PRECONDITION),
    "open on another branch": (fresh, Action.Open(), {"branch": 1}, grpc.StatusCode.INVALID_ARGUMENT),
    "open with wrong options": (
        fresh,
        Action.Open(output=parameters_pb2.OutputOptions(logprobs=21)),
        {},
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "open for another model": (fresh, Action.Open(model="gemma-9000"), {}, grpc.StatusCode.NOT_FOUND),
    "no action": (filled, None, {}, grpc.StatusCode.INVALID_ARGUMENT),
    "a number that does not grow": (filled, Action.Fork(), {"number": 2}, grpc.StatusCode.INVALID_ARGUMENT),
    "number zero": (fresh, Action.Open(), {"number": 0}, grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("name", BROKEN_PROTOCOL)
def test_a_broken_protocol_ends_the_session(server: Served, session: Actions, name: str) -> None:
    prepare, action, where, code = BROKEN_PROTOCOL[name]
    prepare(session)
    session.send(action, **where)
    with pytest.raises(grpc.RpcError) as raised:
        list(session.call)
    failure = failure_of(raised.value)
    assert failure.code is code
    assert bool(failure.preconditions) == (code is grpc.StatusCode.FAILED_PRECONDITION)
    assert bool(failure.fields) == (code is grpc.StatusCode.INVALID_ARGUMENT)
    assert failure.request_id
    server.wait_idle()


# --- RESOURCE_EXHAUSTED, UNAVAILABLE -----------------------------------------------------------------------------


def test_a_message_too_large(server: Served) -> None:
    request = generation_pb2.GenerateRequest(prompt=parameters_pb2.Prompt(text="a" * (5 << 20)))
    with pytest.raises(grpc.RpcError) as raised:
        list(server.generation.Generate(request, timeout=TIMEOUT))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_full_queue(crowded: Served) -> None:
    request = generation_pb2.GenerateRequest(prompt=token_prompt([2] * 40))
    failure = call_failure(crowded.generation.Generate, request)
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert failure.retry_delay is not None and 0.1 <= failure.retry_delay <= 10
    assert int(failure.trailers["grpc-retry-pushback-ms"]) == round(failure.retry_delay * 1e3)
    assert crowded.stats().requests == 32


def test_a_server_that_shuts_down(tiny_gguf: Path) -> None:
    """What runs goes on to its end; what comes is refused, and says when to try again."""
    with serve(tiny_gguf, "--kv-memory", "32MiB") as leaving:
        request = generation_pb2.GenerateRequest(prompt=token_prompt([2]), stop=ENDLESS)
        call = leaving.generation.Generate(request, timeout=TIMEOUT)
        responses = iter(call)
        got = tokens_of([next(responses)])
        leaving.process.signal(signal.SIGTERM)

        def refusal() -> grpc.RpcError | None:
            try:
                leaving.models.GetModel(models_pb2.GetModelRequest(), timeout=TIMEOUT)
            except grpc.RpcError as error:
                return error
            return None

        error = wait_for(refusal, "the server to refuse calls")
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        failure = failure_of(error)
        assert failure.retry_delay is not None and failure.retry_delay > 0
        assert failure.request_id
        got += tokens_of(responses)
        assert len(got) == ENDLESS.max_tokens
        assert leaving.process.wait() == 0


# --- DEADLINE_EXCEEDED, CANCELLED --------------------------------------------------------------------------------


def test_a_deadline_frees_the_place(server: Served) -> None:
    request = generation_pb2.GenerateRequest(prompt=token_prompt([2]), stop=ENDLESS)
    call = server.generation.Generate(request, timeout=0.05)
    with pytest.raises(grpc.RpcError) as raised:
        for _ in call:
            server.stats()  # slower than the server: the deadline comes first
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    server.wait_idle()


def test_a_cancelled_call_frees_the_place(server: Served) -> None:
    request = generation_pb2.GenerateRequest(prompt=token_prompt([2]), stop=ENDLESS)
    call = server.generation.Generate(request, timeout=TIMEOUT)
    next(iter(call))
    call.cancel()
    server.wait_idle()
    with Actions(server) as session:
        generating(session)
    server.wait_idle()


def test_the_log_has_the_ids_and_no_prompt(server: Served) -> None:
    request = generation_pb2.GenerateRequest(
        prompt=parameters_pb2.Prompt(text="wonderland"), sampling=parameters_pb2.SamplingParameters(top_p=3.0)
    )
    failure = call_failure(server.generation.Generate, request, metadata=(("x-request-id", "find-me"),))
    assert failure.request_id == "find-me"
    log = server.process.lines
    wait_for(lambda: any("find-me" in line for line in log), "the call's line in the log")
    assert not any("wonderland" in line for line in log)
