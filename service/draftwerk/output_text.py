"""Text of a generation as its tokens come in: whole characters only, and nothing that a stop string may yet cut."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol


class TokenBytes(Protocol):
    """What this needs of a tokenizer."""

    def token_bytes(self, token_id: int, /) -> bytes: ...


class OutputText:
    """Turns the token ids of one generation into text, piece by piece.

    Works on bytes, as the engine does when it looks for stop strings: a stop string may begin and end anywhere inside
    a token. Text that could be the start of a stop string stays back until it is known not to be one; an incomplete
    UTF-8 sequence stays back until the rest arrives, and becomes U+FFFD if it never does.
    """

    def __init__(self, tokenizer: TokenBytes, stop: Sequence[bytes] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._released = 0  # bytes given to the decoder so far

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that became certain with these tokens, none of which ended the generation."""
        self._take(token_ids)
        return self._release(len(self._held) - self._stop_prefix())

    def finish(self, token_ids: Iterable[int], text_bytes: int = -1) -> str:
        """The rest of the text, with the last tokens.

        Args:
            text_bytes: the length of the whole output up to the stop string that ended it; -1 if none did.
        """
        self._take(token_ids)
        keep = len(self._held) if text_bytes < 0 else max(0, text_bytes - self._released)
        return self._release(min(keep, len(self._held))) + self._decoder.decode(b"", final=True)

    def _take(self, token_ids: Iterable[int]) -> None:
        self._held += b"".join(map(self._tokenizer.token_bytes, token_ids))

    def _release(self, count: int) -> str:
        data, self._held = self._held[:count], self._held[count:]
        self._released += count
        return self._decoder.decode(data)

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
