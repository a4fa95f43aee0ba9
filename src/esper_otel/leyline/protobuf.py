"""The outline of protobuf messages: where their fields lie, without parsing them.

Tags, wire types and varints as https://protobuf.dev/programming-guides/encoding/ has them.
Groups, which nobody writes any more, are not read.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
"""Wire types."""


class FieldError(ValueError):
    """Bytes that are no protobuf message, or one that has groups."""


def fields_of(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each field of the message that lies from ``begin`` to ``end``.

    Yields its key (number and wire type, ``number << 3 | kind``), where it begins, where its
    value does, and where it ends. Raises :class:`FieldError`.
    """
    at = begin
    while at < end:
        start = at
        key = data[at]
        at += 1
        if key > 127:
            key, at = varint_at(data, start, end)
        kind = key & 7
        if kind == LENGTH:
            length, at = varint_at(data, at, end)
            stop = at + length
        elif kind == VARINT:
            stop = varint_at(data, at, end)[1]
        elif kind in (FIXED64, FIXED32):
            stop = at + (8 if kind == FIXED64 else 4)
        else:
            raise FieldError(f"a field of the unknown kind {kind}")
        if stop > end or key < 8:
            raise FieldError("a field that is longer than its message, or has no number")
        yield key, start, at, stop
        at = stop


def varint_at(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins at ``at``, seven bits a byte, and where it ends; raises
    :class:`FieldError`."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise FieldError("a number that does not end")


_SHORT = [bytes((number,)) for number in range(128)]
_SHORT += [bytes((number & 127 | 128, number >> 7)) for number in range(128, 1024)]


def as_varint(number: int) -> bytes:
    """A number that is not negative, seven bits a byte, least first."""
    if number < len(_SHORT):  # nearly all: sizes of names, attributes and spans
        return _SHORT[number]
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
