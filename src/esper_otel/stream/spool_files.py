"""Spool files: undelivered telemetry on disk while a receiver is down.

A process can be killed at any moment, so what is unsent must not be in memory alone. While the
receiver answers nothing is written. From its first failure on, or from the moment a batch has
waited :data:`~esper_otel.stream.spool.OVERDUE_S`, each batch is written as it comes, into
files of one request each (``NAME.NUMBER.SIGNAL.otlp``, in the format of
:mod:`esper_otel.leyline.otlp_file`). They hold what is unsent and nothing else: a file goes as
soon as its request was delivered, and one that was delivered in part is replaced by the rest in
one step. So whoever finds the files needs to know nothing else, and the one thing that can come
twice is a request that the receiver had taken when the process was killed, and the file had not
gone yet.

Nothing is flushed to the device: what was written outlives the process, not the machine.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from esper_otel.leyline.otlp_file import framed
from esper_otel.stream.destination import Signal
from esper_otel.stream.recording import open_to_append, signal_of, write_whole
from esper_otel.stream.spool import Batch, Spool

log = logging.getLogger("esper_otel")

PART = ".part"
"""Ends the name of a file that is to take the place of another; it holds nothing new."""

REST_S = 5.0
"""A disk that failed is left alone for so long."""

PATIENCE_S = 1.0
"""Longest that sending waits for a disk, and closing beyond its time."""

MOST_NAMED = 8
"""Files that a message names; beyond it the folder stands for them."""

_OURS = re.compile(r"(?P<name>.+)\.\d{6,}\.[a-z]+\.otlp")


def lock_path_of(path: Path) -> Path | None:
    """The lock that the process which writes the spool file ``path`` holds.

    None for a file that is none of a spool's.
    """
    matched = _OURS.fullmatch(path.name)
    if matched is None or signal_of(path) is None:
        return None
    return path.with_name(f"{matched['name']}.lock")


def spool_files_in(folder: Path, stem: str = "") -> list[Path]:
    """Spool files in ``folder``, by name; those of one run and rank where ``stem`` is theirs.

    Raises :class:`OSError`.
    """
    # What follows the stem of a process is its number and a word of its own.
    wanted = re.compile(rf"{re.escape(stem)}-\d+-[0-9a-f]+\..+" if stem else r".+")
    return [
        folder / name
        for name in sorted(path.name for path in folder.iterdir())
        if wanted.fullmatch(name) and lock_path_of(Path(name)) is not None
    ]


def resend_words(files: Sequence[Path | str]) -> str:
    """What follows ``esper-otel resend`` to have ``files`` delivered."""
    if len(files) > MOST_NAMED:
        return str(Path(files[0]).parent)
    return " ".join(map(str, files))


class SpoolLock:
    """Held by who works on the spool files of one process: that process, or who delivers them.

    A POSIX record lock: it dies with its process however that ends, and a forked child, which
    may outlive its parent, does not inherit it.
    """

    def __init__(self, path: Path, file: int) -> None:
        self._path = path
        self._file = file

    @classmethod
    def take(cls, path: Path) -> SpoolLock | None:
        """The lock at ``path``, None while somebody else has it; raises :class:`OSError`."""
        path = path.absolute()
        # Closing any descriptor of a file gives up all record locks of this process on it. One
        # call says whether it is ours alone, as two threads may ask at once.
        ours = object()
        if _held.setdefault(path, ours) is not ours:
            return None
        file = None
        try:
            file = _locked(path)
        finally:
            if file is None:
                del _held[path]
        return None if file is None else cls(path, file)

    def close(self) -> None:
        """Give it back, and take its file away."""
        with suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        _held.pop(self._path, None)


_held: dict[Path, object] = {}
"""Locks of this process."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems say that have no locks: there nobody holds any."""


def _locked(path: Path) -> int | None:
    """A descriptor of the file at ``path`` with a lock on it, None where another has that."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                return None
        if _is_at(path, file):
            return file
        os.close(file)  # who held it before has taken its file away meanwhile


def _is_at(path: Path, file: int) -> bool:
    """Whether the open ``file`` is the one that ``path`` names."""
    try:
        return path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


class Segment:
    """One spool file: at most one request of unsent batches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[Batch] = []
        self.size = 0
        self.file = open_to_append(path)

    def add(self, batch: Batch) -> None:
        """Write ``batch`` whole, or nothing of it and :class:`OSError`."""
        write_whole(self.file, framed(batch.body))
        self.batches.append(batch)
        self.size += len(batch.body)
        batch.segment = self

    def replace(self, batches: list[Batch]) -> None:
        """Have the file hold ``batches`` alone, in one step; raises :class:`OSError`."""
        beside = self.path.with_name(self.path.name + PART)
        with suppress(FileNotFoundError):
            beside.unlink()
        file = open_to_append(beside)
        try:
            write_whole(file, b"".join(framed(batch.body) for batch in batches))
            beside.replace(self.path)
        except OSError:
            os.close(file)
            with suppress(OSError):
                beside.unlink()
            raise
        os.close(self.file)
        self.file = file
        self.batches = batches
        self.size = sum(len(batch.body) for batch in batches)

    def remove(self) -> None:
        """Take the file away."""
        os.close(self.file)
        self.path.unlink(missing_ok=True)


