"""What a branch of a session says as a chat: its messages, so that more of them can follow.

Chat templates do not only add: they leave out the thoughts of earlier turns, close an answer otherwise than the model
did, write the results of functions into the turn that called them. So all messages of a chat are rendered together,
with what was generated as messages of the assistant, and the branch is changed where it does not agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftwerk.engine import Engine
from draftwerk.requests import Chat, Message
from draftwerk.server.conversion import MAX_CHAT_MESSAGES
from draftwerk.server.errors import InvalidField
from draftwerk_client import read_reply, reply_opening

MAX_CHAT_BYTES = 8 << 20
"""A template may leave out most of what it is given, so the context does not bound this."""

# What a template puts between the beginning of an answer and the answer is shorter than this.
_OPENING_TOKENS = 16


@dataclass(frozen=True)
class _Rendering:
    """The tokens of a chat; behind them in the branch comes an answer."""

    length: int
    """In tokens."""
    messages: int
    size: int
    """Of those of them that were appended, in bytes."""
    tools: Sequence[Mapping[str, Any]]
    enable_thinking: bool | None
    template_variables: Mapping[str, Any]


class ChatHistory:
    """The chat that the tokens of a branch are. False if they are none."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        # Of the first of the messages; those with which the branch still begins, the longest last.
        self._renderings: list[_Rendering] = []

    def __bool__(self) -> bool:
        return bool(self._renderings)

    @property
    def size(self) -> int:
        """Of the messages that were appended, in bytes."""
        return self._renderings[-1].size if self else 0

    def continued(self, tokens: Sequence[int], more: Chat, size: int, engine: Engine, path: str) -> Chat:
        """The chat with the answer that follows it in `tokens`, if there is one, and more messages.

        Tools, thinking and variables are those of `more`, where it brings any.

        Args:
            tokens: of the branch.
            size: of `more`, in bytes.
            path: of the prompt that brings the messages, for errors.

        Raises:
            InvalidField: it would be too long.
        """
        if not self:
            return more
        last = self._renderings[-1]
        messages = [*self._messages, *_answer(tokens, last.length, engine), *more.messages]
        if len(messages) > MAX_CHAT_MESSAGES or self.size + size > MAX_CHAT_BYTES:
            raise InvalidField(
                f"{path}.messages",
                f"{len(messages)} messages and {self.size + size} bytes with those before",
                f"such that all together are at most {MAX_CHAT_MESSAGES} messages and {MAX_CHAT_BYTES} bytes",
            )
        return Chat(
            messages,
            tools=more.tools or last.tools,
            enable_thinking=last.enable_thinking if more.enable_thinking is None else more.enable_thinking,
            template_variables=more.template_variables or last.template_variables,
        )

    def add(self, chat: Chat, length: int, *, size: int, unchanged: int) -> None:
        """Notes that the branch now has the tokens of this chat.

        Args:
            chat: from continued().
            length: of its rendering, in tokens.
            size: of the messages that it brought, in bytes.
            unchanged: how many tokens of the branch are as they were before.
        """
        size += self.size
        self._renderings = self._beginning(unchanged)
        self._renderings.append(
            _Rendering(length, len(chat.messages), size, chat.tools, chat.enable_thinking, chat.template_variables)
        )
        self._messages = list(chat.messages)

    def up_to(self, position: int) -> ChatHistory:
        """The history of the first tokens of the branch."""
        history = ChatHistory()
        history._renderings = self._beginning(position)
        if history:
            history._messages = self._messages[: history._renderings[-1].messages]
        return history

    def _beginning(self, position: int) -> list[_Rendering]:
        return [rendering for rendering in self._renderings if rendering.length <= position]


def _answer(tokens: Sequence[int], begin: int, engine: Engine) -> list[Message]:
    """The tokens from there on as a message of the assistant; nothing if there are none."""
    answer = list(tokens[begin:])
    if not answer:
        return []
    if answer[-1] in engine.info.end_token_ids:  # the template closes the answer itself
        answer.pop()
    before = engine.detokenize(list(tokens[max(0, begin - _OPENING_TOKENS) : begin]), special_tokens=True)
    reply = read_reply(engine.detokenize(answer, special_tokens=True), opening=reply_opening(before))
    return [reply.message()]


def tokens_of_chat(text: str, tokens: Sequence[int], engine: Engine) -> list[int]:
    """The tokens of a chat that goes on with a branch.

    Those that the branch has stay as they are, in whatever way the model spelled them, if the text begins with theirs;
    otherwise the whole text is tokenised.

    Args:
        text: what the chat template writes.
        tokens: of the branch.
    """
    own = list(tokens)
    ended = bool(own) and own[-1] in engine.info.end_token_ids
    # The template may close an answer otherwise than the model, with <end_of_turn> where that wrote <eos>.
    for kept in (own, own[:-1]) if ended else (own,):
        spelled = engine.detokenize(kept, special_tokens=True)
        if text.startswith(spelled):
            return kept + engine.tokenize(text[len(spelled) :], add_bos=False)
    return engine.tokenize(text, add_bos=False)


def common_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
