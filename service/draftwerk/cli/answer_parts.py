"""An answer as a chat shows it while it comes: thoughts set off, calls of functions readable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from draftwerk_client import ReplyPart, ReplyReader

_STYLES = {"content": "", "reasoning": "dim italic", "tool_call": "magenta"}


class AnswerParts:
    """Turns the text of one answer into pieces to show, each with its style.

    Args:
        marked: whether the text has the names of control tokens; otherwise it is shown as it is.
        thoughts: whether thoughts are shown.
    """

    def __init__(self, *, marked: bool, thoughts: bool = True) -> None:
        self._reader = ReplyReader() if marked else None
        self._thoughts = thoughts
        self._last_kind = ""
        self._in_line = False

    def push(self, text: str) -> list[tuple[str, str]]:
        """What can be shown now."""
        return [(text, "")] if self._reader is None else list(self._pieces(self._reader.push(text)))

    def finish(self) -> list[tuple[str, str]]:
        """The rest, when nothing more comes."""
        return [] if self._reader is None else list(self._pieces(self._reader.finish()))

    def _pieces(self, parts: Iterable[ReplyPart]) -> Iterator[tuple[str, str]]:
        for part in parts:
            if part.kind == "reasoning" and not self._thoughts:
                continue
            if (part.kind != self._last_kind or part.kind == "tool_call") and self._in_line:
                yield "\n", ""
            text = part.text
            if part.tool_call is not None:
                arguments = json.dumps(part.tool_call.arguments, ensure_ascii=False)
                text = f"{part.tool_call.name}({arguments})"
            yield text, _STYLES[part.kind]
            self._last_kind = part.kind
            self._in_line = not text.endswith("\n")