class SpoolFiles:
    """The spool files of one process; for one thread at a time.

    Nothing is made before there is something to write. ``stem`` says whose they are; a word of
    its own is added, as processes in containers share their numbers.
    """

    def __init__(self, folder: Path, stem: str, segment_bytes: int) -> None:
        self._folder = folder
        self._name = f"{stem}-{secrets.token_hex(4)}"
        self._segment_bytes = segment_bytes
        self._segments: list[Segment] = []
        self._newest: dict[Signal, Segment] = {}
        self._numbered: Counter[Signal] = Counter()
        self._lock: SpoolLock | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that are there, by name."""
        return tuple(sorted(segment.path for segment in self._segments))

    def write(self, batch: Batch) -> None:
        """Write one batch; raises :class:`OSError`, and leaves no empty file then."""
        segment = self._newest.get(batch.signal)
        if segment is None or segment.size + len(batch.body) > self._segment_bytes:
            segment = self._begin(batch.signal)
        try:
            segment.add(batch)
        except OSError:
            if not segment.batches:
                self._remove(segment)
            raise

    def trim(self, segments: Iterable[Segment]) -> None:
        """Take settled batches out of ``segments``; raises :class:`OSError`."""
        for segment in segments:
            if segment not in self._segments:
                continue
            left = [batch for batch in segment.batches if not batch.settled]
            if not left:
                self._remove(segment)
            elif len(left) < len(segment.batches):
                segment.replace(left)

    def remove_settled(self) -> None:
        """Take away the files of which nothing is unsent; raises :class:`OSError`."""
        for segment in list(self._segments):
            if segment.batches[-1].settled and all(each.settled for each in segment.batches):
                self._remove(segment)

    def close(self) -> None:
        """Have the files hold what is unsent alone, and leave them; raises :class:`OSError`."""
        try:
            self.trim(list(self._segments))
        finally:
            for segment in self._segments:
                os.close(segment.file)
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _begin(self, signal: Signal) -> Segment:
        if self._lock is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = SpoolLock.take(self._folder / f"{self._name}.lock")
        self._numbered[signal] += 1
        name = f"{self._name}.{self._numbered[signal]:06}.{signal}.otlp"
        segment = Segment(self._folder / name)
        self._segments.append(segment)
        self._newest[signal] = segment
        return segment

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        for signal, newest in list(self._newest.items()):
            if newest is segment:
                del self._newest[signal]
        segment.remove()


class Keeper:
    """Thread that writes what a receiver does not take, so that neither draining nor sending
    waits for a disk. It begins with the first outage."""

    def __init__(self, spool: Spool, folder: Path, stem: str) -> None:
        self._spool = spool
        self._folder = folder
        self._files = SpoolFiles(folder, stem, spool.max_group)
        self._at_work = threading.Lock()
        self._due = threading.Event()
        self._beginning = threading.Lock()
        self._thread: threading.Thread | None = None
        self._rests_until = 0.0
        self._told = False
        self._closed = False

    def look(self) -> None:
        """Have written what is unsent, where a receiver is away; else this costs nothing."""
        if not self._spool.away or time.monotonic() < self._rests_until:
            return
        with self._beginning:
            if self._thread is None and not self._closed:
                self._thread = _started(self._run, "esper-spool")
        self._due.set()

    def settled(self, batches: Iterable[Batch]) -> None:
        """Take ``batches``, which are settled, out of the files before anything else is sent.

        Of a disk that hangs they are taken out later.
        """
        segments = {each.segment for each in batches if isinstance(each.segment, Segment)}
        if not segments or not self._at_work.acquire(timeout=PATIENCE_S):
            return
        try:
            if not self._closed:
                self._files.trim(segments)
                self._files.remove_settled()
        except OSError as error:
            self._fail(error)
        finally:
            self._at_work.release()

    def finish(self, batches: list[Batch], end: float) -> tuple[Path, ...]:
        """Leave ``batches``, which is all that is unsent, in files until the monotonic time
        ``end``, or a second later; returns their paths.

        A batch that lies in none has no segment then. On a thread, so that a dead disk holds up
        nobody.
        """
        if not batches and self._thread is None:
            return ()
        thread = _started(lambda: self._finish(batches), "esper-leave")
        if thread is None:
            # Python 3.12 and later start no threads while the interpreter ends.
            self._finish(batches)
        else:
            thread.join(max(end - time.monotonic(), 0.0) + PATIENCE_S)
        return self._files.paths

    def _run(self) -> None:
        while not self._closed:
            self._due.wait()
            self._due.clear()
            with self._at_work:
                if not self._closed:
                    self._write(self._spool.unkept())

    def _finish(self, batches: list[Batch]) -> None:
        with self._at_work:
            self._write([batch for batch in batches if batch.segment is None])
            self._closed = True
            self._due.set()
            try:
                self._files.close()
            except OSError as error:
                self._fail(error)

    def _write(self, batches: list[Batch]) -> None:
        """Write ``batches``, of each signal up to the first for which there is no room."""
        full: set[Signal] = set()
        try:
            self._files.remove_settled()
            for batch in batches:
                if batch.settled or batch.signal in full:
                    continue
                try:
                    self._files.write(batch)
                except OSError as error:
                    full.add(batch.signal)
                    self._fail(error)
            # Delivered while it was being written, when nobody could know where.
            late = [each.segment for each in batches if each.settled]
            self._files.trim(each for each in late if isinstance(each, Segment))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Say once that files fail; what they should hold waits in memory."""
        self._rests_until = time.monotonic() + REST_S
        log.debug("the fault", exc_info=error)
        if not self._told:
            self._told = True
            log.warning(
                "unsent telemetry cannot be kept in %s (%s): it waits in memory, and is lost "
                "with the process",
                self._folder,
                error,
            )


def _started(target: Callable[[], None], name: str) -> threading.Thread | None:
    """A thread that has begun, None where none can begin any more."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread
