"""OTLP in files: requests of one signal, each behind its size.

The size is four bytes, most significant first. That is what the Collector's file exporter
writes with ``format: proto``, so its tools read ours and ours read its.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_MESSAGE = 64 << 20
"""Larger sizes are taken for bytes of another kind of file: receivers stop far earlier."""

_SIZE = struct.Struct(">I")

SIZE_BYTES = _SIZE.size
"""Bytes before each request, which say how long it is."""


class RecordingError(ValueError):
    """A file that is no recording from some place on: ``offset`` says where."""

    def __init__(self, path: Path, offset: int, problem: str) -> None:
        super().__init__(f"{path}: byte {offset:,}: {problem}")
        self.offset = offset


class CutError(RecordingError):
    """A file that ends inside a request: it was cut there, or is still being written."""


def framed(body: bytes) -> bytes:
    """A request as it lies in a file."""
    return _SIZE.pack(len(body)) + body


def bodies(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The requests in ``file``, each with the offset at which its size begins.

    Raises :class:`RecordingError`, which names ``path``, at the first byte from which on
    there is none, after everything before it was yielded.
    """
    offset = 0
    while size_bytes := file.read(_SIZE.size):
        if len(size_bytes) < _SIZE.size:
            raise CutError(path, offset, "the file ends inside a size")
        (size,) = _SIZE.unpack(size_bytes)
        if not 0 < size <= MAX_MESSAGE:
            raise RecordingError(
                path, offset, f"expected the size of a request, found {size:,}"
            )
        body = file.read(size)
        if len(body) < size:
            raise CutError(path, offset, f"a request of {size:,} bytes has only {len(body):,}")
        yield offset, body
        offset += _SIZE.size + size
