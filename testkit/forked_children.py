"""Children of a sidecar that was forked are forks of it, and have their modules already.

Importing this, in a server of :mod:`testkit.fork_server`, is what makes them so.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from esper_tamiyo import child_process
from testkit.fork_server import end_by

POLL_S = 0.005


class ForkedChild:
    """A child as ``ChildProcess`` starts it: enough of a ``subprocess.Popen``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        pass_fds: Sequence[int],
        env: Mapping[str, str] | None,
    ) -> None:
        self.args = command
        self.returncode: int | None = None
        assert list(command[1:3]) == ["-P", "-m"], command
        self.pid = os.fork()
        if self.pid == 0:
            _run(command[3], command[4:], pass_fds, env)

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(POLL_S)
        return status

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _run(
    module: str, arguments: Sequence[str], kept: Sequence[int], env: Mapping[str, str] | None
) -> NoReturn:
    """Be a new process that runs ``module``: nothing that its parent has set up is left."""
    gc.freeze()  # no object of the parent is to close a descriptor that is ours by then
    gc.enable()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if fd > 2 and fd not in kept:
            with suppress(OSError):
                os.close(fd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    sys.argv = [module, *arguments]
    end_by(importlib.import_module(module).main)


child_process.subprocess = SimpleNamespace(  # type: ignore[assignment,attr-defined]
    Popen=ForkedChild, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
)
