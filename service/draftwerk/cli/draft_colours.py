"""Generated text in colours that say which tokens were drafted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

DRAFTED = "bold green"
OWN = "yellow"


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(("drafted and accepted", DRAFTED), "  ", ("chosen by the model itself", OWN))


class DraftColours:
    """Colours the text of one generation, chunk by chunk.

    Text comes in whole characters and may lag behind the tokens, whose bytes wait here until then.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._drafted: list[bool] = []  # for each of _bytes

    def coloured(self, text: str, token_bytes: Sequence[bytes], drafted: Sequence[bool]) -> Text:
        """The text of a chunk, each character in the colour of the token that began it."""
        for piece, was_drafted in zip(token_bytes, drafted, strict=True):
            self._bytes += piece
            self._drafted += [was_drafted] * len(piece)
        result = Text()
        start = 0
        for character in text:
            encoded = character.encode()
            if self._bytes.startswith(encoded, start):
                style = DRAFTED if self._drafted[start] else OWN
                start += len(encoded)
            else:  # U+FFFD for bytes that are no text: one colour for the chunk from here on, and afresh after it
                style = DRAFTED if any(drafted) else OWN
                start = len(self._bytes)
            result.append(character, style)
        del self._bytes[:start], self._drafted[:start]
        return result
