"""What a session knows without talking to anybody: numbers, who waits for which answer, how long its branches are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any

from draftwerk_client.channel import timeout_of
from draftwerk_client.errors import CallContext, from_status
from draftwerk_client.v1 import session_pb2

MAX_UNREAD_MESSAGES = 256
"""Messages of one generation that are kept for a slow reader before the session's call is read no further."""


class Mailbox:
    """One action, and what has been answered and not yet read."""

    __slots__ = ("complete", "discarded", "messages", "request")

    def __init__(self, request: session_pb2.SessionRequest) -> None:
        self.request = request
        self.messages: deque[session_pb2.SessionResponse] = deque()
        self.complete = False
        """The last message has arrived."""
        self.discarded = False
        """Nobody will read what arrives."""


class SessionState:
    """The state of one session's call. Safe to use from one sending and one receiving thread at a time."""

    def __init__(self, context: CallContext) -> None:
        self.context = context
        self.lengths: dict[int, int] = {0: 0}
        """Tokens of each branch, as far as messages have arrived."""
        self.open_branches = {0}
        self._mailboxes: dict[int, Mailbox] = {}
        self._latest: dict[int, Mailbox] = {}
        self._numbers = count(1)
        self._generations = count(1)

    def action(self, timeout: float | None) -> CallContext:
        """The context of an action that takes at most `timeout` seconds (None: as the session says)."""
        return CallContext(self.context.request_id, self.context.target, timeout_of(timeout, self.context.timeout))

    def generation(self, timeout: float | None) -> CallContext:
        """The same for a generation, which has an id of its own: that of the session, and its ordinal in it."""
        request_id = f"{self.context.request_id}/{next(self._generations)}"
        return CallContext(request_id, self.context.target, timeout_of(timeout, self.context.timeout))

    def started(self, mailbox: Mailbox) -> None:
        """This generation is now the one of its branch that an interrupt ends."""
        self._latest[mailbox.request.branch] = mailbox

    def interrupt_of(self, mailbox: Mailbox) -> session_pb2.SessionRequest | None:
        """What ends this generation; None if it is over, or if an interrupt would hit one that was started after it."""
        latest = self._latest.get(mailbox.request.branch)
        if mailbox.complete or (latest is not None and latest is not mailbox and not latest.complete):
            return None
        request = session_pb2.SessionRequest(branch=mailbox.request.branch)
        request.interrupt.SetInParent()
        return request

    def generation_on(self, branch: int) -> Mailbox | None:
        """The generation of this branch that was started last."""
        return self._latest.get(branch)

    def closed(self, branch: int) -> bool:
        """Notes that this branch is closed. Whether it was the last one."""
        self.open_branches.discard(branch)
        return not self.open_branches

    def numbered(self, mailbox: Mailbox) -> session_pb2.SessionRequest:
        """The request as it is sent. From now on its mailbox gets the answers."""
        number = next(self._numbers)
        mailbox.request.request_number = number
        self._mailboxes[number] = mailbox
        return mailbox.request

    def receiver(self, response: session_pb2.SessionResponse) -> Mailbox | None:
        """Who gets this message, if anybody. Keeps the lengths of the branches. Runs once for each engine step."""
        mailbox = self._mailboxes.get(response.request_number)
        event = response.WhichOneof("event")
        if event == "generated":
            generated = response.generated
            self.lengths[response.branch] = generated.position + len(generated.token_ids)
            last = generated.finish_reason != 0
        else:
            last = True
            if event == "appended":
                self.lengths[response.branch] = response.appended.length
            elif event == "interrupted":
                self.lengths[response.branch] = response.interrupted.length
            elif event == "injected":
                self.lengths[response.branch] = response.injected.position + len(response.injected.token_ids)
            elif event == "forked" and mailbox is not None and not mailbox.discarded:
                self.lengths[response.forked.branch] = response.forked.length
                self.open_branches.add(response.forked.branch)
        if mailbox is None:
            return None
        if last:
            mailbox.complete = True
            del self._mailboxes[response.request_number]
        return None if mailbox.discarded else mailbox

    def must_wait(self, mailbox: Mailbox, awaited: int) -> bool:
        """Whether the call must be read no further before this mailbox has room.

        Args:
            awaited: actions whose answer somebody waits for. It may be behind the unread messages, and the one who
                waits may be the one who should read them.
        """
        return len(mailbox.messages) >= MAX_UNREAD_MESSAGES and not mailbox.discarded and not awaited

    def checked(self, response: session_pb2.SessionResponse, context: CallContext) -> session_pb2.SessionResponse:
        """The response, unless it is an error.

        Raises:
            DraftwerkError: it is one.
        """
        if response.HasField("error"):
            raise from_status(response.error, context)
        return response


class BranchedCall(ABC):
    """What the calls of sessions do alike in both clients, however they send and receive."""

    state: SessionState

    @abstractmethod
    def send(self, request: session_pb2.SessionRequest) -> Mailbox:
        """Sends an action. Never waits."""

    @abstractmethod
    def discard(self, mailbox: Mailbox) -> None:
        """What is still to come for this mailbox is dropped."""

    @abstractmethod
    def end_requests(self) -> None:
        """No more actions will be sent. Never waits."""

    def close_branch(self, branch: int) -> bool:
        """Closes a branch without waiting. Whether it was the last one, so that the call ends."""
        generation = self.state.generation_on(branch)
        if generation is not None:
            self.discard(generation)
        request = session_pb2.SessionRequest(branch=branch)
        request.close.SetInParent()
        self.send(request)
        last = self.state.closed(branch)
        if last:
            self.end_requests()
        return last


class BranchGeneration:
    """One generation of a session, as its stream sees it: how it ends early. How it is read, the clients add."""

    _call: BranchedCall
    _mailbox: Mailbox

    def cancel(self) -> None:
        """Interrupts it; what it has sent can still be read."""
        request = self._call.state.interrupt_of(self._mailbox)
        if request is not None:
            self._call.discard(self._call.send(request))

    def leave(self) -> None:
        """Interrupts it; nobody will read it any more."""
        self.cancel()
        self._call.discard(self._mailbox)


def generation_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of a session those that a generation may override, and then sends as a whole part of a request.

    The others stay with the server.
    """
    return {name: value for name, value in options.items() if name not in ("salt", "model")}
