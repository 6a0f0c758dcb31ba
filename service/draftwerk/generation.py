"""A request in flight, as its owner sees it, and the thread that brings it its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Union, cast

from draftwerk import _core
from draftwerk.requests import EngineClosed, QueueFull, RequestError
from draftwerk.results import Chunk, Completion, FinishReason, GenerationError, GenerationStats, TokenLogprobs

if TYPE_CHECKING:
    from draftwerk.output_text import OutputText

_Delivery = tuple[Union[_core.Event, EngineClosed], float]  # an event, or the end of the engine; when it came
_Waiter = tuple[asyncio.AbstractEventLoop, asyncio.Event, bool]  # wake this; True: only for the last event


class Generation:
    """One request in flight: iterate for its chunks, or wait for its result. For one consumer at a time.

    Both work from threads (`for`, `result`) and from asyncio (`async for`, `aresult`). A result may be asked for after
    part of the chunks was read; it is always the whole completion.
    """

    def __init__(self, dispatcher: Dispatcher, prompt_token_ids: tuple[int, ...], text: OutputText | None) -> None:
        self.request_id = -1
        self.prompt_token_ids = prompt_token_ids
        self.submitted_at = time.perf_counter()
        self._dispatcher = dispatcher
        self._text = text
        self._deliveries: queue.SimpleQueue[_Delivery] = queue.SimpleQueue()
        self._last_delivered = threading.Event()
        self._waiter: _Waiter | None = None
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

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the engine is done with the request, reading nothing. False if `timeout` seconds passed."""
        return self._last_delivered.wait(timeout)

    def __iter__(self) -> Iterator[Chunk]:
        while self._finish_reason is None:
            yield self._read(self._deliveries.get())
        self._raise_failure()

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while self._finish_reason is None:
            yield self._read(await self._next_delivery())
        self._raise_failure()

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
        try:
            while not self.done:
                await self._wait_async(last_only=True)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._completion()

    # --- the dispatcher's side ---------------------------------------------------------------------------------

    def deliver(self, delivery: _Delivery) -> _Waiter | None:
        """Takes in one event; returns whom to wake for it, if anyone."""
        event, _ = delivery
        last = isinstance(event, EngineClosed) or event.finish_reason != ""
        self._deliveries.put(delivery)
        if last:
            self._last_delivered.set()
        waiter = self._waiter
        return waiter if waiter is not None and (last or not waiter[2]) else None

    # --- the consumer's side -----------------------------------------------------------------------------------

    async def _next_delivery(self) -> _Delivery:
        while True:
            try:
                return self._deliveries.get_nowait()
            except queue.Empty:
                await self._wait_async(last_only=False)

    async def _wait_async(self, *, last_only: bool) -> None:
        """Waits for something to be delivered, or for the last delivery; returns at once if that has happened."""
        wake = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), wake, last_only)
        try:
            # Looked at again after the waiter is in place: what came in between woke nobody.
            if not self.done and (last_only or self._deliveries.empty()):
                await wake.wait()
        finally:
            self._waiter = None

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


class Dispatcher:
    """Brings the events of the native engine to their generations: one thread, one wake-up per engine step."""

    def __init__(self, core: _core.Engine) -> None:
        self.core = core
        self._running: dict[int, Generation] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="draftwerk-events", daemon=True)
        self._thread.start()

    def submit(self, request: _core.Request, generation: Generation) -> None:
        # Under the lock, so that the first event cannot be routed before the generation is known.
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            try:
                generation.request_id = self.core.submit(request)
            except _core.RequestError as error:
                raise RequestError(*error.args) from None
            except _core.QueueFull as error:
                raise QueueFull(*error.args) from None
            self._running[generation.request_id] = generation

    def cancel(self, request_id: int) -> None:
        with self._lock:
            if request_id in self._running and not self._closed:
                self.core.cancel(request_id)

    def close(self) -> None:
        """Stops the engine. What was running ends with EngineClosed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.core.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            events = self.core.wait_events(60.0)
            received_at = time.perf_counter()
            with self._lock:
                if not events and self._closed:
                    break
                deliveries = [(self._running[e.request_id], e) for e in events if e.request_id in self._running]
                for event in events:
                    if event.finish_reason:
                        self._running.pop(event.request_id, None)
            _wake(generation.deliver((event, received_at)) for generation, event in deliveries)
        with self._lock:
            abandoned = list(self._running.values())
            self._running.clear()
        closed_at = time.perf_counter()
        _wake(g.deliver((EngineClosed("the engine was closed"), closed_at)) for g in abandoned)


def _wake(waiters: Iterator[_Waiter | None]) -> None:
    """Wakes every waiting task, with one call per event loop however many tasks it runs."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for waiter in waiters:
        if waiter is not None:
            by_loop.setdefault(waiter[0], []).append(waiter[1])
    for loop, wakes in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(_set_all, wakes)


def _set_all(wakes: list[asyncio.Event]) -> None:
    for wake in wakes:
        wake.set()
