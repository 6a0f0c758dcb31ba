"""One call of Generation.Session: reads actions, keeps the branches, answers in order."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog

from draftwerk.engine import Engine
from draftwerk.requests import Chat, RequestError, SamplingParams
from draftwerk.server.branch import Branch, BranchGeneration, check_room
from draftwerk.server.calls import Call
from draftwerk.server.chat_history import ChatHistory, common_beginning, tokens_of_chat
from draftwerk.server.conversion import (
    check_known_fields,
    check_model,
    off_loop_if_long,
    prompt_of,
    render_chat,
    sampling_params,
    token_ids_of,
)
from draftwerk.server.errors import InvalidField, OutOfOrder, ShuttingDown, is_foreseen, to_proto
from draftwerk.server.metrics import Metrics
from draftwerk.server.responses import spelling
from draftwerk_client.v1 import parameters_pb2
from draftwerk_client.v1 import session_pb2 as pb

MAX_BRANCHES = 64

_log = structlog.stdlib.get_logger("draftwerk.session")


class Session:
    """The branches of one call, and the loop over its actions.

    Actions are done one after the other, in the order in which they come; generations run beside them, each as a task.
    All messages pass through `_send`, one at a time and in the order in which they ask to. That is also what bounds the
    memory of a session whose client does not read: each generation, and the loop over the actions, waits there with
    one message, and the engine pauses what nobody reads.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        model_name: str,
        max_unread_tokens: int,
        draining: asyncio.Event,
        call: Call,
        context: Any,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._model_name = model_name
        self._max_unread_tokens = max_unread_tokens
        self._draining = draining
        self._call = call
        self._context = context
        self._writing = asyncio.Lock()
        self._defaults: pb.SessionRequest.Open | None = None
        self._last_request_number = 0
        self._branches: dict[int, Branch] = {}
        self._next_branch = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._generations = 0
        self._actions: dict[str, Callable[[pb.SessionRequest], Awaitable[None]]] = {
            "append": self._append,
            "generate": self._generate,
            "interrupt": self._interrupt,
            "inject": self._inject,
            "fork": self._fork,
            "close": self._close,
        }

    async def run(self) -> None:
        """Serves the call to its end: until the client has ended its side, or the server drains, and nothing runs.

        Raises:
            OutOfOrder, InvalidField, ModelNotFound: the client broke the protocol, or asked for what cannot be opened.
            ShuttingDown: the server drains.
        """
        reading = asyncio.create_task(self._read_actions())
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
            while self._tasks and not (reading.done() and reading.exception()):
                unfinished: set[asyncio.Task[None]] = self._tasks if reading.done() else {reading, *self._tasks}
                await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise _shutting_down()
            reading.result()
        finally:
            await self._end(reading, draining)

    async def _read_actions(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            self._check_protocol(request)
            if self._defaults is None:
                await self._open(request)
                continue
            try:
                await self._actions[request.WhichOneof("action")](request)
            except Exception as error:
                await self._send_error(request.request_number, request.branch, error)

    def _check_protocol(self, request: pb.SessionRequest) -> None:
        """What a client must never get wrong; anything else is answered and the session goes on."""
        check_known_fields(request)
        action = request.WhichOneof("action")
        if request.request_number <= self._last_request_number:
            raise InvalidField(
                "request_number", request.request_number, f"more than {self._last_request_number}, which was the last"
            )
        self._last_request_number = request.request_number
        if action is None:
            raise InvalidField("action", "absent", f"open or one of {', '.join(self._actions)}")
        if action == "open" and self._defaults is not None:
            raise OutOfOrder("the session is open already", "session", "send open once, as the first action")
        if action != "open" and self._defaults is None:
            raise OutOfOrder(f"{action} came before open", "session", "send open as the first action")

    # --- actions -----------------------------------------------------------------------------------------------

    async def _open(self, request: pb.SessionRequest) -> None:
        defaults = request.open
        if request.branch != 0:
            raise InvalidField("branch", request.branch, "0: open makes branch 0")
        check_model(defaults.model, self._model_name)
        self._params(defaults, pb.SessionRequest.Generate(), room=self._engine.info.max_context)
        self._defaults = defaults
        self._add_branch(array("i"), ChatHistory())
        await self._answer(request, opened=pb.SessionResponse.Opened(request_id=self._call.request_id))

    async def _append(self, request: pb.SessionRequest) -> None:
        self._refuse_when_draining()
        branch = self._idle_branch(request)
        content = request.append.content
        if content.HasField("messages") and (branch.chat or not branch.tokens):
            token_ids = await self._append_chat(branch, content)
        else:
            token_ids = await token_ids_of(
                content, self._engine, "content", add_bos=not branch.tokens, after=branch.tokens
            )
            check_room("content", len(token_ids), room=self._engine.info.max_context - len(branch.tokens))
            branch.tokens.extend(token_ids)
        appended = pb.SessionResponse.Appended(token_ids=token_ids, length=len(branch.tokens))
        await self._answer(request, appended=appended)

    async def _append_chat(self, branch: Branch, content: parameters_pb2.Prompt) -> Sequence[int]:
        """Makes the branch what its chat is with more messages. Returns the tokens that are new."""
        chat, size = branch.chat, content.ByteSize()

        def encode() -> tuple[Chat, list[int]]:
            more = prompt_of(content, self._engine, "content")
            assert isinstance(more, Chat)
            whole = chat.continued(branch.tokens, more, size, self._engine, "content")
            text = render_chat(whole, self._engine, "content")
            try:
                return whole, tokens_of_chat(text, branch.tokens, self._engine)
            except RequestError as error:
                raise InvalidField("content.messages", error.value, error.allowed) from None

        # Of what was generated, the tokens are a measure.
        whole, token_ids = await off_loop_if_long(chat.size + size + 4 * len(branch.tokens), encode)
        position = common_beginning(branch.tokens, token_ids)
        new = token_ids[position:]
        check_room("content", len(new), room=self._engine.info.max_context - position)
        chat.add(whole, len(token_ids), size=size, unchanged=position)
        del branch.tokens[position:]
        branch.tokens.extend(new)
        return new

    async def _generate(self, request: pb.SessionRequest) -> None:
        self._refuse_when_draining()
        branch = self._idle_branch(request)
        subject = f"branch {branch.number}"
        room = self._engine.info.max_context - len(branch.tokens)
        if not branch.tokens:
            raise OutOfOrder(f"{subject} is empty", subject, "append to it first")
        if room < 1:
            raise OutOfOrder(
                f"{subject} has {len(branch.tokens)} tokens, which is all that a sequence may have",
                subject,
                "fork it at an earlier position and generate from there",
            )
        assert self._defaults is not None
        output = request.generate.output if request.generate.HasField("output") else self._defaults.output
        generation = BranchGeneration(
            request.request_number,
            branch,
            self._params(self._defaults, request.generate, room),
            self._engine,
            self._metrics,
            self._max_unread_tokens,
            spelling(output, self._engine),
            self._send,
        )
        branch.generating = generation
        self._generations += 1
        task = generation.task = asyncio.create_task(self._run_generation(branch, generation))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        task.add_done_callback(lambda _: generation.leave())  # also if it was cancelled before it began

    async def _interrupt(self, request: pb.SessionRequest) -> None:
        branch, generation = self._generating_branch(request)
        await _stop(generation)
        await self._answer(request, interrupted=pb.SessionResponse.Interrupted(length=len(branch.tokens)))

    async def _inject(self, request: pb.SessionRequest) -> None:
        branch, generation = self._generating_branch(request)
        content = request.inject.content
        if content.HasField("messages"):
            raise InvalidField("content.messages", "given", "text or token_ids: a generation has no turns")
        token_ids = await token_ids_of(content, self._engine, "content", add_bos=False)
        if branch.generating is not generation or not await generation.inject(request.request_number, token_ids):
            raise self._not_generating(branch)

    async def _fork(self, request: pb.SessionRequest) -> None:
        branch = self._branch(request)
        length = len(branch.tokens)
        position = request.fork.position if request.fork.HasField("position") else length
        if not 0 <= position <= length:
            raise InvalidField("position", position, f"0 to {length}, the length of branch {branch.number}")
        if len(self._branches) == MAX_BRANCHES:
            raise OutOfOrder(
                f"the session has {MAX_BRANCHES} branches, which is all that it may have",
                "session",
                "close one that is not needed any more, or open another session",
            )
        copy = self._add_branch(branch.tokens[:position], branch.chat.up_to(position))
        await self._answer(request, forked=pb.SessionResponse.Forked(branch=copy.number, length=position))

    async def _close(self, request: pb.SessionRequest) -> None:
        branch = self._branch(request)
        if branch.generating is not None:
            await _stop(branch.generating)
        del self._branches[branch.number]
        branch.conversation.close()
        await self._answer(request, closed=pb.SessionResponse.Closed())

    # --- branches ----------------------------------------------------------------------------------------------

    def _add_branch(self, tokens: array[int], chat: ChatHistory) -> Branch:
        branch = Branch(self._next_branch, self._engine.conversation(), tokens, chat)
        self._branches[branch.number] = branch
        self._next_branch += 1
        return branch

    def _branch(self, request: pb.SessionRequest) -> Branch:
        branch = self._branches.get(request.branch)
        if branch is None:
            subject = f"branch {request.branch}"
            if 0 <= request.branch < self._next_branch:
                raise OutOfOrder(f"{subject} is closed", subject, "act on a branch that is open")
            raise OutOfOrder(f"there is no {subject}", subject, "act on branch 0, or on one that `forked` has named")
        return branch

    def _idle_branch(self, request: pb.SessionRequest) -> Branch:
        branch = self._branch(request)
        if branch.generating is not None:
            subject = f"branch {branch.number}"
            raise OutOfOrder(
                f"{subject} is generating, since request {branch.generating.request_number}",
                subject,
                "wait for the message with the finish reason, interrupt it, or fork the branch",
            )
        return branch

    def _generating_branch(self, request: pb.SessionRequest) -> tuple[Branch, BranchGeneration]:
        branch = self._branch(request)
        if branch.generating is None:
            raise self._not_generating(branch)
        return branch, branch.generating

    def _not_generating(self, branch: Branch) -> OutOfOrder:
        subject = f"branch {branch.number}"
        return OutOfOrder(
            f"{subject} is not generating", subject, "do this between `generate` and the message with the finish reason"
        )

    def _refuse_when_draining(self) -> None:
        if self._draining.is_set():
            raise _shutting_down()

    def _params(self, defaults: pb.SessionRequest.Open, own: pb.SessionRequest.Generate, room: int) -> SamplingParams:
        return sampling_params(
            own.sampling if own.HasField("sampling") else defaults.sampling,
            own.stop if own.HasField("stop") else defaults.stop,
            own.drafting if own.HasField("drafting") else defaults.drafting,
            own.output if own.HasField("output") else defaults.output,
            defaults.cache_salt,
            room,
        )

    # --- generations -------------------------------------------------------------------------------------------

    async def _run_generation(self, branch: Branch, generation: BranchGeneration) -> None:
        try:
            await generation.run()
        except Exception as error:
            branch.generating = None
            await self._send_error(generation.request_number, branch.number, error)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it could not be sent: the call is over, and nobody is left to tell

    # --- messages ----------------------------------------------------------------------------------------------

    async def _answer(self, request: pb.SessionRequest, **event: Any) -> None:
        await self._send(pb.SessionResponse(request_number=request.request_number, branch=request.branch, **event))

    async def _send_error(self, request_number: int, branch: int, error: Exception) -> None:
        if self._context.done():
            raise error  # the client is gone, and a write told of it
        if isinstance(error, grpc.aio.InternalError):
            return  # a write failed: the client is gone, and the call ends by itself
        if not is_foreseen(error):
            _log.error("an action failed", request_id=self._call.request_id, exc_info=error)
        status = to_proto(self._call.status_of(error))
        await self._send(pb.SessionResponse(request_number=request_number, branch=branch, error=status))

    async def _send(self, response: pb.SessionResponse) -> None:
        async with self._writing:  # grpc takes one message at a time; the lock keeps the order of those who wait
            await self._context.write(response)

    async def _end(self, *tasks: asyncio.Task[Any]) -> None:
        """Stops whatever still runs and frees what the branches hold."""
        unfinished = [*tasks, *self._tasks]
        for task in unfinished:
            task.cancel()
        for branch in self._branches.values():
            if branch.generating is not None:
                branch.generating.cancel()
            branch.conversation.close()
        self._call.note(branches=self._next_branch, generations=self._generations)
        await asyncio.gather(*unfinished, return_exceptions=True)


def _shutting_down() -> ShuttingDown:
    return ShuttingDown("the server is shutting down; open the session again, here or at another one")


async def _stop(generation: BranchGeneration) -> None:
    """Ends a generation and waits until its last message has been sent."""
    assert generation.task is not None
    generation.cancel()
    await asyncio.wait({generation.task})
