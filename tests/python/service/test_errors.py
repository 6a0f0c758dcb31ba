"""Errors as statuses: codes, details, sizes, and what of them may be logged."""

from __future__ import annotations

import re

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from draftwerk.requests import EngineClosed, EngineFailed, QueueFull, RequestError, SamplingParams
from draftwerk.results import GenerationError
from draftwerk.server import errors
from draftwerk_client.v1 import errors_pb2
from draftwerk_client.v1.generation_pb2 import GenerateRequest

SECRET = "the patient's diagnosis"


def detail(status: status_pb2.Status, kind: type) -> object | None:
    found = kind()
    return found if any(packed.Unpack(found) for packed in status.details) else None


CASES = [
    (RequestError("temperature", -1.0, "0 to 100"), code_pb2.INVALID_ARGUMENT, "sampling.temperature = -1.0"),
    (errors.InvalidField("prompt", "absent", "text"), code_pb2.INVALID_ARGUMENT, "prompt = absent: must be text"),
    (errors.OutOfOrder("it generates", "branch 0", "interrupt it"), code_pb2.FAILED_PRECONDITION, "interrupt it"),
    (errors.ModelNotFound("gpt", "gemma"), code_pb2.NOT_FOUND, "'gpt' is not served here"),
    (QueueFull("12 tokens wait"), code_pb2.RESOURCE_EXHAUSTED, "12 tokens wait; try again in 1.0 s"),
    (MemoryError(), code_pb2.RESOURCE_EXHAUSTED, "out of memory"),
    (EngineClosed("closed"), code_pb2.UNAVAILABLE, "shutting down"),
    (EngineFailed("no GPU"), code_pb2.UNAVAILABLE, "the server has to be started anew: no GPU"),
    (errors.ShuttingDown("it ends"), code_pb2.UNAVAILABLE, "it ends"),
    (GenerationError("request 3 failed: NaN"), code_pb2.INTERNAL, "request 3 failed: NaN"),
    (ZeroDivisionError(SECRET), code_pb2.INTERNAL, "the server's log has the cause under request r1"),
]


@pytest.mark.parametrize(("error", "code", "message"), CASES, ids=lambda value: type(value).__name__)
def test_each_error_has_its_code_and_says_what_happened(error: Exception, code: int, message: str) -> None:
    status = errors.status_of(error, "r1")
    assert status.code == code
    assert message in status.message
    info = detail(status, error_details_pb2.RequestInfo)
    assert isinstance(info, error_details_pb2.RequestInfo)
    assert info.request_id == "r1"


@pytest.mark.parametrize("error", [RequestError("top_p", 2, "0 to 1"), errors.InvalidField("a.b", 2, "0 to 1")])
def test_a_wrong_field_is_named(error: Exception) -> None:
    bad = detail(errors.status_of(error, "r1"), error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    (violation,) = bad.field_violations
    assert violation.field == ("sampling.top_p" if isinstance(error, RequestError) else "a.b")
    assert violation.description == "2: must be 0 to 1"


def test_an_action_out_of_order_names_subject_and_remedy() -> None:
    status = errors.status_of(errors.OutOfOrder("it generates", "branch 4", "interrupt it"), "r1")
    failure = detail(status, error_details_pb2.PreconditionFailure)
    assert isinstance(failure, error_details_pb2.PreconditionFailure)
    (violation,) = failure.violations
    assert (violation.type, violation.subject, violation.description) == ("SESSION_STATE", "branch 4", "interrupt it")


@pytest.mark.parametrize("error", [error for error, code, _ in CASES])
def test_only_what_may_pass_has_a_retry_delay(error: Exception) -> None:
    delay = errors.retry_delay_of(errors.status_of(error, "r1", 2.5))
    may_pass = isinstance(error, (QueueFull, MemoryError, EngineClosed, EngineFailed, errors.ShuttingDown))
    assert delay == (2.5 if may_pass else None)


@pytest.mark.parametrize("name", SamplingParams.__dataclass_fields__)
def test_every_parameter_has_its_place_in_the_proto(name: str) -> None:
    message, *rest = errors.proto_path(name).split(".")
    field = GenerateRequest.DESCRIPTOR.fields_by_name[message]
    for part in rest:
        field = field.message_type.fields_by_name[part]


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("prompt", "prompt"),
        ("prompt[3]", "prompt.token_ids.ids[3]"),
        ("logit_bias[7]", "sampling.logit_bias[7]"),
        ("stop[0]", "stop.strings[0]"),
        ("stop_token_ids[2]", "stop.token_ids[2]"),
        ("messages", "prompt.messages"),
        ("token_ids", "token_ids"),
        ("", ""),
    ],
)
def test_paths(field: str, path: str) -> None:
    assert errors.proto_path(field) == path


def test_a_long_value_fits_in_a_trailer() -> None:
    status = errors.status_of(RequestError("prompt", "🙂" * 100_000, "shorter"), "x" * 128)
    percent_encoded = len(re.sub(r"[^ -~]", "", status.message)) + 3 * sum(len(c.encode()) for c in status.message)
    assert len(status.SerializeToString()) * 4 / 3 + percent_encoded < 8192


def test_values_that_are_no_text_are_escaped() -> None:
    assert "\\udc80" in errors.status_of(RequestError("stop", "\udc80", "text"), "r1").message


@pytest.mark.parametrize(
    "error",
    [
        RequestError("prompt", SECRET, f"what the template takes: {SECRET}"),
        errors.InvalidField("prompt.messages", SECRET, "text"),
        errors.ModelNotFound(SECRET, "gemma"),
        KeyError(SECRET),
    ],
)
def test_the_log_gets_nothing_that_the_client_sent(error: Exception) -> None:
    logged = errors.for_log(error)
    assert logged
    assert SECRET not in logged


def test_a_status_reads_the_same_inside_a_stream() -> None:
    status = errors.status_of(QueueFull("full"), "r1", 0.25)
    inside = errors.to_proto(status)
    assert (inside.code, inside.message) == (status.code, status.message)
    retry = errors_pb2.RetryInfo.FromString(inside.details[0].value)
    assert inside.details[0].type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert retry.retry_delay.ToMilliseconds() == 250
