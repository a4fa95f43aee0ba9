"""The journal: decisions and their reasons, in files that people and machines can read.

A folder of ``journal-000001.jsonl``, ``journal-000002.jsonl``, …; the highest number is
being written, the lowest go when there are too many. A line is complete when its newline
is there; what a kill has cut short is recognised when it is read. Nothing is ever renamed
or changed, so a reader needs no lock.

A thread writes it, so that a slow disk holds up nothing else: it is given entries through
a bounded queue, writes them at once, has the disk keep them about once a second, and tries
again when the journal cannot be written.
"""

from __future__ import annotations

import fcntl
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from esper_otel.leyline.wire import default_socket_path
from esper_tamiyo import release
from esper_tamiyo.journaling.entries import AnyEntry, Closed, Gap, Opened, TableInUse, rfc3339

MAX_FILE_MB = 8.0
MAX_FILES = 8

SYNC_S = 1.0
RETRY_S = 5.0
MAX_QUEUE = 1024
"""Lists of entries that wait for the disk; beyond it they are dropped, and counted."""

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
        return f"{self.path}:{self.line}: {self.problem}; the line is left out"


def default_folder(socket: Path | None = None) -> Path:
    """The journal of the sidecar at ``socket`` (None: at the default place).

    Beside a socket that was chosen. The default socket's folder does not outlive a login,
    so its journal is ``$XDG_STATE_HOME/esper/journal``.
    """
    if socket is not None and socket != default_socket_path():
        return socket.with_suffix(".journal")
    state = os.environ.get("XDG_STATE_HOME")
    home = Path(state) if state else Path.home() / ".local" / "state"
    return home / "esper" / "journal"


def files_of(folder: Path) -> list[Path]:
    """The journal's files, oldest first; raises ``OSError`` when there is no folder."""
    numbered = [(match[1], path) for path in folder.iterdir() if (match := _match(path))]
    return [path for _, path in sorted(numbered, key=lambda pair: int(pair[0]))]


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
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._take_lock()
            files = files_of(folder)
            self._number = _number(files[-1]) if files else 1
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

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

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(error.errno, "another sidecar writes its journal there") from None

    def _open(self) -> None:
        path = self.folder / f"journal-{self._number:06d}.jsonl"
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
        old, self._number = self._file, self._number + 1
        try:
            self._open()
        except OSError:
            self._number -= 1
            raise
        os.close(old)
        if self._table is not None:
            self._write(encode_entry(self._table))  # so that each file explains itself
        for path in files_of(self.folder)[: -self._max_files]:
            path.unlink(missing_ok=True)


class JournalThread:
    """Owns a :class:`Journal` and the thread that writes to it.

    ``opening`` opens the journal and may raise ``OSError``, as everything of a journal.
    """

    def __init__(self, opening: Callable[[], Journal], folder: Path) -> None:
        self.error = ""
        """Why the journal cannot be written, "" while it can."""
        self.written = 0
        self.lost = 0
        self._opening = opening
        self._folder = folder
        self._journal: Journal | None = None
        self._table: TableInUse | None = None
        self._accounted = 0
        self._retry_at = 0.0
        self._queue: queue.Queue[list[AnyEntry] | None] = queue.Queue(MAX_QUEUE)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self) -> None:
        """Open the journal and write from now on."""
        self._thread.start()

    def put(self, entries: list[AnyEntry]) -> None:
        """Have ``entries`` written; never waits."""
        try:
            self._queue.put_nowait(entries)
        except queue.Full:
            self._dropped += len(entries)

    def close(self, timeout_s: float) -> None:
        """Write what is queued and stop, within a time."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    @property
    def all_lost(self) -> int:
        """Entries that were given and are not in the journal."""
        return self.lost + self._dropped

    def _run(self) -> None:
        self._attempt([])
        sync_at = time.monotonic() + SYNC_S
        while True:
            try:
                entries = self._queue.get(timeout=max(0.0, sync_at - time.monotonic()))
            except queue.Empty:
                entries = []
            if entries is None:
                break
            self._attempt(entries)
            if time.monotonic() >= sync_at:
                sync_at = time.monotonic() + SYNC_S
                self._sync()
        self._attempt([Closed(time_unix_nano=time.time_ns(), pid=os.getpid())])
        if self._journal is not None:
            with suppress(OSError):
                self._journal.close()

    def _attempt(self, entries: list[AnyEntry]) -> None:
        """Write ``entries``, or count them as lost."""
        self._table = next((e for e in entries if isinstance(e, TableInUse)), self._table)
        try:
            if self._journal is None:
                if time.monotonic() < self._retry_at:
                    self.lost += len(entries)
                    return
                self._journal = self._open_journal()
            self._journal.append(self._with_gap(entries))
        except OSError as error:
            self._failed(error)
            self.lost += len(entries)
        else:
            self.written += len(entries)
            self._accounted = self.all_lost
            self.error = ""

    def _open_journal(self) -> Journal:
        journal = self._opening()
        opened = Opened(time_unix_nano=time.time_ns(), pid=os.getpid(), release=release())
        journal.append([opened, *([self._table] if self._table else [])])
        return journal

    def _with_gap(self, entries: list[AnyEntry]) -> list[AnyEntry]:
        lost = self.all_lost - self._accounted
        if not lost:
            return entries
        because = self.error or "the disk did not keep up"
        return [Gap(time_unix_nano=time.time_ns(), lost=lost, because=because), *entries]

    def _sync(self) -> None:
        try:
            if self._journal is not None:
                self._journal.sync()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.error = f"{self._folder}: {(error.strerror or str(error)).lower()}"
        self._retry_at = time.monotonic() + RETRY_S
        journal, self._journal = self._journal, None
        if journal is not None:
            with suppress(OSError):
                journal.close()


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
    while True:
        path = next((each for each in files_of(folder) if _number(each) >= number), None)
        if path is None:
            time.sleep(poll_s)
            continue
        number = _number(path)
        with suppress(FileNotFoundError), path.open("rb") as file:
            rest, lines = b"", 0
            is_followed = False
            while not is_followed:
                is_followed = any(_number(each) > number for each in files_of(folder))
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
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            cut = not line.endswith(b"\n") or "truncated" in str(error)
            yield Damage(path, number, "ends in the middle" if cut else f"no entry: {error}")


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _number(path: Path) -> int:
    match = _match(path)
    return int(match[1]) if match else 0


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
