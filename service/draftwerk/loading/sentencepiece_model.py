"""Reading and writing SentencePiece model protos without protobuf.

Only what a vocabulary needs of ``sentencepiece_model.proto``
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto): the pieces, and of the trainer and
normaliser settings those that decide how text is split.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from draftwerk.loading.byte_spans import SEPARATOR, IntArray, positions, split
from draftwerk.loading.mapped_file import ByteArray

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# ModelProto.trainer_spec: model_type = BPE, byte_fallback = true.
_TRAINER_SPEC = b"\x18\x02\x98\x02\x01"
# ModelProto.normalizer_spec: name = "identity", no precompiled map, add_dummy_prefix = false,
# remove_extra_whitespaces = false, escape_whitespaces = true.
_NORMALIZER_SPEC = b"\x0a\x08identity\x12\x00\x18\x00\x20\x00\x28\x01"
_SCORE = struct.Struct("<f")

# A piece: ModelProto.pieces {1: text, 2: score, 3: type}. Both lengths are written as varints of three bytes, longer
# than they need be, so that a field is where its column says it is; readers accept that.
_LENGTH_BYTES = 3
_TRAINER_FIELD = 2  # of ModelProto
_LONGEST_PIECE = 1 << 20
_AROUND_PIECE = 2 * (1 + _LENGTH_BYTES) + 5 + 2


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a vocabulary by columns, in the order of their ids.

    Attributes:
        joined: the pieces as :mod:`draftwerk.loading.byte_spans` joins them.
        scores: float32, one for each piece.
        kinds: SentencePiece types (`NORMAL`, ...), one for each piece.
    """

    joined: bytes
    scores: npt.NDArray[np.float32]
    kinds: npt.NDArray[np.int64]

    @classmethod
    def of(cls, pieces: Iterable[tuple[bytes, float, int]]) -> Vocabulary:
        """From (UTF-8 piece, score, type).

        Raises:
            ValueError: a piece cannot be UTF-8.
        """
        texts: list[bytes] = []
        scores, kinds = array("f"), array("q")
        for piece, score, kind in pieces:
            if SEPARATOR in piece:
                raise ValueError(f"string {len(texts)} is not UTF-8")
            texts.append(piece)
            scores.append(score)
            kinds.append(kind)
        joined = b"".join(SEPARATOR + text for text in texts)
        return cls(joined, np.array(scores, dtype=np.float32), np.array(kinds, dtype=np.int64))

    def __len__(self) -> int:
        return self.kinds.size


def write_model(vocabulary: Vocabulary) -> bytes:
    """A serialised BPE model with Gemma's settings.

    Raises:
        ValueError: a piece is longer than a megabyte.
    """
    data, _, lengths = split(vocabulary.joined)
    if lengths.max(initial=0) > _LONGEST_PIECE:
        raise ValueError(f"token {int(lengths.argmax())} is {int(lengths.max())} bytes long")
    sizes = lengths + _AROUND_PIECE
    ends = np.cumsum(sizes)
    begins = ends - sizes
    model = np.zeros(int(sizes.sum()), dtype=np.uint8)
    model[begins] = 0x0A
    _put_varints(model, begins + 1, sizes - (1 + _LENGTH_BYTES))
    text = begins + 1 + _LENGTH_BYTES
    model[text] = 0x0A
    _put_varints(model, text + 1, lengths)
    model[positions(text + 1 + _LENGTH_BYTES, lengths)] = data[data != SEPARATOR[0]]
    model[ends - 7] = 0x15
    score_bytes = vocabulary.scores.astype("<f4").view(np.uint8).reshape(-1, 4)
    for i in range(4):
        model[ends - 6 + i] = score_bytes[:, i]
    model[ends - 2] = 0x18
    model[ends - 1] = vocabulary.kinds
    settings = b"\x12%c%b\x1a%c%b" % (len(_TRAINER_SPEC), _TRAINER_SPEC, len(_NORMALIZER_SPEC), _NORMALIZER_SPEC)
    return model.tobytes() + settings


def _put_varints(model: ByteArray, at: IntArray, values: IntArray) -> None:
    for i in range(_LENGTH_BYTES):
        more = 0x80 if i < _LENGTH_BYTES - 1 else 0
        model[at + i] = values >> (7 * i) & 0x7F | more


def read_pieces(model: bytes) -> Iterator[tuple[bytes, float, int]]:
    """The (UTF-8 piece, score, type) of a serialised model in the order of their ids.

    Raises:
        ValueError: the bytes are no such proto.
    """
    has_settings = False
    for number, start, end in _fields(model, 0, len(model)):
        has_settings = has_settings or number == _TRAINER_FIELD
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
    # They follow the pieces. A file cut between two pieces is a proto like any other, of a smaller vocabulary.
    if not has_settings:
        raise ValueError("it ends before the settings that follow its pieces: truncated")


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
