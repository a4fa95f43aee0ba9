"""Reading gzip or zstd data; the first bytes identify the format.

zstd needs the package ``zstandard``, which is asked for only when a file needs it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
CHUNK = 1 << 14
"""Compressed bytes taken at a time: few enough for what they may become in memory."""


class ZstdMissingError(Exception):
    """The package that reads zstd is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "compressed by zstd, which needs the package zstandard: "
            "pip install 'esper-otel[zstd]'"
        )


class DamagedError(Exception):
    """Compressed data that is broken, or ends before its end."""

    def __init__(self) -> None:
        super().__init__("the compressed data is damaged or ends early")


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of ``path`` without what compresses all of it.

    Raises :class:`OSError` and :class:`ZstdMissingError`; reading raises
    :class:`DamagedError` where the data turns bad, behind all that came before.
    """
    with path.open("rb") as raw:
        magic = raw.peek(4)[:4]
        if magic[:2] == GZIP:
            with io.BufferedReader(_gzip(raw)) as file:
                yield cast(io.BufferedReader, file)
        elif magic == ZSTD:
            with io.BufferedReader(_zstd(raw)) as file:
                yield cast(io.BufferedReader, file)
        else:
            yield raw


def unzstd(data: bytes, limit: int) -> bytes:
    """What zstd made ``data`` of, cut off behind ``limit`` bytes.

    Raises :class:`DamagedError` and :class:`ZstdMissingError`.
    """
    with io.BufferedReader(_zstd(io.BytesIO(data))) as file:
        return file.read(limit)


def _gzip(file: BinaryIO) -> _Inflated:
    return _Inflated(file, lambda: zlib.decompressobj(wbits=31), zlib.error)


def _zstd(file: BinaryIO) -> _Inflated:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ZstdMissingError from None
    return _Inflated(
        file, lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    )


class _Inflater(Protocol):
    """What zlib and zstandard have in common: takes one frame, or member, in pieces."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Inflated(io.RawIOBase):
    """Frame behind frame as one stream. The packages' own readers lose what stands before
    a torn end, or the news that it is torn."""

    def __init__(
        self, file: BinaryIO, begin: Callable[[], _Inflater], error: type[Exception]
    ) -> None:
        self._file = file
        self._begin = begin
        self._error = error
        self._frame: _Inflater | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        """Fill ``into`` as far as one piece goes, 0 at the end."""
        while not self._ready:
            self._compressed = self._compressed or self._file.read(CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise DamagedError
                return 0
            self._inflate()
        count = min(len(into), len(self._ready))
        into[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _inflate(self) -> None:
        frame = self._frame = self._frame or self._begin()
        try:
            self._ready = memoryview(frame.decompress(self._compressed))
        except self._error:
            raise DamagedError from None
        self._compressed = frame.unused_data if frame.eof else b""
        if frame.eof:
            self._frame = None
