"""The conversations of a chat: branches of one session, what was said in each, and what says more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from draftwerk_client import Chat, Chunk, DraftwerkError, Session, Unavailable, read_reply


class TurnRefused(Exception):
    """A message that got no answer, or only part of one. The conversation is as it was before the message."""


@dataclass
class Turn:
    """What one side said."""

    role: str
    text: str
    """Of an answer of a model whose chat template knows thinking or tools: with the names of control tokens."""

    def message(self) -> dict[str, Any]:
        """What was said as a chat message."""
        return {"role": self.role, "content": self.text} if self.role == "user" else read_reply(self.text).message()


@dataclass
class Branch:
    """One conversation."""

    number: int
    session: Session
    """The branch of the session that holds the conversation's tokens."""
    system: str | None
    """What the model is told before the first message."""
    turns: list[Turn] = field(default_factory=list)


class Conversations:
    """All conversations of one chat; one of them is current.

    Args:
        root: the session as it was opened. It stays empty: every conversation is a fork of it or of another one.
        has_chat_template: otherwise what is said is one text that goes on, a line for each message.
        system: what the model is told before the first message.
        thinking: whether the model is to think before it answers. None: as its chat template has it.
    """

    def __init__(
        self, root: Session, *, has_chat_template: bool, system: str | None, thinking: bool | None = None
    ) -> None:
        self._root = root
        self._reserve = root.fork(0)  # its place is for taking back a message where the session has no other left
        self._has_chat_template = has_chat_template
        self.thinking = thinking
        self.branches: dict[int, Branch] = {}
        self.current = self.begin(system)

    def begin(self, system: str | None) -> Branch:
        """Makes an empty conversation current; the others stay."""
        return self.go_to(self._add(self._root.fork(0), system, []).number)

    def fork(self) -> Branch:
        """Keeps a copy of the current conversation, which stays current.

        Returns:
            The copy.
        """
        origin = self.current
        return self._add(origin.session.fork(), origin.system, [Turn(turn.role, turn.text) for turn in origin.turns])

    def go_to(self, number: int) -> Branch:
        """Makes another conversation current.

        Raises:
            KeyError: there is no such branch.
        """
        self.current = self.branches[number]
        return self.current

    def say(self, text: str, parameters: Mapping[str, Any]) -> Iterator[Chunk]:
        """Adds a user's message to the current conversation and generates the answer, which becomes part of it.

        Raises:
            TurnRefused: the server took the message or its parameters amiss, or the answer failed.
            DraftwerkError: the session is lost.
        """
        branch = self.current
        length, turns = branch.session.length, len(branch.turns)
        unchanged = length  # how many tokens of the branch are those from before the message
        try:
            unchanged = min(length, branch.session.append(self._content(branch, text)).position)
            answer = Turn("assistant", "")
            branch.turns += [Turn("user", text), answer]
            for chunk in branch.session.stream(**parameters):
                answer.text += chunk.text
                yield chunk
        except Unavailable:
            raise
        except DraftwerkError as error:
            del branch.turns[turns:]
            self._restore(branch, length, unchanged)
            raise TurnRefused(str(error)) from error

    def interrupt(self) -> None:
        """Ends the answer that the current conversation generates; what was said of it stays."""
        self.current.session.interrupt()

    def _restore(self, branch: Branch, length: int, unchanged: int) -> None:
        """Gives a branch the tokens back that it had before a message; fails if it is the session that failed."""
        refused = branch.session
        self._reserve.close()
        if unchanged == length:
            branch.session = refused.fork(length)
        else:  # the message made the chat template write earlier turns otherwise
            branch.session = self._root.fork(0)
            branch.session.append(self._chat(branch, [turn.message() for turn in branch.turns]))
        refused.close()
        self._reserve = self._root.fork(0)

    def _add(self, session: Session, system: str | None, turns: list[Turn]) -> Branch:
        branch = Branch(len(self.branches), session, system, turns)
        self.branches[branch.number] = branch
        return branch

    def _content(self, branch: Branch, text: str) -> str | Chat:
        """What to append for a message: with the first one goes the system's."""
        first = not branch.turns
        if self._has_chat_template:
            said = [Turn("user", text).message()]
            return self._chat(branch, said) if first else Chat(said, enable_thinking=self.thinking)
        return "\n".join([*([branch.system] if first and branch.system else []), text]) if first else f"\n{text}"

    def _chat(self, branch: Branch, messages: list[dict[str, Any]]) -> Chat:
        system = [{"role": "system", "content": branch.system}] if branch.system else []
        return Chat([*system, *messages], enable_thinking=self.thinking)
