"""Tails: data appended to the newest files of a folder, read as it arrives.

State is kept in segments and decisions in a journal, whoever looks at them; so the page reads
these, and the process that decides does nothing for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from esper_tamiyo.journaling import journal
from esper_tamiyo.keeping import segments
from esper_tamiyo.keeping.bodies import ForeignStateError, StepsBody, header, steps
from esper_tamiyo.keeping.segments import HEAD, DamagedSegmentError, EntryKind

PIECE = 1 << 20
"""Bytes that are read at once; then it is others' turn."""

FILES_AT_START = 2
"""Newest files that are read when the page starts."""


class Tail:
    """The newest files of a folder, whose numbers rise."""

    def __init__(
        self, folder: Path, files_of: Callable[[Path], list[Path]], number_of: NumberOf
    ) -> None:
        self.folder = folder
        self.error = ""
        """Why nothing can be read, "" while all is well."""
        self._files_of = files_of
        self._number_of = number_of
        self._file: BinaryIO | None = None
        self._number = -1

    def next_piece(self) -> tuple[bool, bytes]:
        """Whether it is the first of a file, and what has been appended; b"" for nothing."""
        try:
            piece = self._read_on()
            if piece or not self._open_next():
                return False, piece
            return True, self._read_on()
        except OSError as error:
            self.error = f"{self.folder}: {(error.strerror or str(error)).lower()}"
            return False, b""

    def close(self) -> None:
        """Hold no file any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_on(self) -> bytes:
        file = self._file
        if file is None:
            return b""
        if os.fstat(file.fileno()).st_size < file.tell():  # it was cut short by others
            file.seek(0)
        return file.read(PIECE)

    def _open_next(self) -> bool:
        """Go on to the next file, when there is one and this one has been read to its end."""
        try:
            files = self._files_of(self.folder)
        except FileNotFoundError:  # nothing has been written yet
            return False
        self.error = ""
        if self._number < 0:
            files = files[-FILES_AT_START:]
        for path in files:
            number = self._number_of(path)
            if number <= self._number:
                continue
            with suppress(FileNotFoundError):
                opened = path.open("rb")
                self.close()
                self._file, self._number = opened, number
                return True
        return False


NumberOf = Callable[[Path], int]
"""The number of a file."""


class StepsTail:
    """The steps that were judged, out of the state that is kept."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder, segments.segments_of, segments.number_of)
        self._rest = b""
        self._is_skipped = False

    @property
    def error(self) -> str:
        """Why nothing can be read, "" while all is well."""
        return self._tail.error

    def close(self) -> None:
        """Hold no file any more."""
        self._tail.close()

    def read(self) -> tuple[bool, list[StepsBody]]:
        """Whether anything was appended, and the steps in it."""
        is_first, piece = self._tail.next_piece()
        if is_first:
            self._rest, self._is_skipped = b"", False
        if not piece:
            return False, []
        if self._is_skipped:
            return True, []
        data = self._rest + piece
        found: list[StepsBody] = []
        place = 0
        try:
            for kind, body in segments.entries(data, "state"):
                place += HEAD.size + len(body)
                if kind == EntryKind.HEADER:
                    header(body)
                elif kind == EntryKind.STEPS:
                    found.append(steps(body))
        except (DamagedSegmentError, ForeignStateError, msgspec.MsgspecError):
            self._is_skipped = True  # up to the next segment
        self._rest = data[place:]
        return True, found


class JournalTail:
    """The lines of a journal."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder, journal.files_of, journal.number_of)
        self._rest = b""

    @property
    def error(self) -> str:
        """Why nothing can be read, "" while all is well."""
        return self._tail.error

    def close(self) -> None:
        """Hold no file any more."""
        self._tail.close()

    def read(self) -> tuple[bool, Iterator[bytes]]:
        """Whether anything was appended, and the whole lines of it."""
        is_first, piece = self._tail.next_piece()
        if is_first:
            self._rest = b""
        data = self._rest + piece
        end = data.rfind(b"\n") + 1
        self._rest = data[end:] if len(data) - end <= PIECE else b""
        return bool(piece), (line for line in data[:end].splitlines() if line.strip())
