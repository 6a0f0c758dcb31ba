"""Text of a generation as its tokens come in: whole characters only, and nothing that a stop string may yet cut."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What this needs of a tokenizer."""

    @property
    def special_ids(self) -> Collection[int]: ...

    def token_bytes(self, token_id: int, /) -> bytes: ...

    def piece_of(self, token_id: int, /) -> str: ...


class OutputText:
    """Turns the token ids of one generation into text, piece by piece.

    Works on bytes, as the engine does when it looks for stop strings: a stop string may begin and end anywhere inside
    a token. Text that could be the start of a stop string stays back until it is known not to be one; an incomplete
    UTF-8 sequence stays back until the rest arrives, and becomes U+FFFD if it never does.

    Args:
        tokenizer: knows the text of each token.
        stop: the stop strings.
        special_tokens: whether control tokens have text, which is their names. Stop strings do not see it.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[bytes] = (), *, special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._special_ids = tokenizer.special_ids if special_tokens else ()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._names: list[tuple[int, str]] = []  # of control tokens, each with the place in _held that it precedes
        self._released = 0  # bytes given to the decoder so far, names aside

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became certain with these tokens, none of which ended the generation."""
        self._take(token_ids)
        return self._release(len(self._held) - self._stop_prefix())

    def finish(self, token_ids: Iterable[int], text_bytes: int = -1) -> str:
        """The rest of the text, with the last tokens.

        Args:
            text_bytes: the length of the whole output, names aside, up to the stop string that ended it; -1 if none
                did.
        """
        self._take(token_ids)
        keep = len(self._held) if text_bytes < 0 else max(0, text_bytes - self._released)
        return self._release(min(keep, len(self._held))) + self._decoder.decode(b"", final=True)

    def _take(self, token_ids: Iterable[int]) -> None:
        if not self._special_ids:
            self._held += b"".join(map(self._tokenizer.token_bytes, token_ids))
            return
        for token_id in token_ids:
            if token_id in self._special_ids:
                self._names.append((len(self._held), self._tokenizer.piece_of(token_id)))
            else:
                self._held += self._tokenizer.token_bytes(token_id)

    def _release(self, count: int) -> str:
        parts: list[str] = []
        start = 0
        while self._names and self._names[0][0] <= count:
            place, name = self._names.pop(0)
            # A character that a control token interrupts is none.
            parts += [self._decoder.decode(self._held[start:place], final=True), name]
            start = place
        parts.append(self._decoder.decode(self._held[start:count]))
        self._held = self._held[count:]
        self._names = [(place - count, name) for place, name in self._names]
        self._released += count
        return "".join(parts)

    def _stop_prefix(self) -> int:
        """Length of the longest end of the held bytes that begins a stop string without completing it.

        A complete one was passed over by the engine (min_tokens forbids ending there), or it would have ended.
        """
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
