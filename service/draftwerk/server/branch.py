"""One branch of a session: its tokens, and the generation that runs on it."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from draftwerk.conversation import Conversation
from draftwerk.engine import Engine
from draftwerk.generation import Generation
from draftwerk.requests import SamplingParams, output_fingerprint
from draftwerk.results import Chunk, FinishReason, GenerationStats
from draftwerk.server.chat_history import ChatHistory
from draftwerk.server.errors import InvalidField
from draftwerk.server.metrics import Metrics
from draftwerk.server.responses import Spell, generate_response, joined_stats
from draftwerk_client.v1 import session_pb2 as pb

Send = Callable[[pb.SessionResponse], Awaitable[None]]


class Branch:
    """A sequence of tokens whose keys and values the engine keeps warm between generations."""

    def __init__(self, number: int, conversation: Conversation, tokens: array[int], chat: ChatHistory) -> None:
        self.number = number
        self.conversation = conversation
        self.tokens = tokens
        """What was appended and generated so far; of a running generation, all that has been handed to the client."""
        self.chat = chat
        """What the tokens are the chat of; empty if they are none."""
        self.generating: BranchGeneration | None = None
        """Until its last message is on its way."""


@dataclass(eq=False)
class Injection:
    """Tokens to put into a running generation."""

    request_number: int
    token_ids: Sequence[int]
    outcome: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the tokens are in. Stays open if the generation ends first."""


