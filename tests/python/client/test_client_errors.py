"""Errors as exceptions: of the server, of the connection, and of values that cannot be sent."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest
from scripted_server import ScriptedServer, piece, refusing, status

from draftwerk_client import (
    Client,
    DraftwerkError,
    FieldViolation,
    InvalidRequest,
    NotFound,
    OutOfOrder,
    QueueFull,
    ServerError,
    Unavailable,
)
from draftwerk_client.errors import CallContext, from_status
from draftwerk_client.v1 import errors_pb2, models_pb2, operations_pb2

CONTEXT = CallContext("r1", "127.0.0.1:50051", None)
REQUEST_INFO = errors_pb2.RequestInfo(request_id="of the server")


def retry_info(seconds: float) -> errors_pb2.RetryInfo:
    info = errors_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(round(seconds * 1e3))
    return info


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFull),
        (grpc.StatusCode.FAILED_PRECONDITION, OutOfOrder),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNAUTHENTICATED, ServerError),
    ],
)
def test_each_code_has_its_exception(
    client: Any, server: ScriptedServer, code: grpc.StatusCode, expected: type[DraftwerkError]
) -> None:
    server.generate = refusing(status(code, "what happened", REQUEST_INFO))
    with pytest.raises(DraftwerkError) as caught:
        client.generate("x")
    assert type(caught.value) is expected
    assert caught.value.code is code
    assert caught.value.request_id == "of the server"
    assert str(caught.value).splitlines()[-1] == "  request id: of the server"
    assert "what happened" in str(caught.value)
    with pytest.raises(expected, match="what happened"):
        list(client.stream("x"))


def test_errors_of_unary_methods_have_details_too(client: Any, server: ScriptedServer) -> None:
    server.unary[models_pb2.TokenizeRequest] = refusing(status(grpc.StatusCode.INVALID_ARGUMENT, "no", REQUEST_INFO))
    with pytest.raises(InvalidRequest, match="request id: of the server"):
        client.tokenize("x")


def test_violations_name_the_fields(client: Any, server: ScriptedServer) -> None:
    violations = errors_pb2.BadRequest()
    violations.field_violations.add(field="sampling.top_p", description="2: must be 0 to 1")
    violations.field_violations.add(field="stop.max_tokens", description="0: must be 1 or more")
    server.generate = refusing(
        status(grpc.StatusCode.INVALID_ARGUMENT, "sampling.top_p = 2: must be 0 to 1", violations, REQUEST_INFO)
    )
    with pytest.raises(InvalidRequest) as caught:
        client.generate("x", top_p=2)
    assert caught.value.violations == (
        FieldViolation("sampling.top_p", "2: must be 0 to 1"),
        FieldViolation("stop.max_tokens", "0: must be 1 or more"),
    )
    assert str(caught.value) == (  # the first is in the message already
        "sampling.top_p = 2: must be 0 to 1\n  stop.max_tokens: 0: must be 1 or more\n  request id: of the server"
    )
    assert isinstance(caught.value, ValueError)


def test_retry_after_is_in_seconds(client: Any, server: ScriptedServer) -> None:
    server.generate = refusing(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_info(1.5)))
    with pytest.raises(QueueFull) as caught:
        client.generate("x", request_id="mine")
    assert caught.value.retry_after == 1.5
    assert caught.value.request_id == "mine"  # the server did not name it


def test_details_of_draftwerks_own_package_are_understood() -> None:
    made = errors_pb2.Status(code=14, message="gone")
    made.details.add().Pack(retry_info(0.25))
    assert made.details[0].type_url.endswith("draftwerk.v1.RetryInfo")
    error = from_status(made, CONTEXT)
    assert isinstance(error, Unavailable) and error.retry_after == 0.25


def test_remedies_follow_the_message() -> None:
    failure = errors_pb2.PreconditionFailure()
    failure.violations.add(type="SESSION_STATE", subject="branch 0", description="interrupt it first")
    error = from_status(status(grpc.StatusCode.FAILED_PRECONDITION, "branch 0 is generating", failure), CONTEXT)
    assert str(error) == "branch 0 is generating\n  interrupt it first\n  request id: r1"


def test_unknown_codes_and_details_are_no_obstacle() -> None:
    made = errors_pb2.Status(code=99, message="odd")
    made.details.add(type_url="type.googleapis.com/google.rpc.Help", value=b"\xff\xff")
    error = from_status(made, CONTEXT)
    assert type(error) is ServerError and error.code is grpc.StatusCode.UNKNOWN


def test_damaged_details_leave_code_and_message(client: Any, server: ScriptedServer) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "not here")

    server.generate = script
    with pytest.raises(NotFound, match="not here"):
        client.generate("x")


def test_an_error_after_the_first_message(client: Any, server: ScriptedServer) -> None:
    def script(request: Any, context: grpc.ServicerContext) -> Any:
        yield piece("a", 1)
        refusing(status(grpc.StatusCode.INTERNAL, "the engine failed"))(request, context)

    server.generate = script
    with client.stream("x") as stream:
        assert next(stream).text == "a"
        with pytest.raises(ServerError, match="INTERNAL: the engine failed"):
            next(stream)
        with pytest.raises(ServerError):
            stream.completion()


def test_nobody_listens(make_client: Any, server: ScriptedServer) -> None:
    server.stop()
    client = make_client(server.address, retries=0)
    with pytest.raises(Unavailable) as caught:
        client.generate("x")
    assert server.address in str(caught.value) and "draftwerk serve" in str(caught.value)
    with pytest.raises(Unavailable):
        client.model()
    with pytest.raises(Unavailable):
        client.session().__enter__()


def test_a_method_that_the_server_does_not_have(client: Any, server: ScriptedServer) -> None:
    def script(_: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")

    server.unary[operations_pb2.GetStatsRequest] = script
    with pytest.raises(ServerError, match="operations_listen"):
        client.stats()


def test_a_request_that_is_too_large(make_client: Any) -> None:
    server = ScriptedServer(max_message_bytes=1000)
    try:
        with pytest.raises(InvalidRequest, match="max-message-bytes") as caught:
            make_client(server.address, retries=0).generate("x" * 2000)
        assert caught.value.violations[0].field == "prompt"
    finally:
        server.stop()


def test_exceptions_survive_pickling() -> None:
    violations = (FieldViolation("a", "b"),)
    for error in (
        InvalidRequest("m", grpc.StatusCode.INVALID_ARGUMENT, "r", violations),
        QueueFull("m", grpc.StatusCode.RESOURCE_EXHAUSTED, "r", 2.0),
        ServerError("m", grpc.StatusCode.INTERNAL, "r"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and vars(copy) == vars(error) and str(copy) == str(error)


# --- values that cannot be sent: said before anything is sent ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field", "description"),
    [
        ({"max_tokens": 2**31}, "stop.max_tokens", "2147483648: must be 1 to 2147483647"),
        ({"top_k": 2**31}, "sampling.top_k", "2147483648: must be 0 to 2147483647"),
        ({"max_tokens": 2.5}, "stop.max_tokens", "2.5: must be an integer"),
        ({"max_tokens": True}, "stop.max_tokens", "True: must be an integer"),
        ({"seed": -1}, "sampling.seed", "-1: must be 0 to 18446744073709551615"),
        ({"temperature": "hot"}, "sampling.temperature", "'hot': must be a number"),
        ({"temperature": 10**400}, "sampling.temperature", "must be a number"),
        ({"logit_bias": [1]}, "sampling.logit_bias", "[1]: must be a mapping from token id to number"),
        ({"logit_bias": {7: None}}, "sampling.logit_bias[7]", "None: must be a number"),
        ({"stop": "\n"}, "stop.strings", "'\\n': must be a sequence of strings"),
        ({"stop": ["a", 1]}, "stop.strings[1]", "1: must be a string"),
        ({"stop": ["\ud800"]}, "stop.strings[0]", "'\\ud800': must be valid Unicode text"),
        ({"stop_token_ids": [1, -1, 2**40]}, "stop.token_ids[1]", "-1: must be 0 to 2147483647"),
        ({"salt": b"x"}, "cache_salt", "b'x': must be a string"),
        ({"timeout": 0}, "timeout", "0: must be more than 0 seconds; math.inf for no limit"),
        ({"request_id": ""}, "request_id", "'': must be 1 to 128 printable ASCII characters"),
        ({"request_id": "a\nb"}, "request_id", "'a\\nb': must be 1 to 128 printable ASCII characters"),
    ],
)
def test_wrong_values(client: Any, server: ScriptedServer, options: Any, field: str, description: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        client.generate("x", **options)
    assert caught.value.violations[0].field == field
    assert caught.value.violations[0].description.endswith(description)
    assert caught.value.request_id == ""
    assert server.calls == 0


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"),
        (5, "prompt"),
        (b"bytes", "prompt"),
        ({"role": "user", "content": "x"}, "prompt"),
        ("\ud800", "prompt.text"),
        ([1, "2"], "prompt.token_ids.ids[1]"),
        ([1, 2**31], "prompt.token_ids.ids[1]"),
        ([1.0], "prompt.token_ids.ids[0]"),
        ([{"role": "user"}], "prompt.messages.messages[0]"),
        ([{"role": "user", "content": "x", "nmae": "y"}], "prompt.messages.messages[0]"),
        ([{"role": "user", "content": "x"}, 7], "prompt.messages.messages[1]"),
        ([{"role": "user", "content": 7}], "prompt.messages.messages[0].content"),
    ],
)
def test_wrong_prompts(prompt: Any, field: str) -> None:
    with Client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate(prompt)
    assert caught.value.violations[0].field == field


def test_long_values_are_cut_in_messages() -> None:
    with Client() as client, pytest.raises(InvalidRequest) as caught:
        client.generate("x", stop="long" * 10_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "hint"),
    [("temprature", "did you mean temperature"), ("max_token", "did you mean max_tokens"), ("zzz", "known are")],
)
def test_unknown_options_name_those_that_are_near(client: Any, name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=hint):
        client.generate("x", **{name: 1})
    with pytest.raises(TypeError, match=hint):
        client.session(**{name: 1})
