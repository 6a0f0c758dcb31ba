"""What a model says, in its parts: thoughts, calls of functions, and the answer.

Gemma 4 marks them with control tokens, which have text if a generation is asked for with `special_tokens`:

    <|channel>thought
    There is a function for the weather.<channel|><|tool_call>call:weather{city:<|"|>Oslo<|"|>}<tool_call|>

Text without these markers is an answer as a whole, whatever the model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_CHANNEL, _CHANNEL_END = "<|channel>", "<channel|>"
_CALL, _CALL_END = "<|tool_call>", "<tool_call|>"
_QUOTE = '<|"|>'
_CHANNEL_NAME = "thought"
_MAX_DEPTH = 64

PartKind = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function by the model."""

    id: str
    """Tells it from the other calls of its reply."""
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said, in its parts."""

    content: str
    """The answer."""
    reasoning_content: str
    """The thoughts."""
    tool_calls: tuple[ToolCall, ...]

    def message(self) -> dict[str, Any]:
        """This reply as a message of the assistant, for the chat to go on with."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """A piece of a reply that is being written. Those of one kind that follow each other belong together."""

    kind: PartKind
    text: str
    """Of a call: as the model wrote it, markers included."""
    tool_call: ToolCall | None = None
    """Of a call."""


def read_reply(text: str, *, opening: str = "") -> Reply:
    """The parts of a finished reply.

    A call that cannot be read is left in the content as it is, so that nothing is run that the model did not clearly
    ask for.

    Args:
        text: of a generation with `special_tokens`.
        opening: what of the reply stood at the end of its prompt already, if anything; see reply_opening().
    """
    text = opening + text
    first = min((place for marker in (_CHANNEL, _CHANNEL_END) if (place := text.find(marker)) >= 0), default=-1)
    if first >= 0 and text.startswith(_CHANNEL_END, first):  # the chat template opened the channel
        text = _CHANNEL + text
    reader = ReplyReader()
    parts = [*reader.push(text), *reader.finish()]
    return Reply(
        content="".join(part.text for part in parts if part.kind == "content"),
        reasoning_content="".join(part.text for part in parts if part.kind == "reasoning").strip(),
        tool_calls=tuple(part.tool_call for part in parts if part.tool_call is not None),
    )


def reply_opening(prompt: str) -> str:
    """What of a reply stands at the end of its prompt already: the marker of thoughts that the model is to begin with.

    Args:
        prompt: the end of a prompt's text, control tokens included.
    """
    opened, closed = prompt.rfind(_CHANNEL), prompt.rfind(_CHANNEL_END)
    return prompt[opened:] if opened > closed else ""


class ReplyReader:
    """Reads a reply piece by piece, as it comes.

    A call of a function is one part, given when it is complete.
    """

    def __init__(self) -> None:
        self._kind: PartKind = "content"
        self._held = ""
        self._at_channel_name = False
        self._calls = 0

    def push(self, text: str) -> list[ReplyPart]:
        """What became certain with this text."""
        self._held += text
        parts: list[ReplyPart] = []
        while self._step(parts, final=False):
            pass
        return parts

    def finish(self) -> list[ReplyPart]:
        """The rest, when nothing more comes."""
        parts: list[ReplyPart] = []
        while self._step(parts, final=True):
            pass
        if self._held:  # a call that was not finished is none
            kind: PartKind = "content" if self._kind == "tool_call" else self._kind
            parts.append(ReplyPart(kind, self._held))
        self._held, self._kind = "", "content"
        return parts

    def _step(self, parts: list[ReplyPart], *, final: bool) -> bool:
        """Takes what is held up to the next marker. Whether there may be another one behind it."""
        if self._kind == "tool_call":
            return self._read_call(parts)
        if self._kind == "reasoning":
            markers: tuple[str, ...] = (_CHANNEL_END,)
            if self._at_channel_name and not self._read_channel_name(final=final):
                return False
        else:
            markers = (_CHANNEL, _CALL)
        found = [(place, marker) for marker in markers if (place := self._held.find(marker)) >= 0]
        if not found:
            self._give(parts, len(self._held) if final else len(self._held) - _begun(self._held, markers))
            return False
        place, marker = min(found)
        self._give(parts, place)
        if marker == _CALL:  # its marker stays: it is given with the call, or back if the call turns out to be none
            self._kind = "tool_call"
        else:
            self._held = self._held[len(marker) :]
            self._kind = "reasoning" if marker == _CHANNEL else "content"
            self._at_channel_name = marker == _CHANNEL
        return True

    def _read_channel_name(self, *, final: bool) -> bool:
        """Takes the name of the channel and the line break behind it. False as long as more of it may come."""
        name = f"{_CHANNEL_NAME}\n"
        if not final and len(self._held) < len(name) and name.startswith(self._held):
            return False
        self._at_channel_name = False
        if self._held.startswith(_CHANNEL_NAME):
            self._held = self._held[len(_CHANNEL_NAME) :].removeprefix("\n")
        return True

    def _read_call(self, parts: list[ReplyPart]) -> bool:
        end = self._held.find(_CALL_END)
        if end < 0:
            return False
        text = self._held[: end + len(_CALL_END)]
        self._held = self._held[len(text) :]
        self._kind = "content"
        try:
            name, arguments = _read_call(text[len(_CALL) : end])
        except ValueError:
            parts.append(ReplyPart("content", text))
        else:
            parts.append(ReplyPart("tool_call", text, ToolCall(f"call_{self._calls}", name, arguments)))
            self._calls += 1
        return True

    def _give(self, parts: list[ReplyPart], count: int) -> None:
        if count:
            parts.append(ReplyPart(self._kind, self._held[:count]))
            self._held = self._held[count:]


def _begun(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a marker."""
    longest = max(map(len, markers)) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(m.startswith(text[-n:]) for m in markers)),
        0,
    )


