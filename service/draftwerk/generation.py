"""A request in flight, as its owner sees it."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Union, cast

from draftwerk.requests import EngineClosed
from draftwerk.results import Chunk, Completion, FinishReason, GenerationError, GenerationStats, TokenLogprobs

if TYPE_CHECKING:
    from draftwerk import _core
    from draftwerk.dispatcher import Dispatcher
    from draftwerk.output_text import OutputText

_Delivery = tuple[Union["_core.Event", EngineClosed], float]  # an event, or the end of the engine; when it came


class Generation:
    """One request in flight: iterate for its chunks, or wait for its result. For one consumer at a time.

    Both work from threads (`for`, `result`) and from asyncio (`async for`, `aresult`). A result may be asked for after
    part of the chunks was read; it is always the whole completion.

    Attributes:
        request_id: the engine's number of this request.
        prompt_token_ids: what it continues.
        submitted_at: time.perf_counter() when it was submitted.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        prompt_token_ids: tuple[int, ...],
        text: OutputText | None,
        max_unread_tokens: int | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.request_id = -1
        self.prompt_token_ids = prompt_token_ids
        self.submitted_at = time.perf_counter()
        self._dispatcher = dispatcher
        self._text = text
        self._on_end = on_end  # called when the last chunk is read, by whoever reads it
        self._deliveries: queue.SimpleQueue[_Delivery] = queue.SimpleQueue()
        self._last_delivered = threading.Event()
        self._waiter: asyncio.Future[None] | None = None
        self._awaits_last = False
        # Flow control, guarded by the dispatcher's lock; None: never pauses.
        self._max_unread = max_unread_tokens
        self._unread = 0
        self._paused = False
        self._delivered = 0  # tokens; under that lock too
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._drafted: list[bool] = []
        self._logprobs: list[TokenLogprobs] = []
        self._has_logprobs = False
        self._finish_reason: FinishReason | None = None
        self._stats = GenerationStats()
        self._failure: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether the engine has finished with this request; what it produced may still be unread."""
        return self._last_delivered.is_set()

    def cancel(self) -> None:
        """Asks the engine to stop. The last chunk then says "cancelled", unless the request was done before."""
        self._dispatcher.cancel(self.request_id)

    def cancel_if(self, check: Callable[[int], None]) -> None:
        """Cancels the request, unless `check` raises: then it goes on as if nothing had been asked.

        Args:
            check: takes the number of tokens that were generated. While it decides no step begins, but one that has
                begun may bring more.
        """
        with self._dispatcher.lock:
            self._dispatcher.core.pause(self.request_id)
            try:
                self._dispatcher.take_events()
                check(self._delivered)
            except BaseException:
                if not self._paused:
                    self._dispatcher.core.resume(self.request_id)
                raise
            self.cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the engine is done with the request, reading nothing. False if `timeout` seconds passed.

        Lifts max_unread_tokens, as result() and aresult() do: whoever waits for the end does not read before it.
        """
        if self.done:
            return True
        self._dispatcher.check_may_block()
        self._lift_unread_limit()
        return self._last_delivered.wait(timeout)

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Chunk:
        if self._finish_reason is not None:
            self._raise_failure()
            raise StopIteration
        if self._deliveries.empty():
            self._dispatcher.check_may_block()
        return self._read(self._deliveries.get())

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Chunk:
        if self._finish_reason is not None:
            self._raise_failure()
            raise StopAsyncIteration
        while self._deliveries.empty():
            await self._wait_async(last_only=False)
        return self._read(self._deliveries.get_nowait())

    def result(self, timeout: float | None = None) -> Completion:
        """Waits for the end and returns the completion.

        Raises:
            TimeoutError: it took longer than `timeout` seconds; the request goes on.
            GenerationError: the request failed inside the engine.
            EngineClosed: the engine was closed first.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"request {self.request_id} is not done after {timeout} s")
        return self._completion()

    async def aresult(self) -> Completion:
        """Like result(), for asyncio. Cancelling the task that awaits this cancels the request."""
        self._lift_unread_limit()
        try:
            while not self.done:
                await self._wait_async(last_only=True)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._completion()

    # --- the dispatcher's side ---------------------------------------------------------------------------------

    def deliver(self, event: _core.Event | EngineClosed, received_at: float, last: bool) -> asyncio.Future[None] | None:
        """Takes in one event, under the dispatcher's lock; returns the future of whoever waits for it, if anyone."""
        self._deliveries.put((event, received_at))
        if last:
            self._last_delivered.set()
        else:
            tokens = len(cast("_core.Event", event).token_ids)
            self._delivered += tokens
            if self._max_unread is not None:
                self._unread += tokens
                if self._unread > self._max_unread and not self._paused:
                    self._paused = True
                    self._dispatcher.core.pause(self.request_id)
        waiter = self._waiter
        return waiter if last or not self._awaits_last else None

    # --- the consumer's side -----------------------------------------------------------------------------------

    async def _wait_async(self, *, last_only: bool) -> None:
        """Waits for something to be delivered, or for the last delivery; returns at once if that has happened."""
        self._awaits_last = last_only
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        try:
            # Looked at again after the waiter is in place: what came in between woke nobody.
            if not self.done and (last_only or self._deliveries.empty()):
                await waiter
        finally:
            self._waiter = None

    def _count_read(self, tokens: int) -> None:
        with self._dispatcher.lock:
            self._unread -= tokens
            if self._paused and self._unread == 0:
                self._resume()

    def _lift_unread_limit(self) -> None:
        with self._dispatcher.lock:
            self._max_unread = None
            if self._paused:
                self._resume()

    def _resume(self) -> None:
        self._paused = False
        self._dispatcher.core.resume(self.request_id)

    def _completion(self) -> Completion:
        while self._finish_reason is None:
            self._read(self._deliveries.get())
        self._raise_failure()
        return Completion(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            drafted=tuple(self._drafted),
            logprobs=tuple(self._logprobs) if self._has_logprobs else None,
            prompt_token_ids=self.prompt_token_ids,
            stats=self._stats,
        )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _read(self, delivery: _Delivery) -> Chunk:
        event, received_at = delivery
        if isinstance(event, EngineClosed):
            self._finish_reason, self._failure = "error", event
            raise event
        reason = cast("FinishReason | None", event.finish_reason or None)
        token_ids, drafted = tuple(event.token_ids), tuple(event.drafted)
        if self._max_unread is not None and reason is None:
            self._count_read(len(token_ids))
        text = ""
        if self._text is not None:
            if reason is None:
                text = self._text.push(token_ids)
            elif reason == "stop" and event.text_bytes < 0:  # an end token or stop token: no part of the text
                text = self._text.finish(token_ids[:-1])
            else:
                text = self._text.finish(token_ids, event.text_bytes)
        logprobs = None
        if event.logprobs:
            top = event.top_logprobs or [[] for _ in event.logprobs]
            logprobs = tuple(TokenLogprobs(p, tuple(t)) for p, t in zip(event.logprobs, top, strict=True))
            self._logprobs.extend(logprobs)
            self._has_logprobs = True
        self._texts.append(text)
        self._token_ids.extend(token_ids)
        self._drafted.extend(drafted)
        if reason is not None:
            self._finish_reason = reason
            self._stats = GenerationStats.from_native(event.stats)
            if reason == "error":
                self._failure = GenerationError(f"request {self.request_id} failed: {event.error}")
            if self._on_end is not None:
                self._on_end()
        return Chunk(
            text=text,
            token_ids=token_ids,
            drafted=drafted,
            position=event.position,
            received_at=received_at,
            logprobs=logprobs,
            finish_reason=reason,
            stats=self._stats if reason is not None else None,
        )


class Stream(Iterator[Chunk]):
    """The chunks of one request. Closing it cancels the request, and so does dropping it, read or unread."""

    # No generator: one that was never begun skips its `finally`.

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __next__(self) -> Chunk:
        try:
            return next(self._generation)
        except BaseException:  # also Ctrl-C
            self.close()
            raise

    def close(self) -> None:
        """Asks the engine to stop. What is still read ends with "cancelled", unless the request was done before."""
        self._generation.cancel()

    def __del__(self) -> None:
        self.close()
