"""Child processes of the sidecar: started, ended, and started again when they die.

A child runs a module of ours at the other end of a socket pair and ends when the pipe does,
so that it cannot outlive the decide process, however that dies.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
STABLE_AFTER_S = 10.0
"""A process that lived this long has the first wait again when it dies."""


class Restarts:
    """When a process that died is started again: soon at first, then ever later.

    Told of every start and end of one process; all times are of the monotonic clock.
    """

    def __init__(self) -> None:
        self._wait_s = FIRST_WAIT_S
        self._started_at = 0.0
        self._due_at: float | None = None
        self._starts = 0

    def started(self) -> None:
        """The process runs."""
        self._started_at = time.monotonic()
        self._due_at = None
        self._starts += 1

    @property
    def count(self) -> int:
        """How often the process was started again."""
        return max(self._starts - 1, 0)

    def ended(self) -> float:
        """The process is gone; returns how many seconds to wait for the next."""
        now = time.monotonic()
        if now - self._started_at >= STABLE_AFTER_S:
            self._wait_s = FIRST_WAIT_S
        self._started_at = now  # a start that fails must not count as a long life
        wait_s = self._wait_s
        self._due_at = now + wait_s
        self._wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        return wait_s

    def due_in(self) -> float | None:
        """Seconds until the process is to be started again, None when it runs."""
        return None if self._due_at is None else max(0.0, self._due_at - time.monotonic())


class ChildProcess:
    """One child: its process, our end of its pipe, and when it is started again.

    Who extends it says what the module is started with, what comes through the pipe and how
    it stands.
    """

    kind = socket.SOCK_STREAM
    """Of the socket pair; ``SOCK_SEQPACKET`` keeps messages whole."""

    def __init__(self, module: str, end_patience_s: float) -> None:
        """``module`` is run as ``python -m MODULE FD ARGUMENTS``."""
        self.pipe: socket.socket | None = None
        """None while no process runs."""
        self._module = module
        self._end_patience_s = end_patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = Restarts()
        self._epoll: select.epoll | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, None while none runs."""
        return self._process.pid if self._process else None

    @property
    def restarts(self) -> int:
        """How often the process was started again."""
        return self._restarts.count

    def watch(self, epoll: select.epoll) -> None:
        """Have ``epoll`` tell of what comes through the pipe, of every process from now on."""
        self._epoll = epoll

    def has_pipe(self, fd: int) -> bool:
        """Whether ``fd`` is our end of the pipe."""
        return self.pipe is not None and fd == self.pipe.fileno()

    def due_in(self) -> float | None:
        """Seconds until the process is to be started again, None when it runs."""
        return self._restarts.due_in()

    def status(self) -> dict[str, Any]:
        """State and counts as plain data, for ``tamiyo status``."""
        raise NotImplementedError

    def close(self) -> None:
        """End the process and wait for it, not long."""
        self._end(self._end_patience_s)

    def _launch(self, arguments: Sequence[str], inherited: Sequence[int] = ()) -> socket.socket:
        """Start the process; our end of its pipe. Raises ``OSError`` when that cannot be.

        ``inherited`` are descriptors that it gets besides its end of the pipe.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, self.kind)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        self._module,
                        str(theirs.fileno()),
                        *arguments,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *inherited],
                )
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self.pipe = ours
        self._restarts.started()
        if self._epoll is not None:
            self._epoll.register(ours, select.EPOLLIN)
        return ours

    def _reap(self) -> float:
        """The process is gone, or did not start: seconds until it is due again."""
        self._end(0.0)
        return self._restarts.ended()

    def _end(self, patience_s: float) -> None:
        if self.pipe is not None:
            if self._epoll is not None:
                self._epoll.unregister(self.pipe)
            self.pipe.close()
            self.pipe = None
        process, self._process = self._process, None
        end(process, patience_s)


def end(process: subprocess.Popen[bytes] | None, patience_s: float) -> None:
    """Wait for a process whose pipe has ended, not long; then it is killed."""
    if process is None:
        return
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
