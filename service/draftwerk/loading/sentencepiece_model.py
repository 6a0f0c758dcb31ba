"""Reading and writing SentencePiece model protos without protobuf.

Only what a vocabulary needs of ``sentencepiece_model.proto``
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto): the pieces, and of the trainer and
normaliser settings those that decide how text is split.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# ModelProto.trainer_spec: model_type = BPE, byte_fallback = true.
_TRAINER_SPEC = b"\x18\x02\x98\x02\x01"
# ModelProto.normalizer_spec: name = "identity", no precompiled map, add_dummy_prefix = false,
# remove_extra_whitespaces = false, escape_whitespaces = true.
_NORMALIZER_SPEC = b"\x0a\x08identity\x12\x00\x18\x00\x20\x00\x28\x01"
_SCORE = struct.Struct("<f")


def write_model(pieces: Iterable[tuple[bytes, float, int]]) -> bytes:
    """A serialised BPE model with Gemma's settings from (UTF-8 piece, score, type) in the order of their ids."""
    model = bytearray()
    for piece, score, kind in pieces:
        length = len(piece)
        if length < 118:  # both lengths fit in one byte: nearly every piece
            model += b"\x0a%c\x0a%c%b\x15%b\x18%c" % (length + 9, length, piece, _SCORE.pack(score), kind)
        else:
            body = b"\x0a%b%b\x15%b\x18%c" % (_varint(length), piece, _SCORE.pack(score), kind)
            model += b"\x0a%b%b" % (_varint(len(body)), body)
    model += b"\x12%c%b\x1a%c%b" % (len(_TRAINER_SPEC), _TRAINER_SPEC, len(_NORMALIZER_SPEC), _NORMALIZER_SPEC)
    return bytes(model)


def read_pieces(model: bytes) -> Iterator[tuple[bytes, float, int]]:
    """The (UTF-8 piece, score, type) of a serialised model in the order of their ids.

    Raises:
        ValueError: the bytes are no such proto.
    """
    for number, start, end in _fields(model, 0, len(model)):
        if number != 1:
            continue
        piece, score, kind = b"", 0.0, NORMAL
        for inner, first, last in _fields(model, start, end):
            if inner == 1:
                piece = model[first:last]
            elif inner == 2 and last - first == 4:
                (score,) = _SCORE.unpack_from(model, first)
            elif inner == 3:
                kind = _read_varint(model, first, last)[0]
        yield piece, score, kind


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte of the value, one past its last) of the message in ``data[at:end]``."""
    while at < end:
        tag, at = _read_varint(data, at, end)
        wire = tag & 7
        if wire == 0:
            start, at = at, _read_varint(data, at, end)[1]
        elif wire == 2:
            length, start = _read_varint(data, at, end)
            at = start + length
        elif wire in (1, 5):
            start, at = at, at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"unknown wire type {wire}")
        if at > end:
            raise ValueError("truncated message")
        yield tag >> 3, start, at


def _read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("truncated or overlong number")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