# --- calls of functions --------------------------------------------------------------------------------------------

_NAME = re.compile(r"\s*call:\s*([^\s{}]+)\s*")
_KEY = re.compile(r"[^\s:,{}\[\]<\"]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_SPACE = re.compile(r"\s*")
_WORDS = {"true": True, "false": False, "null": None, "None": None}


def _read_call(text: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call, `call:NAME{KEY:VALUE,...}`.

    Raises:
        ValueError: it is no such thing.
    """
    name = _NAME.match(text)
    if name is None:
        raise ValueError("no name")
    notation = _Notation(text, name.end())
    arguments = notation.value(0)
    if not isinstance(arguments, dict) or not notation.at_end():
        raise ValueError("no arguments, or something behind them")
    return name[1], arguments


class _Notation:
    """The notation in which Gemma 4 writes structured data: JSON, but that keys and strings are quoted with a token of
    their own, and keys may be without quotes. Quotes of JSON are read too."""

    def __init__(self, text: str, position: int) -> None:
        self._text = text
        self._at = position

    def at_end(self) -> bool:
        self._skip_space()
        return self._at == len(self._text)

    def value(self, depth: int) -> Any:
        """The value that begins here.

        Raises:
            ValueError: none does.
        """
        if depth > _MAX_DEPTH:
            raise ValueError("too deep")
        if self._takes("{"):
            return dict(self._items("}", lambda: (self._key(), self.value(depth + 1))))
        if self._takes("["):
            return list(self._items("]", lambda: self.value(depth + 1)))
        string = self._string()
        if string is not None:
            return string
        if number := _NUMBER.match(self._text, self._at):
            self._at = number.end()
            return _number(number[0])
        for word, meaning in _WORDS.items():
            if self._takes(word):
                return meaning
        raise ValueError(f"no value at {self._at}")

    def _items(self, end: str, read: Callable[[], Any]) -> list[Any]:
        items: list[Any] = []
        while not self._takes(end):
            if items and not self._takes(","):
                raise ValueError(f"no comma at {self._at}")
            items.append(read())
        return items

    def _key(self) -> str:
        key = self._string()
        if key is None:
            bare = _KEY.match(self._text, self._at)
            if bare is None:
                raise ValueError(f"no key at {self._at}")
            key, self._at = bare[0], bare.end()
        if not self._takes(":"):
            raise ValueError(f"no colon at {self._at}")
        return key

    def _string(self) -> str | None:
        if self._takes(_QUOTE):
            end = self._text.find(_QUOTE, self._at)
            if end < 0:
                raise ValueError("a string without an end")
            string = self._text[self._at : end]
            self._at = end + len(_QUOTE)
            return string
        if self._text.startswith('"', self._at):
            quoted, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            return str(quoted)
        return None

    def _takes(self, token: str) -> bool:
        self._skip_space()
        if not self._text.startswith(token, self._at):
            return False
        self._at += len(token)
        return True

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()


def _number(text: str) -> int | float:
    if text.lstrip("-").isdigit():
        return int(text)
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number
