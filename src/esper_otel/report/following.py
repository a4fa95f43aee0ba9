"""Following: recordings and journals read while they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from esper_otel.leyline.decompression import GZIP, ZSTD, DamagedError, ZstdMissingError, unzstd
from esper_otel.leyline.otlp_file import (
    MAX_MESSAGE,
    SIZE_BYTES,
    CutError,
    RecordingError,
    bodies,
)
from esper_otel.report.sources import METRICS, Archive, OnBytes, files_of, is_journal
from esper_otel.report.telling import take_journal_line
from esper_otel.report.trainers import JOINED_EVERY

KEPT_RULINGS = 2000
"""Newest decisions, and events, of all runs that are kept."""

IDLE_S, IDLE_EVERY_S = 10.0, 5.0
"""A file that has not grown for so long is looked at so often."""

FOLDERS_EVERY_S = 30.0
"""How often folders are looked through whatever they say of themselves: a journal in one of
their folders may have gone on to its next file."""


class _Followed:
    """One file, as far as it has been read."""

    def __init__(self, path: Path, now: float) -> None:
        self.path = path
        self.offset = 0
        self.is_lines: bool | None = None
        """Lines of JSON, else requests behind their sizes; None before its first byte."""
        self.is_journal = False
        self.is_over = False
        """Nothing more is read of it."""
        self.grown_at = now
        self.due_at = now

    def size(self) -> int:
        """Its bytes, as many as have been read where it is gone."""
        try:
            return self.path.stat().st_size
        except OSError:
            return self.offset

    def fresh(self) -> Iterator[bytes]:
        """What has been added since last time, as far as it is whole."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if self.is_lines:
                yield from self._lines(file)
                return
            try:
                for place, body in bodies(file, self.path):
                    del place  # of the part that is read
                    self.offset += SIZE_BYTES + len(body)
                    yield body
            except CutError:
                return

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        while (line := file.readline(MAX_MESSAGE)).endswith(b"\n"):
            self.offset += len(line)
            if not line.isspace():
                yield line


def _add(on_bytes: OnBytes, before: int, read: int) -> None:
    on_bytes(before + read)


class GrowingArchive(Archive):
    """All that is recorded at some paths, and what is added to it meanwhile."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self.rulings_gone = 0
        """Decisions that were read and are not kept any more."""
        self._paths = list(paths)
        self._followed: dict[Path, _Followed] = {}
        self._folders: dict[Path, int] = {}
        self._folders_due = 0.0
        self._looks = 0

    def read_growth(self, now: float, on_bytes: OnBytes = lambda _: None) -> bool:
        """Read what is new at ``now`` (seconds of a monotonic clock); whether anything was.

        Never raises for what is in the files. What is not a recording is a problem, once.
        """
        self._find_files(now)
        done = 0
        grown = False
        for file in self._followed.values():
            if not file.is_over and now >= file.due_at:
                grown |= self._read_on(file, now, partial(_add, on_bytes, done))
            done += file.offset
        if grown:
            self._take_in()
        return grown

    def _take_in(self) -> None:
        for source, trainer in self.trainers.items():
            trainer.assemble_known()
            trainer.attributes = self._reader.attributes.get(source, {})
            trainer.ended = self._reader.ends.get(source, "")
        self.ledger.settle()
        self.rulings_gone += self.ledger.forget_old(KEPT_RULINGS)
        if self._looks % JOINED_EVERY == 0:
            self._bound_curves()
            for trainer in self.trainers.values():
                trainer.join_pieces()
        self._looks += 1

    def _find_files(self, now: float) -> None:
        is_due = now >= self._folders_due
        for path in self._paths:
            try:
                changed = path.stat().st_mtime_ns
                if not is_due and self._folders.get(path) == changed:
                    continue
                self._folders[path] = changed
                for found in files_of(path):
                    if found not in self._followed:
                        self._followed[found] = _Followed(found, now)
            except FileNotFoundError:
                continue  # it may come yet
            except OSError as error:
                problem = f"{path}: {error.strerror or error}"
                if problem not in self.problems:
                    self.problems.append(problem)
        if is_due:
            self._folders_due = now + FOLDERS_EVERY_S

    def _read_on(self, file: _Followed, now: float, on_bytes: OnBytes) -> bool:
        size = file.size()
        if size <= file.offset:
            file.offset = min(file.offset, size)
            file.due_at = now + IDLE_EVERY_S if now - file.grown_at > IDLE_S else now
            return False
        before = file.offset
        try:
            if file.is_lines is None:
                self._open(file)
            if not file.is_over:
                for data in file.fresh():
                    self._take(file, data)
                    on_bytes(file.offset)
        except (RecordingError, ZstdMissingError, DamagedError, OSError) as error:
            file.is_over = True
            known = (error.strerror or error) if isinstance(error, OSError) else error
            named = isinstance(error, RecordingError)
            self.problems.append(str(error) if named else f"{file.path}: {known}")
        if file.offset == before and not file.is_over:
            return False
        file.grown_at = file.due_at = now
        return True

    def _open(self, file: _Followed) -> None:
        """Find out what a file is. One that is compressed as a whole is read now."""
        with file.path.open("rb") as opened:
            magic = opened.read(4)
        if magic.startswith((GZIP, ZSTD)):
            file.is_over = True
            for offset in self._read_file(file.path):
                file.offset = offset
            return
        file.is_lines = magic.startswith(b"{")
        with suppress(OSError):
            file.is_journal = file.is_lines and is_journal(file.path)

    def _take(self, file: _Followed, data: bytes) -> None:
        if file.is_journal:
            take_journal_line(data, self.ledger)
            return
        if data.startswith(ZSTD):
            data = unzstd(data, MAX_MESSAGE)
        if file.path.name.endswith(METRICS) and data[:1] != b"{":
            self._take_metrics(data, file.path, file.offset)
        else:
            self._take_any(data, file.path, file.offset)
