"""The decision socket's place in the file system, and who may knock.

The folder is private, the socket is private, and the peer's uid is checked as well:
a message here can steer a run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esper_otel.leyline.wire import check_socket_path

_UCRED = struct.Struct("3i")
_BACKLOG = 128


class SocketError(Exception):
    """The decision socket cannot be had; the text says which one and why."""


class Listener:
    """A listening Unix socket that takes its name away when it closes."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`SocketError`; a stale socket is replaced, a living one is not."""
        try:
            check_socket_path(path)
        except ValueError as error:
            raise SocketError(str(error)) from None
        self.path = path
        try:
            _prepare_folder(path.parent)
            with _alone(path.parent):
                _clear(path)
                self.socket = _bound(path)
            self._inode = path.lstat().st_ino
        except OSError as error:
            raise SocketError(f"{path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Stop listening; the path goes unless someone else has taken it meanwhile."""
        self.socket.close()
        with suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, uid, _ = _UCRED.unpack(credentials)
    return int(uid)


def may_knock(uid: int) -> bool:
    """Whether that user may talk to us: ourselves, and root, who could anyway."""
    return uid in (0, os.geteuid())


def _prepare_folder(folder: Path) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise SocketError(f"{folder}: is a symbolic link; expected a folder")
    if not stat.S_ISDIR(found.st_mode):
        raise SocketError(f"{folder}: is not a folder")
    if found.st_uid not in (0, os.geteuid()):
        raise SocketError(f"{folder}: belongs to user {found.st_uid}, not to us")
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others_write and not found.st_mode & stat.S_ISVTX:
        raise SocketError(f"{folder}: others may write to it; expected mode 0700")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two sidecars starting at once must not each clear the other's fresh socket."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    """Remove a socket that nobody listens at."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"{path}: exists and is not a socket; choose another --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
    if not refused:
        raise SocketError(
            f"{path}: taken by a living sidecar; end it or choose another --socket"
        )
    path.unlink()


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
