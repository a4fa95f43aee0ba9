"""Segments: the files of saved state, and the framing of their bytes.

A folder of ``state-000001.log``, ``state-000002.log``, …: a segment is appended to, never
changed, and goes when the ones behind it hold all that is still needed. An entry is its
length, a checksum, its kind and a body. What a kill has cut short is recognised by the first
two; each start writes a segment of its own, so that nothing comes behind such an end.

Whoever writes holds a lock on the folder; of the standard library alone, since the process
that writes is small.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

HEAD = struct.Struct("<IIB")
"""Length of the body, checksum of kind and body, kind."""

MAX_BODY = 1 << 27
"""Longest body that is believed; no rank comes near."""

KEPT_SEGMENTS = b"2"
"""The one that is written, and the one before it: ranks are compared with steps of others that
may lie further back than where these were saved last."""

LOOK_AGAIN_S = 0.02
"""Between two looks whether a folder is free."""

LOCK_PATIENCE_S = 3.0
"""What a writer has to write down the rest, and to end, when its sidecar was killed."""

_NAME = re.compile(r"state-(\d{6,})\.log")
_ASIDE = ".unusable"


class EntryKind(IntEnum):
    """What a body is."""

    HEADER = 0
    """Who writes, and the table that is decided by; the first of each segment."""
    TABLE = 1
    """The table that is decided by from here on."""
    ENGINE = 2
    """What the engine knows besides ranks."""
    RANK = 3
    """All that is known of one rank."""
    STEPS = 4
    """Steps that were judged, in their order."""
    SETTLED = 5
    """Of the segments so many are needed, the newest ones: the body says it in decimals."""
    ALIVE = 6
    """The sidecar was there at this time, of Unix in nanoseconds, in decimals."""


class DamagedSegmentError(ValueError):
    """A segment that is not as it was written; the text says where."""


def framed(kind: EntryKind, body: bytes) -> bytes:
    """One entry as it lies in a file."""
    return HEAD.pack(len(body), zlib.crc32(body, kind + 1), kind) + body


def entries(data: bytes | memoryview, name: str) -> Iterator[tuple[int, memoryview]]:
    """Kind and body of each entry of a segment, to its end or to where a kill has cut it.

    Raises :class:`DamagedSegmentError` at an entry that was whole once.
    """
    view, place = memoryview(data), 0
    while len(view) - place >= HEAD.size:
        length, checksum, kind = HEAD.unpack_from(view, place)
        begin = place + HEAD.size
        if length <= MAX_BODY and begin + length > len(view):
            return
        body = view[begin : begin + length]
        if length > MAX_BODY or zlib.crc32(body, kind + 1) != checksum:
            if not any(view[place:]):  # the disk had made room that was never filled
                return
            raise DamagedSegmentError(f"{name}: damaged at byte {place:,}")
        yield kind, body
        place = begin + length


def segments_of(folder: Path) -> list[Path]:
    """The segments in a folder, the oldest first; raises ``OSError`` as for any folder."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(segment: Path) -> int:
    """The number of a segment; 0 when it is none."""
    match = _NAME.fullmatch(segment.name)
    return int(match[1]) if match else 0


def segment_path(folder: Path, number: int) -> Path:
    """The segment of that number."""
    return folder / f"state-{number:06d}.log"


def set_aside(folder: Path) -> list[Path]:
    """Rename all segments so that nobody reads them as state any more; returns where they are.

    Those that were set aside before make room. Raises ``OSError``.
    """
    segments = segments_of(folder)
    for earlier in folder.glob(f"*{_ASIDE}"):
        earlier.unlink()
    return [path.rename(path.with_name(path.name + _ASIDE)) for path in segments]


def locked(folder: Path, patience_s: float = 0.0) -> int:
    """A descriptor that holds the lock of a folder, which is made when it is not there.

    It is free again when every process that has the descriptor has ended; that is waited for
    a little. Raises ``OSError``, among others when somebody else holds it or the folder is
    another user's.
    """
    deadline = time.monotonic() + patience_s
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "the folder belongs to another user")
        while not _has_locked(fd):
            if time.monotonic() >= deadline:
                raise OSError(errno.EAGAIN, "another sidecar keeps its state there")
            time.sleep(LOOK_AGAIN_S)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _has_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_older(folder: Path, kept: int) -> None:
    """Remove all but the ``kept`` newest segments, as far as the system lets us."""
    with suppress(OSError):
        for path in segments_of(folder)[:-kept]:
            path.unlink()
