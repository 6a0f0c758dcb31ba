"""A conversation: what keeps the keys and values of one request warm for the next."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draftwerk.dispatcher import Dispatcher


class Conversation:
    """Requests that continue each other, one at a time: Engine.submit(..., conversation=...).

    When a request ends, its keys and values stay; a next one whose prompt begins with the same tokens computes only
    what is new. This saves time and changes nothing else. What is kept may be given up when memory is short.

    A context manager; closing it gives back what it keeps.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.id = dispatcher.open_conversation()
        self._dispatcher = dispatcher
        # Straight to the core, which any thread may call at any time: the garbage collector must not wait for locks.
        self._finalizer = weakref.finalize(self, dispatcher.core.close_conversation, self.id)

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._finalizer.alive

    def belongs_to(self, dispatcher: Dispatcher) -> bool:
        """Whether it was opened with this engine."""
        return self._dispatcher is dispatcher

    def close(self) -> None:
        """Gives back what is kept. A request that still runs goes on."""
        self._finalizer()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
