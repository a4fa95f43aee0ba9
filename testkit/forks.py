"""The forks of a server: one process waits for all of them, and for who asks for more.

A second process for each, which waits for it alone, would be a fork as well, and a fork of a
process with torch's modules takes as long as many a script that runs in it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from contextlib import suppress


class Forks:
    """What a server has forked, and who has asked for each."""

    def __init__(self) -> None:
        self._looks = select.poll()
        self._running: dict[int, tuple[int, socket.socket]] = {}
        self._asked: dict[int, int] = {}

    def add(self, answers: socket.socket, *, outlives: bool) -> bool:
        """Fork; True in the child. With ``outlives`` it goes on without who has asked."""
        pid = os.fork()
        if pid == 0:
            for each, (_, others) in self._running.items():
                os.close(each)
                others.close()
            answers.close()
            return True
        ends = os.pidfd_open(pid)
        self._running[ends] = pid, answers
        self._looks.register(ends, select.POLLIN)
        if not outlives:
            self._asked[answers.fileno()] = pid
            self._looks.register(answers, 0)  # for its end
        with suppress(OSError):  # who has asked is gone
            answers.send(str(pid).encode())
        return False

    def wait_for(self, owner: socket.socket, listener: socket.socket) -> bool:
        """Until somebody asks, False, or the owner is gone, True. Tells who has ended how."""
        for each in (owner, listener):
            self._looks.register(each, select.POLLIN)
        while True:
            ready = {fd for fd, _ in self._looks.poll()}
            for fd in ready & {*self._running}:
                self._tell(fd)
            gone = owner.fileno() in ready
            for fd in [*self._asked] if gone else ready & {*self._asked}:
                self._looks.unregister(fd)
                os.kill(self._asked.pop(fd), signal.SIGKILL)
            if gone or listener.fileno() in ready:
                return gone

    def _tell(self, ended: int) -> None:
        pid, answers = self._running.pop(ended)
        _, status = os.waitpid(pid, 0)
        self._looks.unregister(ended)
        os.close(ended)
        if self._asked.pop(answers.fileno(), None):
            self._looks.unregister(answers)
        with answers, suppress(OSError):  # who has asked is gone
            answers.send(str(os.waitstatus_to_exitcode(status)).encode())
