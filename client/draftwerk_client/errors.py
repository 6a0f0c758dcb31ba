"""What can go wrong, as exceptions that say which field or state is wrong and what would work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from draftwerk_client.v1 import errors_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request that is wrong."""

    field: str
    """Its path in the API, such as "sampling.top_p" or "prompt.token_ids.ids[3]"."""
    description: str
    """Its value, and what it must be."""


class DraftwerkError(Exception):
    """A call that failed. What `except` clauses need to tell apart has a class of its own."""

    def __init__(self, message: str, code: grpc.StatusCode, request_id: str = "") -> None:
        super().__init__(message, code, request_id)
        self.message = message
        """What happened, with which value, and what would work."""
        self.code = code
        self.request_id = request_id
        """As in the server's log. Empty if the request never left this process."""

    def __str__(self) -> str:
        return f"{self.message}\n  request id: {self.request_id}" if self.request_id else self.message


class InvalidRequest(DraftwerkError, ValueError):
    """A request that cannot be served as it stands."""

    def __init__(
        self, message: str, code: grpc.StatusCode, request_id: str = "", violations: tuple[FieldViolation, ...] = ()
    ) -> None:
        super().__init__(message, code, request_id)
        self.args = (message, code, request_id, violations)
        self.violations = violations


class QueueFull(DraftwerkError):
    """The server has as much waiting as it takes. It was tried again as often as the client was told to."""

    def __init__(
        self, message: str, code: grpc.StatusCode, request_id: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message, code, request_id)
        self.args = (message, code, request_id, retry_after)
        self.retry_after = retry_after
        """Seconds to wait before trying again, if the server said so."""


class Unavailable(DraftwerkError):
    """No server could be reached, or it is shutting down. It was tried again as often as the client was told to."""

    def __init__(
        self, message: str, code: grpc.StatusCode, request_id: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message, code, request_id)
        self.args = (message, code, request_id, retry_after)
        self.retry_after = retry_after
        """Seconds to wait before trying again, if the server said so."""


class OutOfOrder(DraftwerkError):
    """An action that the state of its session does not allow, such as appending while the branch generates."""


class DeadlineExceeded(DraftwerkError):
    """The timeout passed first. The server has stopped working on the request."""


class Cancelled(DraftwerkError):
    """The call was cancelled: by cancel(), or because the client was closed."""


class NotFound(DraftwerkError):
    """The server does not serve the model that was asked for."""


class ServerError(DraftwerkError):
    """Anything else that the server, or something on the way to it, reports."""


@dataclass(frozen=True, slots=True)
class CallContext:
    """What an error message says about the call it is of."""

    request_id: str
    target: str
    """The addresses of the servers, as the user gave them."""
    timeout: float | None
    """Seconds."""


def invalid(field: str, value: object, allowed: str) -> InvalidRequest:
    """A request that is wrong by what this side knows already."""
    shown = repr(value)
    if len(shown) > 100:
        shown = shown[:99] + "…"
    violation = FieldViolation(field, f"{shown}: must be {allowed}")
    return InvalidRequest(
        f"{field} = {violation.description}", grpc.StatusCode.INVALID_ARGUMENT, violations=(violation,)
    )


def deadline_exceeded(context: CallContext) -> DeadlineExceeded:
    """The error of a call whose timeout passed."""
    limit = f" of {context.timeout:g} s" if context.timeout is not None else ""
    message = f"the answer was not complete within the timeout{limit}; a longer one is set with timeout="
    return DeadlineExceeded(message, grpc.StatusCode.DEADLINE_EXCEEDED, context.request_id)


def cancelled(context: CallContext) -> Cancelled:
    """The error of a call that this side has ended."""
    return Cancelled("the call was cancelled", grpc.StatusCode.CANCELLED, context.request_id)


def session_closed(context: CallContext) -> OutOfOrder:
    """The error of an action on a branch, or in a session, that has ended."""
    message = "this session is closed: open another, or fork before closing"
    return OutOfOrder(message, grpc.StatusCode.FAILED_PRECONDITION, context.request_id)


def no_finish_reason(context: CallContext) -> ServerError:
    """The error of a stream that ends as if all were well, and is not complete."""
    message = "the server ended the stream without a finish reason: the output is not complete"
    return ServerError(message, grpc.StatusCode.INTERNAL, context.request_id)


