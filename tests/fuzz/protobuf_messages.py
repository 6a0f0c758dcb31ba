"""Protobuf messages on the wire, made at random from their descriptors: edge values, doubled and unknown fields."""

from __future__ import annotations

import random
import struct

from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)

_INTEGERS = [0, 1, 2, 5, 64, 127, 128, 255, 256, 1023, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1]
_INTEGERS += [-1, -2, -(2**31), -(2**31) - 1, -(2**63)]
_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 100.0, 100.1, 1e-45, 1e-38, 1e38, -1e38, 1e-300, 1e300]
_FLOATS += [float("inf"), -float("inf"), float("nan")]
_TEXTS = [
    "",
    "a",
    "hello world",
    " ",
    "\0",
    "▁",
    "日本語",
    "🙂",
    "\u202e",
    "user",
    "assistant",
    "<end_of_turn>",
    "<bos>",
]
_TEXTS += ["<end_of_turn>", "<bos>", "Tiny", "{{ 7 * 7 }}", "x" * 257]
_TEXTS += ['{"type": "function", "function": {"name": "f"}}', '{"a": [1, {}]}', "true", "[" * 3000, "tool", "tools"]
_NOT_UTF8 = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"ok\xfe"]

_FIXED = {
    FieldDescriptor.TYPE_FIXED32: "<I",
    FieldDescriptor.TYPE_SFIXED32: "<i",
    FieldDescriptor.TYPE_FIXED64: "<Q",
    FieldDescriptor.TYPE_SFIXED64: "<q",
}


def varint(value: int) -> bytes:
    """A base-128 integer; negative ones take ten bytes, as protobuf has them."""
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def tagged(number: int, wire_type: int, payload: bytes) -> bytes:
    """A field on the wire; a length is put before the payload where the wire type has one."""
    length = varint(len(payload)) if wire_type == LENGTH else b""
    return varint(number << 3 | wire_type) + length + payload


class MessageMaker:
    """Makes random messages from one source of random numbers.

    Args:
        rng: the source.
        hostility: probability of things that no client library would send: fields given twice, wrong wire types, text
            that is no UTF-8, unknown fields, several members of one oneof.
    """

    def __init__(self, rng: random.Random, hostility: float = 0.05) -> None:
        self._rng = rng
        self._hostility = hostility

    def message(self, descriptor: Descriptor, depth: int = 0) -> bytes:
        """A message of this type: some of its fields, every value at random."""
        rng = self._rng
        fields = [field for field in descriptor.fields if field.containing_oneof is None or self._hostile()]
        for oneof in descriptor.oneofs:
            if rng.random() < 0.9:
                fields.append(rng.choice(oneof.fields))
        wanted = rng.choice((0.2, 0.5, 0.9))
        out = b"".join(self.field(field, depth) for field in fields if rng.random() < wanted)
        return out + self.unknown_field() if self._hostile() else out

    def some_field(self, descriptor: Descriptor) -> bytes:
        """One field of the message or of one within it, for adding to a valid message."""
        return self.field(self._rng.choice(descriptor.fields), 0, mostly_one=True) if descriptor.fields else b""

    def field(self, field: FieldDescriptor, depth: int, *, mostly_one: bool = False) -> bytes:
        """A field: one value, or as many as a repeated field has."""
        rng = self._rng
        count = rng.choice((0, 1, 1, 2, 3, 17, 300)) if field.is_repeated else 1
        if mostly_one and field.is_repeated:
            count = min(count, 3)
        if depth > 2 or field.message_type is not None:
            count = min(count, 3)
        if self._hostile():
            count += 1
        if mostly_one and field.message_type is not None and not field.message_type.GetOptions().map_entry:
            return tagged(field.number, LENGTH, self.some_field(field.message_type))
        values = [self._value(field, depth) for _ in range(count)]
        wire_type = values[0][0] if values else LENGTH
        if field.is_repeated and wire_type != LENGTH and rng.random() < 0.8:
            return tagged(field.number, LENGTH, b"".join(payload for _, payload in values))  # packed
        if self._hostile():
            wire_type = rng.randrange(8)
            return b"".join(tagged(field.number, wire_type, payload) for _, payload in values)
        return b"".join(tagged(field.number, wire_type, payload) for wire_type, payload in values)

    def unknown_field(self) -> bytes:
        """A field that no message has: a newer client's, or an attacker's."""
        rng = self._rng
        number = rng.choice((11, 15, 16, 99, 2047, 19_000, 2**29 - 1))
        kind = rng.randrange(5)
        if kind == 0:
            return tagged(number, VARINT, varint(rng.choice(_INTEGERS)))
        if kind == 1:
            return tagged(number, LENGTH, rng.randbytes(rng.choice((0, 1, 100))))
        if kind == 2:
            return tagged(number, FIXED64, rng.randbytes(8))
        if kind == 3:
            return tagged(number, FIXED32, rng.randbytes(4))
        depth = rng.choice((1, 5, 99, 101, 3000))
        return tagged(number, START_GROUP, b"") * depth + tagged(number, END_GROUP, b"") * depth

    def _value(self, field: FieldDescriptor, depth: int) -> tuple[int, bytes]:
        """The wire type and the bytes of one value."""
        rng = self._rng
        kind = field.type
        if kind == FieldDescriptor.TYPE_MESSAGE:
            assert field.message_type is not None
            return LENGTH, b"" if depth > 6 else self.message(field.message_type, depth + 1)
        if kind == FieldDescriptor.TYPE_STRING:
            return LENGTH, rng.choice(_NOT_UTF8) if self._hostile() else self._text().encode()
        if kind == FieldDescriptor.TYPE_BYTES:
            return LENGTH, rng.randbytes(rng.choice((0, 1, 5, 64)))
        if kind == FieldDescriptor.TYPE_FLOAT:
            return FIXED32, self._float32()
        if kind == FieldDescriptor.TYPE_DOUBLE:
            return FIXED64, struct.pack("<d", rng.choice(_FLOATS))
        if kind in _FIXED:
            size = struct.calcsize(_FIXED[kind])
            return FIXED32 if size == 4 else FIXED64, (self._integer() & (2 ** (8 * size) - 1)).to_bytes(size, "little")
        if kind in (FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SINT64):
            value = self._integer()
            return VARINT, varint(value << 1 ^ value >> 63)
        if kind == FieldDescriptor.TYPE_BOOL:
            return VARINT, varint(rng.choice((0, 1, 1, 2**63)))
        return VARINT, varint(self._integer())  # enums too: their values outside the enum as well

    def _integer(self) -> int:
        rng = self._rng
        return rng.choice(_INTEGERS) if rng.random() < 0.5 else rng.randrange(400)

    def _float32(self) -> bytes:
        rng = self._rng
        if rng.random() < 0.3:
            return rng.randbytes(4)  # any bit pattern: denormals, signalling NaNs
        value = rng.choice(_FLOATS) if rng.random() < 0.6 else rng.uniform(-3.0, 3.0)
        try:
            return struct.pack("<f", value)
        except OverflowError:
            return struct.pack("<f", float("inf"))

    def _text(self) -> str:
        rng = self._rng
        if rng.random() < 0.01:
            return rng.choice(_TEXTS[1:8]) * rng.choice((100, 1000, 5000))
        return rng.choice(_TEXTS)

    def _hostile(self) -> bool:
        return self._rng.random() < self._hostility
