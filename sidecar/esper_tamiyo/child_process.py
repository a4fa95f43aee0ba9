"""Child processes of the sidecar: started, ended, and started again when they die or hang.

A child runs a module of ours at the other end of a socket pair and ends when the pipe does,
so that it cannot outlive the decide process, however that dies. About once a second it says
something through the pipe, from its main loop: that is how a child that hangs is known.
"""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from esper_tamiyo.latency import put_behind

log = logging.getLogger("tamiyo")

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
STABLE_AFTER_S = 10.0
"""A process that lived this long has the first wait again when it dies."""

SILENT_AFTER = 4
"""Ticks without a heartbeat after which a child is said to be silent."""

REPLACED_AFTER = 8
"""Ticks without a heartbeat, and with a processor, after which a child is killed, and another
one started."""

START_TICKS = 60
"""Ticks that a process has until its first heartbeat: it loads its modules, and on a busy
machine that takes long."""

LEAST_TICK = 1 / 16
"""What a tick counts towards silence in which a child had no processor at all: whoever hears
nothing of a child for a minute must not be told that all is well. It counts nothing towards a
replacement, since another process would have no processor either, and begin anew."""

LINES_BYTES = 4096
"""Read at once of a child that speaks in lines."""

GIVES_MEMORY_BACK = {"MALLOC_ARENA_MAX": "2", "MALLOC_TRIM_THRESHOLD_": str(4 << 20)}
"""Environment of a child whose memory that was needed once goes back to the system."""

BY_TERMINALS = (signal.SIGINT, signal.SIGHUP)
"""Signals that a terminal sends to the whole group of processes."""

BY_SUPERVISORS = (*BY_TERMINALS, signal.SIGTERM)
"""Those that a supervisor may send to all of them as well."""

_PR_SET_PDEATHSIG = 1