def from_rpc_error(error: grpc.RpcError, context: CallContext) -> DraftwerkError:
    """The exception for a call that gRPC reports as failed."""
    trailer: Iterable[Any] = error.trailing_metadata() or ()  # pairs, of a type that differs between sync and asyncio
    for key, value in trailer:
        if key == _DETAILS_KEY:
            try:
                return from_status(errors_pb2.Status.FromString(value), context)
            except DecodeError:
                break  # something on the way has put its own there: the code and the message are still good
    return _without_details(error.code(), error.details() or "", context)


def from_status(status: errors_pb2.Status, context: CallContext) -> DraftwerkError:
    """The exception for a status that came with its details: in a trailer, or in the stream of a session."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    details = _Details(status.details)
    request_id = details.request_id or context.request_id
    lines = [status.message]
    lines += [
        f"  {violation.field}: {violation.description}"
        for violation in details.violations
        if violation.description not in status.message
    ]
    lines += [f"  {remedy}" for remedy in details.remedies if remedy not in status.message]
    message = "\n".join(lines)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(message, code, request_id, details.violations)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return QueueFull(message, code, request_id, details.retry_after)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(message, code, request_id, details.retry_after)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(message, code, request_id)
    return _plain(code, message, request_id)


class _Details:
    """The details of a status that this client knows."""

    def __init__(self, details: Iterable[AnyMessage]) -> None:
        self.violations: tuple[FieldViolation, ...] = ()
        self.remedies: list[str] = []
        self.retry_after: float | None = None
        self.request_id = ""
        for detail in details:
            read = self._READERS.get(detail.type_url.rpartition(".")[2])
            if read is not None:
                read(self, detail.value)

    def _bad_request(self, value: bytes) -> None:
        fields = errors_pb2.BadRequest.FromString(value).field_violations
        self.violations += tuple(FieldViolation(field.field, field.description) for field in fields)

    def _precondition_failure(self, value: bytes) -> None:
        for violation in errors_pb2.PreconditionFailure.FromString(value).violations:
            self.remedies.append(violation.description)

    def _retry_info(self, value: bytes) -> None:
        self.retry_after = errors_pb2.RetryInfo.FromString(value).retry_delay.ToMilliseconds() / 1e3

    def _request_info(self, value: bytes) -> None:
        self.request_id = errors_pb2.RequestInfo.FromString(value).request_id

    # The type is google.rpc.BadRequest or draftwerk.v1.BadRequest: the same messages in two packages.
    _READERS: dict[str, Callable[[_Details, bytes], None]] = {  # noqa: RUF012 (a constant)
        "BadRequest": _bad_request,
        "PreconditionFailure": _precondition_failure,
        "RetryInfo": _retry_info,
        "RequestInfo": _request_info,
    }


def says_not_serving(reason: str) -> bool:
    """Whether gRPC made no call because the server that it would have gone to says that it does not serve."""
    return "backend unhealthy" in reason


def _without_details(code: grpc.StatusCode, reason: str, context: CallContext) -> DraftwerkError:
    # The server sends details with every error. Without them it is gRPC itself that reports, or a proxy.
    request_id = context.request_id
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_exceeded(context)
    if code is grpc.StatusCode.CANCELLED:
        return cancelled(context)
    if code is grpc.StatusCode.UNAVAILABLE and says_not_serving(reason):
        message = (
            f"{context.target} is not serving: it is shutting down, or its device has failed or hangs ({reason})\n"
            "  its log says which; try again at another server, or here when it has been started anew"
        )
        return Unavailable(message, code, request_id)
    if code is grpc.StatusCode.UNAVAILABLE:
        message = (
            f"no connection to {context.target}: {reason}\n"
            "  is the server running (draftwerk serve --listen HOST:PORT), and is this its address? "
            "a server with TLS needs credentials= (on the command line --tls-ca)"
        )
        return Unavailable(message, code, request_id)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in reason:
        # In these words gRPC refuses a message for its size, which no second try makes smaller.
        message = f"the request is too large: {reason}; a server takes as much as its --max-message-bytes says"
        violation = FieldViolation("prompt", reason)
        return InvalidRequest(message, grpc.StatusCode.INVALID_ARGUMENT, request_id, (violation,))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return QueueFull(reason, code, request_id)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        message = (
            f"{context.target} does not have this method: {reason}\n"
            "  the server may answer stats() on a port of its own (operations_listen): make another client for it; "
            "else it is older than this client"
        )
        return ServerError(message, code, request_id)
    return _plain(code, reason, request_id)


def _plain(code: grpc.StatusCode, message: str, request_id: str) -> DraftwerkError:
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(message, code, request_id)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return OutOfOrder(message, code, request_id)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(message, code, request_id)
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(message, code, request_id)
    return ServerError(f"{code.name}: {message}", code, request_id)
