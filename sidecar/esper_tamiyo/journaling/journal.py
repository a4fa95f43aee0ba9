"""The journal: decisions and their reasons, in files that people and machines can read.

A folder of ``journal-000001.jsonl``, ``journal-000002.jsonl``, …; the highest number is
being written, the lowest go when there are too many. A line is complete when its newline
is there; what a kill has cut short is recognised when it is read. Nothing is ever renamed
or changed, so a reader needs no lock.

Others may do so: whoever tidies up deletes or moves the file that is being written, or its
folder, or cuts it short (as ``logrotate`` does, by renaming or with ``copytruncate``). That is
looked for before each writing and once a second, and the next file is begun.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from esper_otel.leyline.folders import named_socket, state_folder, usual_socket_path
from esper_tamiyo.journaling.entries import AnyEntry, TableInUse, rfc3339

MAX_FILE_MB = 8.0
MAX_FILES = 8

_NAME = re.compile(r"journal-(\d{6,})\.jsonl")
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyEntry)


class Damage(NamedTuple):
    """A line that is not an entry: cut short by a kill, or not ours."""

    path: Path
    line: int
    problem: str

    def __str__(self) -> str:
        """As it is told to people."""
        return f"{self.path}:{self.line}: {self.problem}; the line is skipped"


def default_folder(socket: Path | None = None) -> Path:
    """The journal of the sidecar at ``socket`` (None: at the place that holds without a word).

    Beside a socket that was chosen, by an option or by ``ESPER_TAMIYO_SOCKET``. The usual
    socket's folder does not outlive a login: its journal is ``$XDG_STATE_HOME/esper/journal``.
    """
    socket = socket or named_socket()
    if socket is not None and socket != usual_socket_path():
        return socket.with_suffix(".journal")
    return state_folder() / "esper" / "journal"


def files_of(folder: Path) -> list[Path]:
    """The journal's files, oldest first; raises ``OSError`` when there is no folder."""
    ours = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(ours, key=number_of)


class Journal:
    """Appends entries to the newest file of a folder.

    Every method raises ``OSError`` when the system does not let it. Bounded: at most
    ``max_files`` of about ``max_bytes`` each. The folder is locked, since lines of two
    writers would mix.
    """

    def __init__(self, folder: Path, max_bytes: int, max_files: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._table: TableInUse | None = None
        self._dirty = False
        self._lock = _locked(folder)
        try:
            files = files_of(folder)
            self._number = number_of(files[-1]) if files else 1
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def path(self) -> Path:
        """The file that is being written."""
        return self.folder / f"journal-{self._number:06d}.jsonl"

    def go_on(self) -> str:
        """Begin the next file when somebody took this one away; returns what happened to it.

        "" while it is where readers look for it, as long as it was left. The folder is made
        again. The number is a new one, so that whoever follows the journal sees it.
        """
        what = self._what_happened()
        if what:
            self._keep_folder()
            files = files_of(self.folder)
            self._begin(max(self._number, *map(number_of, files), 0) + 1)
        return what

    def append(self, entries: Sequence[AnyEntry]) -> None:
        """Write ``entries``, each a whole line, in one go."""
        if not entries:
            return
        for entry in entries:
            if isinstance(entry, TableInUse):
                self._table = entry
        if self._size >= self._max_bytes:
            self._rotate()
        self._write(b"".join(map(encode_entry, entries)))

    def sync(self) -> None:
        """Have what was written outlive a power cut."""
        if self._dirty:
            self._dirty = False
            os.fsync(self._file)

    def close(self) -> None:
        """Write no more."""
        try:
            self.sync()
        finally:
            os.close(self._file)
            os.close(self._lock)

    def _what_happened(self) -> str:
        ours = os.fstat(self._file)
        try:
            there = self.path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return "was deleted or moved"
        if not os.path.samestat(ours, there):
            return "was replaced"
        return "was cut short" if ours.st_size < self._size else ""

    def _keep_folder(self) -> None:
        """Lock the folder that is there now, when it is another one."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(self._lock), self.folder.stat()):
                return
        before, self._lock = self._lock, _locked(self.folder)
        os.close(before)

    def _open(self) -> None:
        path = self.path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(path, flags, 0o600)
        self._size = os.fstat(self._file).st_size
        if self._size and not _ends_with_newline(path):
            self._write(b"\n")  # what a kill cut short is a line of its own

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:  # a nearly full disk takes a part first, and refuses the next
            count = os.write(self._file, rest)
            self._size += count
            self._dirty = True
            rest = rest[count:]

    def _rotate(self) -> None:
        self.sync()
        self._begin(self._number + 1)

    def _begin(self, number: int) -> None:
        """Go on in the file of that number."""
        old, before, self._number = self._file, self._number, number
        try:
            self._open()
        except OSError:
            self._number = before
            raise
        os.close(old)
        if self._table is not None:
            self._write(encode_entry(self._table))  # so that each file explains itself
        for path in files_of(self.folder)[: -self._max_files]:
            path.unlink(missing_ok=True)


def encode_entry(entry: AnyEntry) -> bytes:
    """One line; ``at`` comes first, in words, and is told again in nanoseconds."""
    head = b'{"at":"%s",' % rfc3339(entry.time_unix_nano).encode()
    return head + _encoder.encode(entry)[1:] + b"\n"


def read(folder: Path) -> Iterator[AnyEntry | Damage]:
    """Every entry in the order in which it was written, and what is no entry.

    Raises ``OSError`` when there is no such folder. A file that is rotated away meanwhile
    is passed over.
    """
    for path in files_of(folder):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        yield from _entries(path, data.splitlines(keepends=True), first_line=1)


def follow(folder: Path, poll_s: float = 0.2) -> Iterator[AnyEntry | Damage]:
    """As :func:`read`, and then what is written from there on, for ever.

    A file is held open until it is read to its end, so that its entries are not missed when
    it is rotated away meanwhile.
    """
    number = 0
    files_of(folder)  # raises where there is none to begin with
    while True:
        path = next((each for each in _files_now(folder) if number_of(each) >= number), None)
        if path is None:
            time.sleep(poll_s)
            continue
        number = number_of(path)
        with suppress(FileNotFoundError), path.open("rb") as file:
            rest, lines = b"", 0
            is_followed = False
            while not is_followed:
                is_followed = any(number_of(each) > number for each in _files_now(folder))
                data = rest + file.read()
                whole = data if is_followed else data[: data.rfind(b"\n") + 1]
                yield from _entries(path, whole.splitlines(keepends=True), lines + 1)
                rest = data[len(whole) :]
                lines += whole.count(b"\n")
                if not is_followed:
                    time.sleep(poll_s)
        number += 1


def _entries(path: Path, lines: list[bytes], first_line: int) -> Iterator[AnyEntry | Damage]:
    for number, line in enumerate(lines, first_line):
        if not line.strip():
            continue
        try:
            yield _decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            cut = not line.endswith(b"\n") or "truncated" in str(error)
            yield Damage(path, number, "ends in the middle" if cut else f"no entry: {error}")


def _files_now(folder: Path) -> list[Path]:
    """As :func:`files_of`; none while somebody has taken the folder away."""
    try:
        return files_of(folder)
    except FileNotFoundError:
        return []


def _locked(folder: Path) -> int:
    """A descriptor of the folder, made where it is missing, whose lock is ours."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            message = "another sidecar writes its journal there"
            raise OSError(error.errno, message) from None
        raise
    return lock


def number_of(path: Path) -> int:
    """The number of a file of a journal; 0 of another file."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
