"""The client's side of a session, action by action, over the bare stub."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from google.protobuf.message import Message

from conformance.served import Failure, Served, failure_in
from draftwerk_client.v1 import output_pb2, parameters_pb2, session_pb2
from service.serve_process import TIMEOUT

Response = session_pb2.SessionResponse


def token_prompt(ids: Iterable[int]) -> parameters_pb2.Prompt:
    return parameters_pb2.Prompt(token_ids=parameters_pb2.TokenIds(ids=ids))


class Actions:
    """Sends actions and sorts what comes back by the number of the action. Leaving the context cancels the call."""

    def __init__(self, server: Served) -> None:
        self.number = 0
        self._ended = False
        self._requests: queue.SimpleQueue[session_pb2.SessionRequest | None] = queue.SimpleQueue()
        take: Callable[[], session_pb2.SessionRequest | None] = self._requests.get
        self.call = server.generation.Session(iter(take, None), timeout=TIMEOUT)
        self._unread: dict[int, deque[Response]] = {}

    def send(self, action: Message | None, branch: int = 0, number: int | None = None) -> int:
        """Sends an action, or a request without one; the number that answers it."""
        self.number = self.number + 1 if number is None else number
        request = session_pb2.SessionRequest(request_number=self.number, branch=branch)
        if action is not None:
            field = getattr(request, type(action).__name__.lower())
            field.SetInParent()  # also where the action has no fields
            field.MergeFrom(action)
        self._requests.put(request)
        return self.number

    def responses(self, number: int) -> Iterator[Response]:
        """What answers an action, as it comes; without end."""
        unread = self._unread.setdefault(number, deque())
        while True:
            while unread:
                yield unread.popleft()
            response = next(self.call)
            self._unread.setdefault(response.request_number, deque()).append(response)

    def answer(self, action: Message | None, branch: int = 0, number: int | None = None) -> Any:
        """Sends an action that has one answer, and returns that."""
        sent = self.send(action, branch, number)
        response = next(self.responses(sent))
        assert response.branch == branch
        return getattr(response, str(response.WhichOneof("event")))

    def failure(self, action: Message | None, branch: int = 0, number: int | None = None) -> Failure:
        return failure_in(self.answer(action, branch, number))

    def open(self, **fields: Any) -> session_pb2.SessionResponse.Opened:
        opened: session_pb2.SessionResponse.Opened = self.answer(session_pb2.SessionRequest.Open(**fields))
        return opened

    def append(self, ids: Iterable[int], branch: int = 0) -> session_pb2.SessionResponse.Appended:
        content = token_prompt(ids)
        appended: session_pb2.SessionResponse.Appended = self.answer(
            session_pb2.SessionRequest.Append(content=content), branch
        )
        return appended

    def start(self, branch: int = 0, **fields: Any) -> int:
        """Begins a generation; its number."""
        return self.send(session_pb2.SessionRequest.Generate(**fields), branch)

    def chunks(self, number: int) -> Iterator[output_pb2.GenerateResponse]:
        """The messages of a generation up to its last."""
        for response in self.responses(number):
            assert response.WhichOneof("event") == "generated", response
            yield response.generated
            if response.generated.finish_reason:
                return

    def generate(self, branch: int = 0, **fields: Any) -> list[output_pb2.GenerateResponse]:
        return list(self.chunks(self.start(branch, **fields)))

    def __enter__(self) -> Actions:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self.call.cancel()
            self._requests.put(None)

    def end(self) -> None:
        """Ends the client's side, and expects the server to do the same."""
        self._ended = True
        self._requests.put(None)
        left = list(self.call)
        assert left == [], left
        assert self.call.code().name == "OK"


def tokens_of(chunks: Iterable[output_pb2.GenerateResponse]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def text_of(chunks: Iterable[output_pb2.GenerateResponse]) -> str:
    return "".join(chunk.text for chunk in chunks)
