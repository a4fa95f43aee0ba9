"""The decision socket: its place in the file system, and who connects to it.

A message here can steer a run, so there are three fences. The folder is ours alone and is
held open by descriptor while the socket is made, so that nobody can put another in its
place. The socket is ours alone. And the kernel is asked who is at the other end, which
holds even where the first two were loosened afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import select
import socket
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esper_otel.leyline.folders import check_socket_path
from esper_otel.leyline.wire import may_steer, peer_uid
from esper_tamiyo.serving.connection import ClientConnection

log = logging.getLogger("tamiyo")

WANTED_DESCRIPTORS = 8192

_BACKLOG = 128
_AS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class SocketError(Exception):
    """The decision socket cannot be had; the text says which one and why."""


class DecisionSocket:
    """A listening Unix socket that takes its name away when it closes."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`SocketError`; a stale socket is replaced, a living one is not."""
        try:
            check_socket_path(path)
        except ValueError as error:
            raise SocketError(str(error)) from None
        self.path = path
        try:
            with _own_folder(path.parent) as folder, _alone(folder):
                _clear(path, folder)
                self.socket = _bound(path)
                try:
                    self._inode = _inode_in(folder, path)
                except BaseException:
                    self.socket.close()
                    raise
        except OSError as error:
            raise SocketError(f"{path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Stop listening; the path goes unless someone else has taken it meanwhile."""
        self.socket.close()
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()


class Accepting:
    """Accepts at one listening socket.

    When the system has no descriptors left, whoever waits goes on waiting, and the socket stays
    readable: it is then not looked at until the next tick, or the loop would spin.
    """

    def __init__(
        self, listening: socket.socket, epoll: select.epoll, counts: Counter[str]
    ) -> None:
        """``counts`` is where connections are counted by what became of them."""
        self._listening = listening
        self._epoll = epoll
        self._counts = counts
        self._paused = False
        self._told = False

    def start(self) -> None:
        """Have the loop told of who connects."""
        self._epoll.register(self._listening, select.EPOLLIN)

    def accept(self, has_room: Callable[[], bool]) -> ClientConnection | None:
        """Who connected, if it may, and ``has_room`` says so."""
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None  # it went away again
        except OSError as error:
            self._pause(error)
            return None
        uid = peer_uid(accepted)
        if not may_steer(uid) or not has_room():
            self._counts["turned_away"] += 1
            log.warning("rejected a connection of user %d", uid)
            accepted.close()
            return None
        self._counts["connections"] += 1
        return ClientConnection(accepted)

    def resume(self) -> None:
        """At each tick: look again, if nobody could be accepted."""
        if self._paused:
            self._paused = False
            self._epoll.modify(self._listening, select.EPOLLIN)

    def _pause(self, error: OSError) -> None:
        self._counts["accepts_failed"] += 1
        self._paused = True
        self._epoll.modify(self._listening, 0)
        if not self._told:
            self._told = True
            log.warning(
                "cannot accept a connection at the decision socket: %s; it is tried again "
                "every second, and this is only counted from now on",
                error.strerror or error,
            )


@contextmanager
def _own_folder(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, which is made when it is missing and must be ours alone.

    What lies above it is not looked at: who could move it can at worst keep trainers away,
    because they heed no socket of another user.
    """
    _make(folder)
    try:
        descriptor = os.open(folder, _AS_FOLDER | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        kind = "is a symbolic link; expected" if folder.is_symlink() else "is not"
        raise SocketError(f"{folder}: {kind} a folder") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise SocketError(
                f"{folder}: belongs to user {found.st_uid}, and we are user {os.geteuid()}; "
                "choose a --socket in a folder of our own, or one that is still to be made"
            )
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077:
            raise SocketError(
                f"{folder}: others may enter it (mode {mode:04o}); expected mode 0700, or a "
                "--socket in a folder that is still to be made"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    """Make the folder and what is missing above it, each of them private."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        with suppress(FileExistsError):  # whoever was quicker is judged like any other
            each.mkdir(mode=0o700)


@contextmanager
def _alone(folder: int) -> Iterator[None]:
    """Two sidecars starting at once must not each clear the other's fresh socket."""
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def _clear(path: Path, folder: int) -> None:
    """Remove a socket that nobody listens at."""
    try:
        found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SocketError(f"{path}: exists and is not a socket; choose another --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
    if not refused:
        raise SocketError(
            f"{path}: in use by a running sidecar; stop it or choose another --socket"
        )
    os.unlink(path.name, dir_fd=folder)


def _inode_in(folder: int, path: Path) -> int:
    """The new socket's inode; raises when it is not in the folder that was checked.

    A socket is bound by path alone, so between check and bind the folder could have been
    exchanged. Binding through ``/proc/self/fd`` would be safe too, but then that is the
    name which ``ss`` and ``lsof`` show.
    """
    bound = path.lstat()
    try:
        here = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        here = None
    if here is None or (here.st_ino, here.st_dev) != (bound.st_ino, bound.st_dev):
        raise SocketError(f"{path.parent}: was replaced by another folder meanwhile")
    return bound.st_ino


def _bound(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def raise_descriptor_limit() -> None:
    """Let this process and its children have more descriptors, if the system allows it.

    1,024 is the usual limit of those who have not asked, for the sake of programs that call
    ``select``; ours do not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unbounded = hard == resource.RLIM_INFINITY
    wanted = WANTED_DESCRIPTORS if unbounded else min(hard, WANTED_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
