"""A conversation whose state stays on the server, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from draftwerk_client.channel import metadata_of
from draftwerk_client.errors import (
    CallContext,
    DeadlineExceeded,
    DraftwerkError,
    cancelled,
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
from draftwerk_client.stream import AsyncStream
from draftwerk_client.v1 import output_pb2, session_pb2

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from draftwerk_client.parameters import GenerationOptions
    from draftwerk_client.v1.generation_pb2_grpc import GenerationAsyncStub

_CLOSING_SECONDS = 5.0


class _AsyncMailbox(Mailbox):
    __slots__ = ("arrived",)

    def __init__(self, request: session_pb2.SessionRequest) -> None:
        super().__init__(request)
        self.arrived: asyncio.Future[None] | None = None
        """Set while somebody waits for a message."""


class AsyncSessionCall(BranchedCall):
    """The gRPC call of a session. One task reads it and hands each message to whoever waits for that answer.

    A generation whose reader is slow is held at MAX_UNREAD_MESSAGES messages: then nothing of the call is read, until
    there is room again or somebody waits for the answer to an action. Other calls go on.
    """

    def __init__(self, stub: GenerationAsyncStub, context: CallContext) -> None:
        self.state = SessionState(context)
        self.loop = asyncio.get_running_loop()
        self._outgoing: asyncio.Queue[Mailbox | None] = asyncio.Queue()
        self._takers: set[_AsyncMailbox] = set()
        self._room = asyncio.Event()
        self._awaited = 0
        self._failure: grpc.RpcError | None = None
        self._cancelled = False
        self._call = stub.Session(self._requests(), metadata=metadata_of(context))
        self._reader = asyncio.create_task(self._read(), name="draftwerk-session")

    def send(self, request: session_pb2.SessionRequest) -> _AsyncMailbox:
        """Sends an action. Never waits."""
        mailbox = _AsyncMailbox(request)
        self._outgoing.put_nowait(mailbox)
        return mailbox

    async def ask(self, request: session_pb2.SessionRequest, timeout: float | None) -> session_pb2.SessionResponse:
        """Sends an action and waits for its one answer.

        Raises:
            DraftwerkError: the action failed, the call failed, or the timeout passed.
        """
        context = self.state.action(timeout)
        self._awaited += 1
        self._room.set()  # the reader goes on, room or not: the answer may be behind what is unread
        mailbox = self.send(request)
        try:
            return await self.take(mailbox, context, self.deadline_of(context))
        except BaseException:
            self.discard(mailbox)
            raise
        finally:
            self._awaited -= 1

    async def take(
        self, mailbox: _AsyncMailbox, context: CallContext, deadline: float | None
    ) -> session_pb2.SessionResponse:
        """The next message for this mailbox.

        Raises:
            DraftwerkError: the action failed, the call failed, or the deadline (of the loop's clock) passed.
        """
        while not mailbox.messages:
            if self._reader.done():
                raise self._ending(context)
            mailbox.arrived = self.loop.create_future()
            self._takers.add(mailbox)
            try:
                if deadline is None:
                    await mailbox.arrived
                else:
                    await asyncio.wait_for(mailbox.arrived, deadline - self.loop.time())
            except asyncio.TimeoutError:
                raise deadline_exceeded(context) from None
            finally:
                mailbox.arrived = None
                self._takers.discard(mailbox)
        if len(mailbox.messages) == MAX_UNREAD_MESSAGES:
            self._room.set()
        return self.state.checked(mailbox.messages.popleft(), context)

    def discard(self, mailbox: Mailbox) -> None:
        """What is still to come for this mailbox is dropped."""
        mailbox.discarded = True
        mailbox.messages.clear()
        self._room.set()

    def end_requests(self) -> None:
        """No more actions will be sent. Never waits."""
        self._outgoing.put_nowait(None)

    async def wait_ended(self, timeout: float) -> None:
        """Waits for the end of the call; enforces it after so many seconds."""
        await asyncio.wait([self._reader], timeout=timeout)
        self.cancel()

    def cancel(self) -> bool:
        """Ends the call at once. False if it was over already. May be called from any thread."""
        if self._reader.done():
            return False
        self._cancelled = True
        self.loop.call_soon_threadsafe(self._cancel_call)
        return True

    def deadline_of(self, context: CallContext) -> float | None:
        """When the action that starts now must be over, of the loop's clock."""
        return None if context.timeout is None else self.loop.time() + context.timeout

    def _cancel_call(self) -> None:
        self._call.cancel()
        self._room.set()  # the reader may be waiting for room and would not notice

    async def _requests(self) -> AsyncIterator[session_pb2.SessionRequest]:
        while (mailbox := await self._outgoing.get()) is not None:
            yield self.state.numbered(mailbox)

    async def _read(self) -> None:
        try:
            while isinstance(response := await self._call.read(), session_pb2.SessionResponse):
                await self._deliver(response)
        except grpc.RpcError as error:
            self._failure = error
        except asyncio.CancelledError:
            # Of this task, or of the call: grpc.aio reports both like this.
            self._cancelled = True
            self._call.cancel()
        finally:
            self._outgoing.put_nowait(None)
            self.loop.call_soon(self._wake_takers)  # when this task is done

    async def _deliver(self, response: session_pb2.SessionResponse) -> None:
        mailbox = self.state.receiver(response)
        if mailbox is None:
            return
        while self.state.must_wait(mailbox, self._awaited) and not self._cancelled:
            self._room.clear()
            await self._room.wait()
        if not mailbox.discarded:
            mailbox.messages.append(response)
            assert isinstance(mailbox, _AsyncMailbox)
            if mailbox.arrived is not None and not mailbox.arrived.done():
                mailbox.arrived.set_result(None)

    def _wake_takers(self) -> None:
        for mailbox in self._takers:
            if mailbox.arrived is not None and not mailbox.arrived.done():
                mailbox.arrived.set_result(None)

    def _ending(self, context: CallContext) -> DraftwerkError:
        if self._failure is not None:
            return from_rpc_error(self._failure, context)
        return cancelled(context) if self._cancelled else session_closed(context)


class _AsyncGeneration(BranchGeneration):
    """One generation of a session, as its AsyncStream sees it."""

    _call: AsyncSessionCall
    _mailbox: _AsyncMailbox

    def __init__(self, call: AsyncSessionCall, mailbox: _AsyncMailbox, context: CallContext) -> None:
        self._call = call
        self._mailbox = mailbox
        self._context = context
        self._deadline = call.deadline_of(context)
        self._finished = False

    async def read(self) -> output_pb2.GenerateResponse | None:
        if self._finished:
            return None
        try:
            generated = (await self._call.take(self._mailbox, self._context, self._deadline)).generated
        except DeadlineExceeded:
            self.leave()
            raise
        self._finished = generated.finish_reason != 0
        return generated


class SessionOpening:
    """What AsyncClient.session() returns: `async with client.session() as session`, or `await client.session()`."""

    def __init__(
        self,
        stub: GenerationAsyncStub,
        context: CallContext,
        opening: session_pb2.SessionRequest.Open,
        defaults: Mapping[str, Any],
        running: MutableMapping[str, AsyncStream | AsyncSessionCall],
    ) -> None:
        self._stub = stub
        self._context = context
        self._opening = opening
        self._defaults = generation_defaults(defaults)
        self._running = running
        self._session: AsyncSession | None = None

    def __await__(self) -> Generator[Any, None, AsyncSession]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self._open()
        return self._session

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def _open(self) -> AsyncSession:
        call = AsyncSessionCall(self._stub, self._context)
        self._running[self._context.request_id] = call
        try:
            await call.ask(session_pb2.SessionRequest(open=self._opening), None)
        except BaseException:
            call.cancel()
            raise
        return AsyncSession(call, 0, self._defaults, self._running)


class AsyncSession:
    """A branch of a conversation whose keys and values stay warm on the server: a turn computes only what is new.

    `length` is that of the branch in tokens. Branches made by fork() share one call and generate at the same time,
    each read by a task of its own if wanted. A generation that nobody reads is held after 256 messages, and with it
    the other generations of this session, and only these. Leaving the `async with` block closes the branch; the call
    ends with the last of them.

    Made by AsyncClient.session() and fork().
    """

    def __init__(
        self,
        call: AsyncSessionCall,
        branch: int,
        defaults: Mapping[str, Any],
        running: MutableMapping[str, AsyncStream | AsyncSessionCall],
    ) -> None:
        self._call = call
        self._branch = branch
        self._defaults = defaults
        self._running = running
        self._closed = False

    @property
    def request_id(self) -> str:
        """Of the session, for cancel(), and as in the server's log."""
        return self._call.state.context.request_id

    @property
    def length(self) -> int:
        """Tokens of the branch, as far as messages have arrived."""
        return self._call.state.lengths[self._branch]

    async def append(self, prompt: Prompt, *, timeout: float | None = None) -> Appended:
        """Adds text, token ids or chat messages to the end of the branch; not while it generates.

        Text and token ids are added as they are. With chat messages the branch becomes what the model's chat template
        writes for the whole chat, in which what was generated is a message of the assistant. Where the template writes
        earlier turns otherwise than the branch has them, as when it leaves out thoughts, the branch changes from there
        on.
        """
        request = self._action()
        request.append.content.CopyFrom(prompt_message(prompt))
        appended = (await self._call.ask(request, timeout)).appended
        return Appended(tuple(appended.token_ids), appended.length)

    async def generate(self, *, timeout: float | None = None, **options: Unpack[GenerationOptions]) -> Completion:
        """Generates from the branch; what is generated becomes part of it.

        Args:
            timeout: seconds, after which the generation is interrupted. None: the session's; math.inf: no limit.
            options: override those of the session. See GenerationOptions.

        Raises:
            DraftwerkError: the generation failed. The session goes on, unless its call failed.
            TypeError: an option that does not exist.
        """
        async with self.stream(timeout=timeout, **options) as stream:
            return await stream.completion()

    def stream(self, *, timeout: float | None = None, **options: Unpack[GenerationOptions]) -> AsyncStream:
        """generate(), step by step. Leaving the stream early interrupts the generation."""
        request = self._action()
        request.generate.CopyFrom(session_generate(self._defaults, options))
        context = self._call.state.generation(timeout)
        mailbox = self._call.send(request)
        self._call.state.started(mailbox)
        generation = _AsyncGeneration(self._call, mailbox, context)
        stream = AsyncStream(context, read=generation.read, cancel=generation.cancel, leave=generation.leave)
        self._running[context.request_id] = stream
        return stream

    async def interrupt(self, *, timeout: float | None = None) -> None:
        """Ends the generation that runs on the branch; what was sent stays part of it."""
        request = self._action()
        request.interrupt.SetInParent()
        await self._call.ask(request, timeout)

    async def inject(self, content: str | Sequence[int], *, timeout: float | None = None) -> Injected:
        """Puts text or token ids behind what has been generated so far and lets the generation go on after them."""
        request = self._action()
        request.inject.content.CopyFrom(prompt_message(content))
        injected = (await self._call.ask(request, timeout)).injected
        return Injected(tuple(injected.token_ids), injected.position)

    async def fork(self, position: int | None = None, *, timeout: float | None = None) -> AsyncSession:
        """A new branch that starts as a copy of the first `position` tokens of this one, all by default."""
        request = self._action()
        request.fork.SetInParent()
        if position is not None:
            request.fork.position = position
        branch = (await self._call.ask(request, timeout)).forked.branch
        return AsyncSession(self._call, branch, self._defaults, self._running)

    async def close(self) -> None:
        """Ends the branch and what runs on it. Waits for the end of the call if it is the last. May be called again."""
        if not self._closed:
            self._closed = True
            if self._call.close_branch(self._branch):
                await self._call.wait_ended(_CLOSING_SECONDS)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if not self._closed and not self._call.loop.is_closed():
            self._call.loop.call_soon_threadsafe(self._call.close_branch, self._branch)

    def _action(self) -> session_pb2.SessionRequest:
        if self._closed:
            raise session_closed(self._call.state.context)
        return session_pb2.SessionRequest(branch=self._branch)
