"""What every call goes through: its id, its errors as statuses, its line in the log, its counters, its early end."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from draftwerk.requests import QueueFull
from draftwerk.server import errors
from draftwerk_client.v1 import generation_pb2, models_pb2, operations_pb2

if TYPE_CHECKING:
    from draftwerk.server.metrics import Metrics

METHODS = {
    f"/{service.full_name}/{method.name}": method.input_type.full_name
    for file in (generation_pb2, models_pb2, operations_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""The methods of draftwerk.v1, such as "/draftwerk.v1.Generation/Generate", and the types of their requests."""

_UNDECODABLE = object()
_SERVICES = "/draftwerk.v1."
_OPERATIONS = "Operations/"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

_log = structlog.stdlib.get_logger("draftwerk.calls")
_current: ContextVar[Call] = ContextVar("draftwerk_call")


def current_call() -> Call:
    """The call that this task works for."""
    return _current.get()


class Call:
    """One call while it runs."""

    def __init__(self, method: str, context: Any, retry_delay: Callable[[], float]) -> None:
        self.method = method
        """Such as "Generation/Generate"."""
        self.request_id = _request_id(context)
        self.peer: str = context.peer()  # not known any more when the client is gone
        self.started_at = time.perf_counter()
        self.code = grpc.StatusCode.OK
        """What the call ends with."""
        self.figures: dict[str, object] = {}
        self.ended_with: Exception | None = None
        self._context = context
        self._retry_delay = retry_delay
        self._task = asyncio.current_task()
        self._accepting: asyncio.Future[None] | None = None

    def note(self, **figures: object) -> None:
        """Adds figures to the call's line in the log. Never anything of a prompt or an output."""
        self.figures.update(figures)

    async def accept(self) -> None:
        """Sends the initial metadata: the request id. The first message does so too.

        A client retries a call only as long as it has no initial metadata; so this comes after everything that can
        refuse the call, and before the wait for the first token.
        """
        if self._accepting is None:
            metadata = (("x-request-id", self.request_id),)
            self._accepting = asyncio.ensure_future(self._context.send_initial_metadata(metadata))
            # It fails if the client is gone, and then the call has ended: nobody may be left to await it.
            self._accepting.add_done_callback(lambda sent: sent.cancelled() or sent.exception())
        await asyncio.shield(self._accepting)

    async def abort(self, error: BaseException) -> None:
        """Ends the call with the status of this error. Raises AbortError, which is how grpc.aio is told."""
        status = self.status_of(error)
        self.code = _code(status.code)
        self.note(error=errors.for_log(error))
        if not errors.is_foreseen(error):
            _log.error("a call failed", request_id=self.request_id, method=self.method, exc_info=error)
        trailing = [("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", self.request_id)]
        delay = errors.retry_delay_of(status)
        if delay is not None:
            trailing.append(("grpc-retry-pushback-ms", str(round(delay * 1e3))))
        try:
            if self._accepting is not None:
                await self._accepting  # gRPC refuses a status while initial metadata are under way
            await self._context.abort(self.code, status.message, tuple(trailing))
        except grpc.aio.InternalError:  # the client went away meanwhile
            raise asyncio.CancelledError from None

    def status_of(self, error: BaseException) -> status_pb2.Status:
        """The status that tells the client of an error of this call."""
        delay = self._retry_delay() if isinstance(error, QueueFull) else errors.RETRY_DELAY
        return errors.status_of(error, self.request_id, delay)

    def end(self, error: Exception) -> None:
        """Ends the call from outside: its handler is cancelled and its client gets the status of this error."""
        self.ended_with = error
        if self._task is not None:
            self._task.cancel()


