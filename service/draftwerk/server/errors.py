"""From exceptions to gRPC statuses with google.rpc details, for the trailers of a call and for errors in a stream."""

from __future__ import annotations

import re

from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from draftwerk.requests import EngineClosed, EngineFailed, QueueFull, RequestError
from draftwerk.results import GenerationError
from draftwerk_client.v1 import errors_pb2

RETRY_DELAY = 1.0
"""Seconds after which to try again, where nothing better is known."""

# gRPC refuses trailers of more than 8 KiB. A message is in there three times, percent-encoded once.
_MAX_MESSAGE_CHARACTERS = 300

_PROTO_PATHS = {
    "prompt": "prompt",
    "messages": "prompt.messages",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "logit_bias": "sampling.logit_bias",
    "seed": "sampling.seed",
    "max_tokens": "stop.max_tokens",
    "min_tokens": "stop.min_tokens",
    "stop": "stop.strings",
    "stop_token_ids": "stop.token_ids",
    "ignore_eos": "stop.ignore_end_tokens",
    "drafting": "drafting.enabled",
    "max_draft_length": "drafting.max_length",
    "logprobs": "output.logprobs",
    "special_tokens": "output.special_tokens",
    "salt": "cache_salt",
}


class InvalidField(Exception):
    """A field of a message that cannot be what it is. Its path, its value as a person may read it, what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value}: must be {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class OutOfOrder(Exception):
    """An action that does not fit the state of its session.

    Args:
        message: what happened.
        subject: what it is about, such as "branch 0".
        remedy: what to do about it.
    """

    def __init__(self, message: str, subject: str, remedy: str) -> None:
        super().__init__(message)
        self.subject = subject
        self.remedy = remedy


class ModelNotFound(Exception):
    """A request for a model that is not the one served."""

    def __init__(self, wanted: str, served: str) -> None:
        super().__init__(f"model {wanted!r} is not served here: leave the field empty or ask for {served!r}")


class ShuttingDown(Exception):
    """The server ends: it takes no new calls, or has ended this one."""


def proto_path(field: str) -> str:
    """Where a field of SamplingParams, or "prompt[3]", is in a GenerateRequest."""
    name, index = re.fullmatch(r"(\w*)(.*)", field, re.DOTALL).groups()  # type: ignore[union-attr]
    if name == "prompt" and index:
        return f"prompt.token_ids.ids{index}"
    return _PROTO_PATHS.get(name, name) + index


def status_of(error: BaseException, request_id: str, retry_delay: float = RETRY_DELAY) -> status_pb2.Status:
    """The status that tells a client of an error.

    Args:
        error: any exception; of those that are not foreseen here the client learns only the request id.
        request_id: goes into RequestInfo.
        retry_delay: seconds, for the errors that may be tried again.
    """
    details: list[Message] = []
    if isinstance(error, RequestError):
        path = proto_path(error.field)
        code, message = code_pb2.INVALID_ARGUMENT, f"{path} = {error.value}: must be {error.allowed}"
        details.append(_bad_request(path, error.value, error.allowed))
    elif isinstance(error, InvalidField):
        code, message = code_pb2.INVALID_ARGUMENT, str(error)
        details.append(_bad_request(error.field, error.value, error.allowed))
    elif isinstance(error, OutOfOrder):
        code, message = code_pb2.FAILED_PRECONDITION, f"{error}: {error.remedy}"
        failure = error_details_pb2.PreconditionFailure()
        failure.violations.add(type="SESSION_STATE", subject=error.subject, description=error.remedy)
        details.append(failure)
    elif isinstance(error, ModelNotFound):
        code, message = code_pb2.NOT_FOUND, str(error)
    elif isinstance(error, QueueFull):
        code, message = code_pb2.RESOURCE_EXHAUSTED, f"{error}; try again in {retry_delay:.1f} s"
        details.append(_retry_info(retry_delay))
    elif isinstance(error, MemoryError):
        code, message = code_pb2.RESOURCE_EXHAUSTED, "the server is out of memory; try again later"
        details.append(_retry_info(retry_delay))
    elif isinstance(error, (ShuttingDown, EngineClosed)):
        code = code_pb2.UNAVAILABLE
        message = str(error) if isinstance(error, ShuttingDown) else "the server is shutting down"
        details.append(_retry_info(retry_delay))
    elif isinstance(error, EngineFailed):
        code, message = code_pb2.UNAVAILABLE, f"the server has to be started anew: {error}"
        details.append(_retry_info(retry_delay))
    elif isinstance(error, GenerationError):
        code, message = code_pb2.INTERNAL, str(error)
    else:
        code, message = code_pb2.INTERNAL, f"internal error; the server's log has the cause under request {request_id}"
    status = status_pb2.Status(code=code, message=_cut(message))
    details.append(error_details_pb2.RequestInfo(request_id=request_id))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def for_log(error: BaseException) -> str:
    """What happened, without anything that may be part of a prompt: no values, no text of the client."""
    if isinstance(error, RequestError):
        return f"invalid {proto_path(error.field)}"
    if isinstance(error, InvalidField):
        return f"invalid {error.field}"
    if isinstance(error, (OutOfOrder, QueueFull, EngineClosed, EngineFailed, ShuttingDown, GenerationError)):
        return str(error)
    return type(error).__name__


def is_foreseen(error: BaseException) -> bool:
    """Whether an error is part of a server's life; any other is a defect, whose traceback belongs in the log."""
    return isinstance(
        error,
        (RequestError, InvalidField, OutOfOrder, ModelNotFound, QueueFull, ShuttingDown, EngineClosed, EngineFailed),
    )


def retry_delay_of(status: status_pb2.Status) -> float | None:
    """Seconds of the status's RetryInfo, if it has one."""
    info = error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds()) / 1e3
    return None


def to_proto(status: status_pb2.Status) -> errors_pb2.Status:
    """The same status as messages in a stream carry it."""
    return errors_pb2.Status.FromString(status.SerializeToString())


def _bad_request(field: str, value: object, allowed: str) -> error_details_pb2.BadRequest:
    detail = error_details_pb2.BadRequest()
    detail.field_violations.add(field=field, description=_cut(f"{value}: must be {allowed}"))
    return detail


def _retry_info(delay: float) -> error_details_pb2.RetryInfo:
    detail = error_details_pb2.RetryInfo()
    detail.retry_delay.FromMilliseconds(round(delay * 1e3))
    return detail


def _cut(message: str) -> str:
    # A value may come from bytes that are no text; protobuf takes only what UTF-8 can write.
    text = message.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_MESSAGE_CHARACTERS else text[: _MAX_MESSAGE_CHARACTERS - 1] + "…"
