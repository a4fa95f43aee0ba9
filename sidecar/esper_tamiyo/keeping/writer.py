"""The process that writes state to files: appends the data of its pipe to a segment.

A process of its own because a disk may take its time, and the process that decides may not.
It looks at its pipe fifty times a second at most, and not whenever something comes: whoever
sends wakes nobody up, and what lies in the pipe outlives the sender. When that has ended, how
ever it did, the rest is written first.

Run as ``python -m esper_tamiyo.keeping.writer FD FOLDER LOCK``, the lock being an open
descriptor of the folder that only needs to stay open. Each header that comes begins another
segment. It says how it stands once a second, as a line of JSON, and at once what cannot be
written; nothing is written then before the next header.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from esper_tamiyo.child_process import BY_SUPERVISORS, become_child
from esper_tamiyo.keeping.segments import (
    HEAD,
    EntryKind,
    remove_older,
    segment_path,
    segments_of,
)
from esper_tamiyo.keeping.segments import number_of as segment_number

GATHER_S = 0.02
STATUS_S = 1.0
SYNC_S = 5.0
READ_BYTES = 1 << 20
NICE = 5


class SegmentWriter:
    """Appends entries to the newest segment of a folder. Never raises; ``error`` says what
    the system did not let it do, "" while all is well."""

    def __init__(self, folder: Path) -> None:
        self.error = ""
        self.written = 0
        self.written_at = 0
        """Unix time of that, in nanoseconds; 0 before the first."""
        self._folder = self._path = folder
        self._file: int | None = None
        self._rest = bytearray()
        self._dirty = False

    def feed(self, data: bytes) -> None:
        """Take in a piece of what the pipe delivered; entries are written once whole."""
        rest = self._rest
        rest += data
        begin = place = 0
        while len(rest) - place >= HEAD.size:
            length, _, kind = HEAD.unpack_from(rest, place)
            end = place + HEAD.size + length
            if len(rest) < end:
                break
            if kind == EntryKind.HEADER:
                self._append(bytes(rest[begin:place]))
                self._begin_segment()
                begin = place
            elif kind == EntryKind.SETTLED:
                self._append(bytes(rest[begin:end]))
                self._settle(int(bytes(rest[place + HEAD.size : end])))
                begin = end
            place = end
        self._append(bytes(rest[begin:place]))
        del rest[:place]

    def sync(self) -> None:
        """Have what was written outlive a power cut."""
        if self._dirty and self._file is not None:
            self._dirty = False
            try:
                os.fdatasync(self._file)
            except OSError as error:
                self._give_up(error)

    def look_after(self) -> None:
        """See that what is written can be found: a file that is gone is as good as none."""
        if self._file is None:
            return
        try:
            if os.fstat(self._file).st_ino != self._path.stat().st_ino:
                raise FileNotFoundError(errno.ENOENT, "its file was replaced")
        except OSError as error:
            self._give_up(error)

    def _begin_segment(self) -> None:
        """Open the next one; an empty one, of a disk that was full, is taken again."""
        self.sync()
        self._close()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            segments = segments_of(self._folder)
            number = segment_number(segments[-1]) + 1 if segments else 1
            if segments and not segments[-1].stat().st_size:
                number -= 1
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._path = segment_path(self._folder, number)
            self._file = os.open(self._path, flags, 0o600)
            self.error = ""
        except OSError as error:
            self._give_up(error)

    def _append(self, data: bytes) -> None:
        if self._file is None or not data:
            return
        rest = memoryview(data)
        try:
            while rest:  # a nearly full disk takes a part first, and refuses the next
                count = os.write(self._file, rest)
                rest = rest[count:]
                self.written += count
                self._dirty = True
            self.written_at = time.time_ns()
        except OSError as error:
            self._give_up(error)

    def _settle(self, kept: int) -> None:
        """All but the newest segments go, once what replaces them is on the disk."""
        self.sync()
        if self._file is not None:
            remove_older(self._folder, kept)

    def _give_up(self, error: OSError) -> None:
        self.error = f"{self._folder}: {(error.strerror or str(error)).lower()}"
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                os.close(file)


def serve(pipe: socket.socket, writer: SegmentWriter) -> None:
    """Write what comes until the pipe ends."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    status_at = 0.0
    sync_at = time.monotonic() + SYNC_S
    said = ""
    while True:
        poll.poll(STATUS_S * 1e3)
        ended = _drain(pipe, writer)
        now = time.monotonic()
        if ended or now >= sync_at:
            sync_at = now + SYNC_S
            writer.sync()
        if ended:
            return
        if now >= status_at:
            writer.look_after()
        if now >= status_at or writer.error != said:
            said, status_at = writer.error, now + STATUS_S
            how = {"error": said, "written": writer.written, "at": writer.written_at}
            line = json.dumps(how)
            with suppress(OSError):  # nobody reads: it is not for us to wait
                pipe.send(line.encode() + b"\n", socket.MSG_DONTWAIT)
        time.sleep(GATHER_S)


def _drain(pipe: socket.socket, writer: SegmentWriter) -> bool:
    """Write what is there; whether the pipe has ended."""
    while True:
        try:
            data = pipe.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it ended without having read how we stand
            continue
        if not data:
            return True
        writer.feed(data)


def main() -> None:
    """Entry point of the process."""
    fd, folder = sys.argv[1:3]
    # When the decide process dies it goes on, to write what is in the pipe, and to end.
    pipe = become_child(fd, ignored=BY_SUPERVISORS, at_parents_death=signal.SIGCONT, nice=NICE)
    serve(pipe, SegmentWriter(Path(folder)))


if __name__ == "__main__":
    main()
