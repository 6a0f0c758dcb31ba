"""A gRPC server on a real port whose answers a test scripts, and a face of AsyncClient for tests without a loop."""

from __future__ import annotations

import asyncio
import inspect
import queue
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from draftwerk_client import AsyncSession, AsyncStream
from draftwerk_client.v1 import (
    errors_pb2,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    output_pb2,
)
from draftwerk_client.v1 import session_pb2 as pb

TIMEOUT = 20.0
"""Seconds that nothing takes: a test that waits longer has failed."""

GenerateScript = Callable[[generation_pb2.GenerateRequest, grpc.ServicerContext], Iterable[output_pb2.GenerateResponse]]
SessionScript = Callable[[Iterator[pb.SessionRequest], Callable[[pb.SessionResponse], None]], None]


def piece(text: str, *token_ids: int, position: int = 0, **fields: Any) -> output_pb2.GenerateResponse:
    """A message in the middle of a stream."""
    return output_pb2.GenerateResponse(text=text, token_ids=token_ids, position=position, fingerprint=77, **fields)


def last(
    text: str = "", *token_ids: int, reason: int = output_pb2.FINISH_REASON_LENGTH, position: int = 0, **fields: Any
) -> output_pb2.GenerateResponse:
    """The last message of a stream."""
    response = piece(text, *token_ids, position=position, finish_reason=reason, **fields)
    response.statistics.SetInParent()
    return response


def two_pieces(*_: object) -> list[output_pb2.GenerateResponse]:
    """The script of a stream in which nothing special happens."""
    return [piece("Hel", 5, 6, position=3, drafted_tokens=1), last("lo", 7, position=5)]


class ScriptedServer(
    generation_pb2_grpc.GenerationServicer, models_pb2_grpc.ModelsServicer, operations_pb2_grpc.OperationsServicer
):
    """Answers as `generate`, `session` and `unary` say, which a test may replace while it runs."""

    def __init__(self, address: str = "127.0.0.1:0", max_message_bytes: int = 4 << 20) -> None:
        self.generate: GenerateScript = two_pieces
        self.session: SessionScript = obedient_session
        self.unary: dict[type, Callable[[Any, grpc.ServicerContext], Any]] = {}
        self._health = b"\x08\x01"
        self._health_changed = threading.Condition()
        self._stopping = False
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.request_ids: list[str] = []
        self.calls = 0
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        """The id of every call of Generation that is over, in order."""
        self._server = grpc.server(
            ThreadPoolExecutor(16),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", max_message_bytes)],
        )
        generation_pb2_grpc.add_GenerationServicer_to_server(self, self._server)
        models_pb2_grpc.add_ModelsServicer_to_server(self, self._server)
        operations_pb2_grpc.add_OperationsServicer_to_server(self, self._server)
        health = {
            "Check": grpc.unary_unary_rpc_method_handler(lambda request, context: self._health),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),))
        port = self._server.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Ends all calls and closes the port."""
        with self._health_changed:
            self._stopping = True
            self._health_changed.notify_all()
        self._server.stop(None).wait(TIMEOUT)

    def set_serving(self, serving: bool) -> None:
        """What the server says about its health: SERVING, as at the start, or NOT_SERVING."""
        with self._health_changed:
            self._health = b"\x08\x01" if serving else b"\x08\x02"
            self._health_changed.notify_all()

    def _watch(self, request: bytes, context: Any) -> Iterator[bytes]:
        with self._health_changed:
            while not self._stopping:
                yield self._health
                self._health_changed.wait()

    def Generate(self, request: Any, context: Any) -> Iterator[output_pb2.GenerateResponse]:  # noqa: N802
        self._note(request, context)
        yield from self.generate(request, context)

    def Session(self, request_iterator: Any, context: Any) -> Iterator[pb.SessionResponse]:  # noqa: N802
        self._note(None, context)
        answers: queue.SimpleQueue[pb.SessionResponse | None] = queue.SimpleQueue()

        def requests() -> Iterator[pb.SessionRequest]:
            try:
                for request in request_iterator:
                    self.requests.put(request)
                    yield request
            except grpc.RpcError:
                return  # the client has cancelled the call

        def run() -> None:
            try:
                self.session(requests(), answers.put)
            finally:
                answers.put(None)

        threading.Thread(target=run, daemon=True).start()
        for answer in iter(answers.get, None):
            if answer.HasField("error") and answer.request_number == 0:  # fails the call itself
                context.abort(grpc.StatusCode.INTERNAL, answer.error.message)
            yield answer

    def GetModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context, models_pb2.GetModelResponse())

    def Tokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context, models_pb2.TokenizeResponse())

    def Detokenize(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context, models_pb2.DetokenizeResponse())

    def GetStats(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer(request, context, operations_pb2.GetStatsResponse())

    def _answer(self, request: Any, context: Any, default: Any) -> Any:
        self._note(request, context)
        script = self.unary.get(type(request))
        return default if script is None else script(request, context)

    def _note(self, request: Any, context: Any) -> None:
        self.calls += 1
        request_id = dict(context.invocation_metadata()).get("x-request-id", "")
        self.request_ids.append(request_id)
        context.add_callback(lambda: self.ended.put(request_id))
        if request is not None:
            self.requests.put(request)


def is_in(thread: int, module: types.ModuleType) -> bool:
    """Whether a thread is in code of a module, or in what that calls."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename != module.__file__:
        frame = frame.f_back
    return frame is not None