class BranchGeneration:
    """What answers one `generate`. Runs as one request of the engine, or with injections as several in a row.

    Raises:
        RequestError: the parameters name something out of range.
        QueueFull: too much is waiting already.
        EngineClosed: the engine was closed.
    """

    def __init__(
        self,
        request_number: int,
        branch: Branch,
        params: SamplingParams,
        engine: Engine,
        metrics: Metrics,
        max_unread_tokens: int,
        spell: Spell | None,
        send: Send,
    ) -> None:
        self.request_number = request_number
        self._branch = branch
        self._params = params
        self._engine = engine
        self._metrics = metrics
        self._max_unread_tokens = max_unread_tokens
        self._spell = spell
        self._send = send
        self._generated = 0
        self._ended = False
        self._parts: list[tuple[float, GenerationStats]] = []
        self._previous_at: float | None = None
        self._injection: Injection | None = None
        self._request = self._submit(params)
        self._submitted_at = self._request.submitted_at
        self.task: asyncio.Task[None] | None = None
        """What runs run()."""

    async def run(self) -> None:
        """Sends what is generated, up to and including the message with the finish reason.

        Raises:
            GenerationError: the generation failed inside the engine.
            EngineClosed: the engine was closed.
        """
        while (injection := await self._run_request()) is not None:
            await self._inject(injection)

    def cancel(self) -> None:
        """Asks the engine to stop; the last message then says so, unless the generation was done before."""
        self._request.cancel()

    def leave(self) -> None:
        """Cancels what still runs, and counts it if its end was not told. For when run() is over."""
        self.cancel()
        if not self._ended:
            self._observe_end(None, "cancelled")

    async def inject(self, request_number: int, token_ids: Sequence[int]) -> bool:
        """Puts tokens after what has been generated so far, and answers. False if the generation ended before that.

        Raises:
            InvalidField: the context may not take as many tokens. The generation goes on as if it had not been asked.
        """
        assert self.task is not None
        info, start = self._engine.info, len(self._request.prompt_token_ids)

        def check(generated: int) -> None:
            # Decided before anything ends: what is resubmitted has lost its penalties, and what its stop strings held.
            longest = start + generated + info.max_draft_length + 1  # with the step that may be under way
            check_room("content", len(token_ids), room=info.max_context - 1 - longest)

        self._request.cancel_if(check)
        injection = self._injection = Injection(request_number, token_ids)
        await asyncio.wait({injection.outcome, self.task}, return_when=asyncio.FIRST_COMPLETED)
        return injection.outcome.done()

    async def _run_request(self) -> Injection | None:
        """Sends what one request of the engine generates. Returns the injection that ended it, if one did."""
        branch = self._branch
        async for chunk in self._request:
            if chunk.finish_reason == "error":
                self._observe_end(chunk.stats, chunk.finish_reason)
                continue  # the iteration raises it next
            if chunk.token_ids:
                self._metrics.observe_chunk(self._submitted_at, self._previous_at, chunk)
                self._previous_at = chunk.received_at
                self._generated += len(chunk.token_ids)
                # Before it is sent, for whoever forks meanwhile: messages leave in the order in which they ask to.
                branch.tokens.extend(chunk.token_ids)
            injection = None
            if chunk.finish_reason is not None:
                injection = self._injection if chunk.finish_reason == "cancelled" else None
                chunk = self._end_of_part(chunk, ends=injection is None)
            if injection is None or chunk.token_ids or chunk.text:
                await self._send_chunk(chunk)
            if injection is not None:
                return injection
        return None

    def _end_of_part(self, chunk: Chunk, *, ends: bool) -> Chunk:
        """The last chunk of a request as the client gets it: the end of the generation, or nothing special."""
        assert chunk.stats is not None
        self._parts.append((self._request.submitted_at, chunk.stats))
        if not ends:
            return replace(chunk, finish_reason=None, stats=None)
        # From here on the branch takes further actions: the client may send them as soon as it has this message.
        self._branch.generating = None
        if len(self._parts) > 1:
            chunk = replace(chunk, stats=joined_stats(self._parts))
        assert chunk.stats is not None and chunk.finish_reason is not None
        self._observe_end(chunk.stats, chunk.finish_reason)
        return chunk

    def _observe_end(self, stats: GenerationStats | None, finish_reason: FinishReason) -> None:
        self._ended = True
        self._metrics.observe_end(stats, finish_reason)

    async def _send_chunk(self, chunk: Chunk) -> None:
        generated = generate_response(chunk, self._fingerprint, self._spell)
        await self._send(
            pb.SessionResponse(request_number=self.request_number, branch=self._branch.number, generated=generated)
        )

    async def _inject(self, injection: Injection) -> None:
        """Adds the tokens and goes on after them."""
        self._injection = None
        tokens = self._branch.tokens
        injected = pb.SessionResponse.Injected(token_ids=injection.token_ids, position=len(tokens))
        tokens.extend(injection.token_ids)
        await self._send(
            pb.SessionResponse(request_number=injection.request_number, branch=self._branch.number, injected=injected)
        )
        try:
            # Never refused for want of room: the generation was accepted, and so were these tokens.
            self._request = self._submit(self._remaining_params(), continues=True)
        finally:
            injection.outcome.set_result(None)

    def _remaining_params(self) -> SamplingParams:
        """The parameters for what is left of the generation."""
        room = self._engine.info.max_context - len(self._branch.tokens)
        max_tokens = min(self._params.max_tokens - self._generated, room)
        min_tokens = min(max(0, self._params.min_tokens - self._generated), max_tokens)
        return replace(self._params, max_tokens=max_tokens, min_tokens=min_tokens)

    def _submit(self, params: SamplingParams, *, continues: bool = False) -> Generation:
        branch = self._branch
        request = self._engine.submit(
            branch.tokens,
            params,
            conversation=branch.conversation,
            continues=continues,
            max_unread_tokens=self._max_unread_tokens,
        )
        self._fingerprint = output_fingerprint(self._engine.info.fingerprint, request.prompt_token_ids, params)
        return request


def check_room(path: str, tokens: int, room: int) -> None:
    """Refuses to make a branch longer than the context.

    Args:
        path: of the field that adds the tokens.
        tokens: how many it adds.
        room: how many fit.

    Raises:
        InvalidField: they do not fit.
    """
    if tokens > room:
        raise InvalidField(path, f"{tokens} tokens", f"at most {max(0, room)}, which is what the context has left")
