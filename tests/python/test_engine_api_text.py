"""Streaming text: for any tokens, stop strings and step sizes, the pieces join to what one look at the whole gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from draftwerk.output_text import OutputText
from fake_checkpoint import ByteTokenizer

ALPHABET = st.sampled_from("aab é🦜")


def steps_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    steps, rest = [], ids
    for size in sizes:
        steps.append(rest[:size])
        rest = rest[size:]
    return [*steps, rest]


@given(st.binary(max_size=40), st.lists(st.integers(1, 4), max_size=20))
def test_without_stop_strings_nothing_is_lost(data: bytes, sizes: list[int]) -> None:
    *steps, last = steps_of([4 + byte for byte in data], sizes)
    output = OutputText(ByteTokenizer())
    pieces = [output.push(step) for step in steps]
    assert "".join(pieces) + output.finish(last) == data.decode(errors="replace")


@given(st.text(ALPHABET, max_size=40), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_where_the_first_stop_string_begins(text: str, stops: list[str], data: st.DataObject) -> None:
    encoded, stop_bytes = text.encode(), [stop.encode() for stop in stops]
    # As the engine does: after each token (a byte here), the first place where a stop string is complete.
    end, cut = len(encoded), -1
    for i in range(len(encoded) + 1):
        found = [place for stop in stop_bytes if (place := encoded[:i].find(stop)) >= 0]
        if found:
            end, cut = i, min(found)
            break
    sizes = data.draw(st.lists(st.integers(1, 4), max_size=20))
    *steps, last = steps_of([4 + byte for byte in encoded[:end]], sizes)
    # Only the last step may complete a stop string.
    while not last and steps:
        last = steps.pop()
    output = OutputText(ByteTokenizer(), stop_bytes)
    streamed = ""
    for step in steps:
        streamed += output.push(step)
        assert text.startswith(streamed)
    streamed += output.finish(last, cut)
    assert streamed == encoded[: cut if cut >= 0 else end].decode()


def test_a_stop_string_that_the_engine_passed_over_is_text() -> None:
    output = OutputText(ByteTokenizer(), [b"END"])
    ids = [4 + byte for byte in b"END of"]
    assert output.push(ids) == "END of"
    assert output.finish([]) == ""


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    output = OutputText(ByteTokenizer(), [b"END"])
    pieces = [output.push([4 + byte]) for byte in b"xEEN!"]
    assert pieces == ["x", "", "E", "", "EN!"]


def test_an_incomplete_character_waits_only_as_long_as_it_must() -> None:
    output = OutputText(ByteTokenizer())
    assert [output.push([4 + byte]) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert output.push([4 + 0xFF]) == "\ufffd"  # can never begin a character
    assert [output.push([4 + byte]) for byte in (0xE2, 0x41)] == ["", "\ufffdA"]
    assert output.push([4 + 0xE2]) == ""
    assert output.finish([]) == "\ufffd"