class Calls(grpc.aio.ServerInterceptor):
    """Interceptor of all calls of draftwerk.v1.

    Args:
        metrics: counts the calls.
        max_calls: so many may run at the same time, sessions among them. gRPC's own limit would count the watches of
            health too, and refuse probes.
        draining: set when the server takes no new calls. Those that ask how it is doing are taken in any case.
    """

    def __init__(self, metrics: Metrics, max_calls: int, draining: asyncio.Event) -> None:
        self._metrics = metrics
        self._max_calls = max_calls
        self._draining = draining
        self._running: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._handlers: dict[Any, Any] = {}

    async def finished(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    @property
    def running(self) -> int:
        """Calls that run now."""
        return len(self._running)

    def end_all(self, error: Exception) -> None:
        """Ends every call with this error."""
        for call in list(self._running):
            call.end(error)

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method not in METHODS:  # names that clients make up get neither a counter nor a line
            return handler
        wrapped = self._handlers.get(handler)
        if wrapped is None:
            wrapped = self._handlers[handler] = self._wrapped(method, handler)
        return wrapped

    def _wrapped(self, method: str, handler: Any) -> Any:
        name = method.removeprefix(_SERVICES)

        # Every method is served as a stream: grpc.aio never answers a unary call whose client sends no message.
        async def run(_: Any, context: Any) -> None:
            call = Call(name, context, self._metrics.retry_delay)
            self._begin(call)
            try:
                await self._answer(call, handler, context)
            finally:
                self._end(call)

        return grpc.stream_stream_rpc_method_handler(
            run, _decoder(handler.request_deserializer), handler.response_serializer
        )

    async def _answer(self, call: Call, handler: Any, context: Any) -> None:
        answer = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        try:
            if not call.method.startswith(_OPERATIONS):
                self._refuse_what_is_too_much()
            own_context = _CallContext(call, context)
            request = own_context if handler.request_streaming else await own_context.read_only_message()
            response = await answer(request, own_context)
            if not handler.response_streaming:
                await own_context.write(response)
            await call.accept()
        except grpc.aio.AbortError:
            call.code = _code(context.code())
            raise
        except (Exception, asyncio.CancelledError) as error:
            failure = call.ended_with or error
            # Nobody is there to be told. A write may find out before the context does: InternalError is how it says so.
            if isinstance(failure, (asyncio.CancelledError, grpc.aio.InternalError)) or context.done():
                call.code = cancellation(time.perf_counter() - call.started_at, context.time_remaining())
                raise asyncio.CancelledError from None
            await call.abort(failure)

    def _refuse_what_is_too_much(self) -> None:
        if self._draining.is_set():
            raise errors.ShuttingDown("the server is shutting down; try again at another one, or here later")
        if len(self._running) > self._max_calls:  # with the one that asks
            raise QueueFull(f"{self._max_calls} calls are open, which is all that the server takes")

    def _begin(self, call: Call) -> None:
        _current.set(call)
        self._running.add(call)
        self._idle.clear()
        self._metrics.call_started(call.method)

    def _end(self, call: Call) -> None:
        self._running.discard(call)
        if not self._running:
            self._idle.set()
        self._metrics.call_ended(call.method, call.code.name)
        level = "error" if call.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) else "info"
        getattr(_log, level)(
            "call",
            request_id=call.request_id,
            method=call.method,
            peer=call.peer,
            code=call.code.name,
            seconds=round(time.perf_counter() - call.started_at, 6),
            **call.figures,
        )


class _CallContext:
    """The context that handlers get: sends the initial metadata first, and refuses messages that are none."""

    def __init__(self, call: Call, context: Any) -> None:
        self._call = call
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        """The next message, or EOF.

        Raises:
            InvalidField: it could not be decoded.
        """
        message = await self._context.read()
        if message is _UNDECODABLE:
            wanted = METHODS[_SERVICES + self._call.method]
            raise errors.InvalidField(
                "request", "undecodable", f"a {wanted} as protobuf writes it, its strings in UTF-8"
            )
        return message

    async def read_only_message(self) -> Any:
        """The message of a call that has one.

        Raises:
            InvalidField: the client ended its side without one, or it could not be decoded.
        """
        message = await self.read()
        if message is grpc.aio.EOF:
            raise errors.InvalidField("request", "absent", "sent before the client ends its side")
        return message

    async def write(self, message: Any) -> None:
        await self._call.accept()
        self.write = self._context.write  # type: ignore[method-assign]  # from now on without this detour
        await self._context.write(message)


def _decoder(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Decodes without failing: what grpc.aio makes of a failure is a defect of the server, with a traceback."""

    def decoded(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return _UNDECODABLE

    return decoded


def _request_id(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and 1 <= len(value) <= 128:
            if value.isascii() and value.isprintable():
                return value
            break
    return uuid.uuid4().hex


def cancellation(elapsed: float, remaining: float | None) -> grpc.StatusCode:
    """Why the core cancelled a call: its deadline passed, or the client ended it.

    A client ends a call itself when its deadline passes, and that can be here before the deadline is: gRPC rounds what
    it says of the deadline up, by as much as a hundredth, and threads wake when they can.

    Args:
        elapsed: seconds since the call began.
        remaining: seconds to its deadline as it is known here; None: it has none.
    """
    early = max(0.1, 0.01 * (elapsed + (remaining or 0)))
    passed = remaining is not None and remaining <= early
    return grpc.StatusCode.DEADLINE_EXCEEDED if passed else grpc.StatusCode.CANCELLED


def _code(code: grpc.StatusCode | int) -> grpc.StatusCode:
    return code if isinstance(code, grpc.StatusCode) else _CODES[code]
