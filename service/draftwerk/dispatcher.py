"""Brings the events of the native engine to the generations they belong to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
import time
from collections.abc import Callable

from draftwerk import _core
from draftwerk.generation import Generation
from draftwerk.requests import EngineClosed, EngineFailed, QueueFull, RequestError


class Dispatcher:
    """Takes the events of each engine step, in one wake-up, and hands each to its generation.

    Events are taken by an event loop (see deliver_on), or else by a thread of its own, started when it is first needed.
    Whoever takes events holds `lock` until they are delivered: none is lost or overtaken when another takes over.
    """

    def __init__(self, core: _core.Engine) -> None:
        self.core = core
        # Guards everything here, and the flow control of the generations. Reentrant, because the garbage collector may
        # close the engine in the middle of anything.
        self.lock = threading.RLock()
        self._running: dict[int, Generation] = {}
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._thread_wake = -1
        self._on_failure: Callable[[str], None] | None = None

    def submit(self, request: _core.Request, generation: Generation) -> None:
        # Under the lock, so that the first event cannot be routed before the generation is known.
        with self.lock:
            self._check_open()
            if self._thread is None and (self._loop is None or self._loop.is_closed()):
                self._start_thread()
            try:
                generation.request_id = self.core.submit(request)
            except _core.RequestError as error:
                raise RequestError(*error.args) from None
            except _core.QueueFull as error:
                raise QueueFull(*error.args) from None
            except _core.DeviceFailure as error:
                raise EngineFailed(*error.args) from None
            self._running[generation.request_id] = generation

    def cancel(self, request_id: int) -> None:
        with self.lock:
            if request_id in self._running and not self._closed:
                self.core.cancel(request_id)

    def open_conversation(self) -> int:
        with self.lock:
            self._check_open()
            return self.core.open_conversation()

    def deliver_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on `loop`, on which this is called, takes the events itself."""
        if asyncio.get_running_loop() is not loop:
            raise RuntimeError("deliver_on: must be called on the loop that it is given")
        with self.lock:
            self._check_open()
            if self._loop is loop:
                return
            self._stop_loop()
            thread = self._stop_thread()
            self._loop = loop
            loop.add_reader(self.core.event_fd(), self.take_events, loop)
        if thread is not None:
            thread.join()

    def when_failed(self, tell: Callable[[str], None] | None) -> None:
        """Calls `tell` with the reason once the device has failed, where events are taken, or at once."""
        with self.lock:
            self._on_failure = tell
            self._tell_of_failure()

    def check_may_block(self) -> None:
        """Raises RuntimeError where waiting would never end: on the thread of the loop that takes the events."""
        if self._loop is None:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self._loop:
            raise RuntimeError(
                "waiting here would never end, because this event loop itself brings the tokens: use `async for`, or "
                "await aresult()"
            )

    def close(self) -> None:
        """Stops the engine. What was running ends with EngineClosed."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
        self.core.close()
        with self.lock:
            self._stop_loop()
            thread = self._stop_thread()
            self.take_events()
            abandoned = list(self._running.values())
            self._running.clear()
            closed_at = time.perf_counter()
            _wake([g.deliver(EngineClosed("the engine was closed"), closed_at, True) for g in abandoned], None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")

    def take_events(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Delivers everything that has come. `loop`: the event loop that calls this, if one does."""
        with self.lock:
            events = self.core.wait_events(0.0)
            received_at = time.perf_counter()
            waiters = []
            if any(event.finish_reason == "error" for event in events):
                self._tell_of_failure()
            for event in events:
                request_id, reason = event.request_id, event.finish_reason
                generation = self._running.get(request_id)
                if generation is None:
                    continue
                if reason:
                    if self._closed and reason == "cancelled":
                        continue  # by the core because it closes: close() says so
                    del self._running[request_id]
                waiters.append(generation.deliver(event, received_at, reason != ""))
            _wake(waiters, loop)

    def _tell_of_failure(self) -> None:
        failure = self.core.failure()
        if failure and self._on_failure is not None:
            tell, self._on_failure = self._on_failure, None
            tell(failure)

    def _start_thread(self) -> None:
        self._thread_wake = os.eventfd(0, os.EFD_CLOEXEC)
        thread = threading.Thread(target=self._run, args=(self._thread_wake,), name="draftwerk-events", daemon=True)
        thread.start()
        self._thread = thread

    def _stop_thread(self) -> threading.Thread | None:
        """Tells the thread, if there is one, to end; returns it for joining."""
        thread, self._thread = self._thread, None
        if thread is not None:
            os.eventfd_write(self._thread_wake, 1)
        return thread

    def _stop_loop(self) -> None:
        """Tells the loop, if there is one, to take no more events."""
        loop, self._loop = self._loop, None
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it was closed
                loop.call_soon_threadsafe(loop.remove_reader, self.core.event_fd())

    def _run(self, wake: int) -> None:
        """The thread. `wake`: a descriptor that becomes readable when it is to end; the thread closes it."""
        poll = select.poll()
        poll.register(self.core.event_fd(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        try:
            while True:
                poll.poll()
                with self.lock:
                    if self._thread is not threading.current_thread():
                        return
                    self.take_events()
        finally:
            os.close(wake)


def _wake(waiters: list[asyncio.Future[None] | None], running: asyncio.AbstractEventLoop | None) -> None:
    """Wakes every waiting task: on `running` at once, on other event loops with one call for each loop."""
    elsewhere: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if waiter is None:
            continue
        loop = waiter.get_loop()
        if loop is running:
            if not waiter.done():
                waiter.set_result(None)
        else:
            elsewhere.setdefault(loop, []).append(waiter)
    for loop, its_waiters in elsewhere.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(_set_all, its_waiters)


def _set_all(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
