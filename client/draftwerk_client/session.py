"""A conversation whose state stays on the server, for synchronous code."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc

from draftwerk_client.channel import metadata_of
from draftwerk_client.errors import (
    CallContext,
    DeadlineExceeded,
    DraftwerkError,
    deadline_exceeded,
    from_rpc_error,
    session_closed,
)
from draftwerk_client.parameters import Prompt, prompt_message, session_generate
from draftwerk_client.results import Appended, Completion, Injected
from draftwerk_client.session_state import (
    MAX_UNREAD_MESSAGES,
    BranchedCall,
    BranchGeneration,
    Mailbox,
    SessionState,
    generation_defaults,
)
from draftwerk_client.stream import Stream
from draftwerk_client.v1 import output_pb2, session_pb2

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from draftwerk_client.parameters import GenerationOptions
    from draftwerk_client.v1.generation_pb2_grpc import GenerationStub

_CLOSING_SECONDS = 5.0


class SessionCall(BranchedCall):
    """The gRPC call of a session. One thread reads it and hands each message to whoever waits for that answer.

    A generation whose reader is slow is held at MAX_UNREAD_MESSAGES messages: then nothing of the call is read, until
    there is room again or somebody waits for the answer to an action. Other calls go on.
    """

    def __init__(self, stub: GenerationStub, context: CallContext) -> None:
        self.state = SessionState(context)
        # Reentrant: the garbage collector may drop a stream, which then says so, in the thread that holds the lock.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._outgoing: SimpleQueue[Mailbox | None] = SimpleQueue()
        self._awaited = 0
        self._over = False
        self._ended = False
        """The call is over, and all that came of it has been handed out."""
        self._failure: grpc.RpcError | None = None
        # Numbers are given in gRPC's sending thread, which is one: they ascend in the order of sending.
        requests = map(self.state.numbered, iter(self._outgoing.get, None))
        self._call = stub.Session(requests, metadata=metadata_of(context))
        self._call.add_callback(self._wake_reader)
        threading.Thread(target=self._read, name="draftwerk-session", daemon=True).start()

    def send(self, request: session_pb2.SessionRequest) -> Mailbox:
        """Sends an action. Takes no lock and never waits."""
        mailbox = Mailbox(request)
        self._outgoing.put(mailbox)
        return mailbox

    def ask(self, request: session_pb2.SessionRequest, timeout: float | None) -> session_pb2.SessionResponse:
        """Sends an action and waits for its one answer.

        Raises:
            DraftwerkError: the action failed, the call failed, or the timeout passed.
        """
        context = self.state.action(timeout)
        with self._lock:
            self._awaited += 1
            self._changed.notify_all()  # the reader goes on, room or not: the answer may be behind what is unread
        mailbox = self.send(request)
        try:
            return self.take(mailbox, context, deadline_of(context))
        except BaseException:
            self.discard(mailbox)
            raise
        finally:
            with self._lock:
                self._awaited -= 1

    def take(self, mailbox: Mailbox, context: CallContext, deadline: float | None) -> session_pb2.SessionResponse:
        """The next message for this mailbox.

        Raises:
            DraftwerkError: the action failed, the call failed, or the deadline (of time.monotonic()) passed.
        """
        with self._lock:
            while not mailbox.messages:
                if self._ended:
                    raise self._ending(context)
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise deadline_exceeded(context)
                self._changed.wait(remaining)
            if len(mailbox.messages) == MAX_UNREAD_MESSAGES:
                self._changed.notify_all()
            response = mailbox.messages.popleft()
        return self.state.checked(response, context)

    def discard(self, mailbox: Mailbox) -> None:
        """What is still to come for this mailbox is dropped."""
        with self._lock:
            mailbox.discarded = True
            mailbox.messages.clear()
            self._changed.notify_all()

    def end_requests(self) -> None:
        """No more actions will be sent. Never waits."""
        self._outgoing.put(None)

    def wait_ended(self, timeout: float) -> None:
        """Waits for the end of the call; enforces it after so many seconds."""
        with self._lock:
            self._changed.wait_for(lambda: self._ended, timeout)
        self.cancel()

    def cancel(self) -> bool:
        """Ends the call at once. False if it was over already."""
        if self._ended:
            return False
        self._call.cancel()
        return True

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._lock:
                    self._deliver(response)
        except grpc.RpcError as error:
            self._failure = error
        finally:
            with self._lock:
                self._ended = True
                self._changed.notify_all()
            self._outgoing.put(None)  # gRPC's sending thread waits here

    def _deliver(self, response: session_pb2.SessionResponse) -> None:
        mailbox = self.state.receiver(response)
        if mailbox is None:
            return
        while self.state.must_wait(mailbox, self._awaited) and not self._over:
            self._changed.wait()
        if not mailbox.discarded:
            mailbox.messages.append(response)
            self._changed.notify_all()

    def _wake_reader(self) -> None:
        # gRPC calls this when the call is over: the reader may be waiting for room and would not notice.
        with self._lock:
            self._over = True
            self._changed.notify_all()

    def _ending(self, context: CallContext) -> DraftwerkError:
        return session_closed(context) if self._failure is None else from_rpc_error(self._failure, context)


class _Generation(BranchGeneration):
    """One generation of a session, as its Stream sees it."""

    _call: SessionCall

    def __init__(self, call: SessionCall, mailbox: Mailbox, context: CallContext) -> None:
        self._call = call
        self._mailbox = mailbox
        self._context = context
        self._deadline = deadline_of(context)
        self._finished = False

    def read(self) -> output_pb2.GenerateResponse:
        if self._finished:
            raise StopIteration
        try:
            generated = self._call.take(self._mailbox, self._context, self._deadline).generated
        except DeadlineExceeded:
            self.leave()
            raise
        self._finished = generated.finish_reason != 0
        return generated


class Session:
    """A branch of a conversation whose keys and values stay warm on the server: a turn computes only what is new.

    `length` is that of the branch in tokens. Branches made by fork() share one call and generate at the same time,
    each read by a thread of its own if wanted. A generation that nobody reads is held after 256 messages, and with it
    the other generations of this session, and only these. Leaving the `with` block closes the branch; the call ends
    with the last of them.

    Made by Client.session() and fork().
    """

    def __init__(
        self,
        call: SessionCall,
        branch: int,
        defaults: Mapping[str, Any],
        running: MutableMapping[str, Stream | SessionCall],
    ) -> None:
        self._call = call
        self._branch = branch
        self._defaults = defaults
        self._running = running
        self._closed = False

    @classmethod
    def open(
        cls,
        stub: GenerationStub,
        context: CallContext,
        opening: session_pb2.SessionRequest.Open,
        defaults: Mapping[str, Any],
        running: MutableMapping[str, Stream | SessionCall],
    ) -> Session:
        """Starts the call of a session. See Client.session()."""
        call = SessionCall(stub, context)
        running[context.request_id] = call
        try:
            call.ask(session_pb2.SessionRequest(open=opening), None)
        except BaseException:
            call.cancel()
            raise
        return cls(call, 0, generation_defaults(defaults), running)

    @property
    def request_id(self) -> str:
        """Of the session, for cancel(), and as in the server's log."""
        return self._call.state.context.request_id

    @property
    def length(self) -> int:
        """Tokens of the branch, as far as messages have arrived."""
        return self._call.state.lengths[self._branch]

    def append(self, prompt: Prompt, *, timeout: float | None = None) -> Appended:
        """Adds text, token ids or chat messages to the end of the branch; not while it generates.

        Text and token ids are added as they are. With chat messages the branch becomes what the model's chat template
        writes for the whole chat, in which what was generated is a message of the assistant. Where the template writes
        earlier turns otherwise than the branch has them, as when it leaves out thoughts, the branch changes from there
        on.
        """
        request = self._action()
        request.append.content.CopyFrom(prompt_message(prompt))
        appended = self._call.ask(request, timeout).appended
        return Appended(tuple(appended.token_ids), appended.length)

    def generate(self, *, timeout: float | None = None, **options: Unpack[GenerationOptions]) -> Completion:
        """Generates from the branch; what is generated becomes part of it.

        Args:
            timeout: seconds, after which the generation is interrupted. None: the session's; math.inf: no limit.
            options: override those of the session. See GenerationOptions.

        Raises:
            DraftwerkError: the generation failed. The session goes on, unless its call failed.
            TypeError: an option that does not exist.
        """
        with self.stream(timeout=timeout, **options) as stream:
            return stream.completion()

    def stream(self, *, timeout: float | None = None, **options: Unpack[GenerationOptions]) -> Stream:
        """generate(), step by step. Leaving the stream early interrupts the generation."""
        request = self._action()
        request.generate.CopyFrom(session_generate(self._defaults, options))
        context = self._call.state.generation(timeout)
        mailbox = self._call.send(request)
        self._call.state.started(mailbox)
        generation = _Generation(self._call, mailbox, context)
        stream = Stream(context, read=generation.read, cancel=generation.cancel, leave=generation.leave)
        self._running[context.request_id] = stream
        return stream

    def interrupt(self, *, timeout: float | None = None) -> None:
        """Ends the generation that runs on the branch; what was sent stays part of it. From any thread."""
        request = self._action()
        request.interrupt.SetInParent()
        self._call.ask(request, timeout)

    def inject(self, content: str | Sequence[int], *, timeout: float | None = None) -> Injected:
        """Puts text or token ids behind what has been generated so far and lets the generation go on after them."""
        request = self._action()
        request.inject.content.CopyFrom(prompt_message(content))
        injected = self._call.ask(request, timeout).injected
        return Injected(tuple(injected.token_ids), injected.position)

    def fork(self, position: int | None = None, *, timeout: float | None = None) -> Session:
        """A new branch that starts as a copy of the first `position` tokens of this one, all by default."""
        request = self._action()
        request.fork.SetInParent()
        if position is not None:
            request.fork.position = position
        branch = self._call.ask(request, timeout).forked.branch
        return Session(self._call, branch, self._defaults, self._running)

    def close(self) -> None:
        """Ends the branch and what runs on it. Waits for the end of the call if it is the last. May be called again."""
        if not self._closed:
            self._closed = True
            if self._call.close_branch(self._branch):
                self._call.wait_ended(_CLOSING_SECONDS)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed:
            self._call.close_branch(self._branch)

    def _action(self) -> session_pb2.SessionRequest:
        if self._closed:
            raise session_closed(self._call.state.context)
        return session_pb2.SessionRequest(branch=self._branch)


def deadline_of(context: CallContext) -> float | None:
    """When the action that starts now must be over, of time.monotonic()."""
    return None if context.timeout is None else time.monotonic() + context.timeout