def become_child(
    fd: str, *, ignored: Iterable[signal.Signals], at_parents_death: int, nice: int
) -> socket.socket:
    """Be a child, whose end of the pipe is ``fd``; returns that.

    Signals that are ``ignored`` are for the decide process: the end of the pipe is what ends a
    child. One that is stopped does not see it, and would keep its port, or the lock of the
    state, from the next sidecar, so the kernel sends a signal ``at_parents_death``, where it is
    Linux.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with suppress(ImportError, AttributeError, OSError):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, at_parents_death)
    os.nice(nice)
    return socket.socket(fileno=int(fd))


class Pulse:
    """Whether a child has said something, by ticks of whoever listens, about a second each.

    Not by a clock: when the machine was asleep, or the listener itself had no processor, it
    heard nothing because it did not listen, and that is one tick, however long it took.
    """

    def __init__(self) -> None:
        self._silence = self._missed = 0.0
        self.began = False
        """Whether it has said anything yet."""

    def started(self) -> None:
        """It is another process now."""
        self._silence = self._missed = 0.0
        self.began = False

    def heard(self) -> None:
        """It said something."""
        self._silence = self._missed = 0.0
        self.began = True

    def missed(self, starved: float = 0.0) -> None:
        """A tick went by; for the share ``starved`` of it the child waited for a processor."""
        self._silence += max(LEAST_TICK, 1.0 - starved)
        self._missed += 1.0 - starved

    @property
    def is_silent(self) -> bool:
        """Whether it should have said something long ago."""
        return self._silence >= (SILENT_AFTER if self.began else START_TICKS)

    @property
    def is_lost(self) -> bool:
        """Whether it is not to be waited for any more."""
        return self._missed >= (REPLACED_AFTER if self.began else START_TICKS)


class Starvation:
    """How much of its time a process has waited for a processor.

    One that hangs does not wait for any, unless it turns in a circle; then it waits for as much
    of its time as everybody else does.
    """

    def __init__(self) -> None:
        self._at_s = time.monotonic()
        self._ran_ns = self._waited_ns = 0

    def share(self, pid: int) -> float:
        """The share of the time since this was asked last, from 0 to 1."""
        now = time.monotonic()
        elapsed_ns = (now - self._at_s) * 1e9
        ran, waited, wants = processor_use(pid)
        before, self._at_s = (self._ran_ns, self._waited_ns), now
        self._ran_ns, self._waited_ns = ran, waited
        if wants and (ran, waited) == before:
            return 1.0  # a wait is counted when it has ended, and this one has not
        return min((waited - before[1]) / elapsed_ns, 1.0) if elapsed_ns > 0 else 0.0


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

    def __init__(self, module: str, end_patience_s: float, title: str = "") -> None:
        """``module`` is run as ``python -m MODULE FD ARGUMENTS``; ``title`` names it in the
        log."""
        self.pipe: socket.socket | None = None
        """None while no process runs."""
        self._module = module
        self._end_patience_s = end_patience_s
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = Restarts()
        self._epoll: select.epoll | None = None
        self._title = title or module
        self._killed: list[subprocess.Popen[bytes]] = []
        self._starvation = Starvation()
        self._line = b""
        """What came of a line whose end has not."""
        self.pulse = Pulse()
        self.hung = 0
        """Processes that were killed because they said nothing any more."""

    @property
    def pid(self) -> int | None:
        """Of the process, None while none runs."""
        return self._process.pid if self._process else None

    @property
    def restarts(self) -> int:
        """How often the process was started again."""
        return self._restarts.count

    @property
    def state(self) -> str:
        """``working``, ``starting``, ``silent`` (it lives and says nothing) or ``down``."""
        if self.pipe is None:
            return "down"
        if self.pulse.is_silent:
            return "silent"
        return "working" if self.pulse.began else "starting"

    def watch(self, epoll: select.epoll) -> None:
        """Have ``epoll`` tell of what comes through the pipe, of every process from now on."""
        self._epoll = epoll

    def has_pipe(self, fd: int) -> bool:
        """Whether ``fd`` is our end of the pipe."""
        return self.pipe is not None and fd == self.pipe.fileno()

    def due_in(self) -> float | None:
        """Seconds until the process is to be started again, None when it runs."""
        return self._restarts.due_in()

    @property
    def is_due(self) -> bool:
        """Whether the process is to be started again now."""
        return self.due_in() == 0.0

    def read(self) -> None:
        """Take in what came through the pipe, or that the process is gone."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """State and counts as plain data, for ``tamiyo status``."""
        raise NotImplementedError

    def reap(self) -> None:
        """The process is gone, or given up: plan the next one."""
        raise NotImplementedError

    def check_pulse(self) -> None:
        """Once in each tick of the decide process: kill the process if it hangs.

        What it said before must have been read, and :meth:`Pulse.heard` told.
        """
        self._killed = [process for process in self._killed if process.poll() is None]
        if self.pipe is None:
            return
        was_silent = self.pulse.is_silent
        self.pulse.missed(self._starvation.share(self.pid or 0))
        if self.pulse.is_lost:
            self.hung += 1
            log.warning(
                "the %s process does not respond: it is killed and replaced", self._title
            )
            self.reap()
        elif self.pulse.is_silent and not was_silent:
            log.warning(
                "the %s process does not respond: no heartbeat for %d s",
                self._title,
                SILENT_AFTER,
            )

    def close(self) -> None:
        """End the process and wait for it, not long."""
        self._end(self._end_patience_s)
        for killed in self._killed:
            with suppress(subprocess.TimeoutExpired):  # it waits for a disk
                killed.wait(self._end_patience_s)

    def _receive(self, most: int) -> bytes | None:
        """What came through the pipe, b"" when the process is gone; None when nothing did."""
        if self.pipe is None:
            return None
        try:
            return self.pipe.recv(most)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _receive_lines(self) -> list[bytes]:
        """Whole lines that came through the pipe; plans the next process when this is gone."""
        data = self._receive(LINES_BYTES)
        if not data:
            if data is not None:
                self.reap()
            return []
        *lines, self._line = (self._line + data).split(b"\n")
        return lines

    def _launch(
        self,
        arguments: Sequence[str],
        inherited: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> socket.socket:
        """Start the process; our end of its pipe. Raises ``OSError`` when that cannot be.

        ``inherited`` are descriptors that it gets besides its end of the pipe, ``environment``
        variables besides ours; ours hold over them.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, self.kind)
        python = [sys.executable, "-P", "-m"]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*python, self._module, str(theirs.fileno()), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *inherited],
                    env=None if environment is None else {**environment, **os.environ},
                )
            except BaseException:
                ours.close()
                raise
        put_behind(self._process.pid)
        ours.setblocking(False)
        self.pipe = ours
        self._restarts.started()
        self.pulse.started()
        self._starvation = Starvation()
        self._line = b""
        if self._epoll is not None:
            self._epoll.register(ours, select.EPOLLIN)
        return ours

    def _reap(self) -> float:
        """The process is gone, hangs or did not start: seconds until it is due again.

        It is killed and not waited for: one that waits for a disk cannot die yet.
        """
        if self._process is not None:
            self._process.kill()
            self._killed.append(self._process)
            self._process = None
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


def processor_use(pid: int) -> tuple[int, int, bool]:
    """Of the main thread of a process: nanoseconds on a processor, and of waiting for one, and
    whether it is on one or waits now. Zeros where the system does not say.
    """
    try:
        ran, waited = Path(f"/proc/{pid}/schedstat").read_bytes().split()[:2]
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
        return int(ran), int(waited), state == b"R"
    except (OSError, ValueError):
        return 0, 0, False


def rss_mb() -> float:
    """Memory of this process that is resident, in MB (2**20 bytes)."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    return pages * resource.getpagesize() / 2**20


def end(process: subprocess.Popen[bytes] | None, patience_s: float) -> None:
    """Wait for a process whose pipe has ended, not long; then it is killed."""
    if process is None:
        return
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