# --- scripts ---------------------------------------------------------------------------------------------------------


def until_cancelled(*first: output_pb2.GenerateResponse) -> GenerateScript:
    """Sends these messages and then nothing more, until the call ends."""

    def script(_: Any, context: grpc.ServicerContext) -> Iterator[output_pb2.GenerateResponse]:
        over = threading.Event()
        if not context.add_callback(over.set):
            return
        yield from first
        over.wait()  # the server ends calls when it stops

    return script


def refusing(status: errors_pb2.Status, pushback_ms: int | None = None) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Fails the call as the server does, with the status in the trailer."""

    def script(_: Any, context: grpc.ServicerContext) -> Any:
        trailer: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
        if pushback_ms is not None:
            trailer.append(("grpc-retry-pushback-ms", str(pushback_ms)))
        context.set_trailing_metadata(tuple(trailer))
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        context.abort(code, status.message)

    return script


def status(code: grpc.StatusCode, message: str, *details: Any) -> errors_pb2.Status:
    """A status with details, which are packed as google.rpc's."""
    made = errors_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = made.details.add(value=detail.SerializeToString())
        packed.type_url = f"type.googleapis.com/google.rpc.{type(detail).__name__}"
    return made


def obedient_session(requests: Iterator[pb.SessionRequest], answer: Callable[[pb.SessionResponse], None]) -> None:
    """A model whose branches are lists of tokens. It appends 100 and the token ids it gets, or one token per character.

    A generation with max_tokens sends the tokens 1000, 1001, ... one by one and ends. One without sends two and waits:
    for an interrupt, which ends it, for an inject, after which it sends one more, or for a close.
    """
    branches: dict[int, list[int]] = {0: []}
    running: dict[int, int] = {}

    def generated(number: int, branch: int, response: output_pb2.GenerateResponse) -> None:
        response.position = len(branches[branch])
        branches[branch].extend(response.token_ids)
        answer(pb.SessionResponse(request_number=number, branch=branch, generated=response))

    def end(branch: int) -> None:
        if branch in running:
            generated(running.pop(branch), branch, last(reason=output_pb2.FINISH_REASON_CANCELLED))

    for request in requests:
        number, branch, action = request.request_number, request.branch, request.WhichOneof("action")
        response = pb.SessionResponse(request_number=number, branch=branch)
        if action == "generate":
            limit = request.generate.stop.max_tokens
            if branch in running:
                response.error.CopyFrom(
                    status(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"branch {branch} is generating",
                        errors_pb2.PreconditionFailure(violations=[{"description": "interrupt it first"}]),
                    )
                )
                answer(response)
            elif limit:
                for i in range(limit - 1):
                    generated(number, branch, piece(f"{i} ", 1000 + i))
                generated(number, branch, last("end", 999 + limit))
            else:
                running[branch] = number
                for i in range(2):
                    generated(number, branch, piece(f"{i} ", 1000 + i))
            continue
        if action == "open":
            response.opened.request_id = "the server's"
        elif action == "append":
            content = request.append.content
            added = list(content.token_ids.ids) or [100 + i for i in range(len(content.text))]
            branches[branch] += added
            response.appended.token_ids.extend(added)
            response.appended.length = len(branches[branch])
        elif action == "interrupt":
            end(branch)
            response.interrupted.length = len(branches[branch])
        elif action == "inject":
            response.injected.position = len(branches[branch])
            response.injected.token_ids.extend(request.inject.content.token_ids.ids)
            branches[branch] += request.inject.content.token_ids.ids
            answer(response)
            generated(running[branch], branch, piece("more", 2000))
            continue
        elif action == "fork":
            copy = len(branches)
            length = request.fork.position if request.fork.HasField("position") else len(branches[branch])
            branches[copy] = branches[branch][:length]
            response.forked.branch, response.forked.length = copy, length
        else:
            end(branch)
            response.closed.SetInParent()
        answer(response)


# --- AsyncClient for tests without a loop ----------------------------------------------------------------------------


class Blocking:
    """An object of the asyncio client as its synchronous twin: every coroutine is run to its end in the given loop."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.target = target
        self.loop = loop

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.target, name)
        if not callable(attribute):
            return attribute
        return lambda *args, **options: self._run(attribute, *args, **options)

    def __iter__(self) -> Blocking:
        return self

    def __next__(self) -> Any:
        try:
            return self._run(self.target.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Blocking:
        self._run(self.target.__aenter__)
        return self

    def __exit__(self, *exception: object) -> None:
        self._run(self.target.__aexit__, *exception)

    def _run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            result = function(*args, **options)
            return await result if inspect.isawaitable(result) else result

        result = asyncio.run_coroutine_threadsafe(run(), self.loop).result(TIMEOUT)
        return Blocking(result, self.loop) if isinstance(result, (AsyncStream, AsyncSession)) else result
