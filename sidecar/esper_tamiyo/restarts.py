"""When a process that died is started again: soon at first, then ever later.

And how a child is ended that was told to end and may not have heard.
"""

from __future__ import annotations

import subprocess
import time

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
STABLE_AFTER_S = 10.0
"""A process that lived this long has the first wait again when it dies."""


class Restarts:
    """Told of every start and end of one process; all times are of the monotonic clock."""

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
        wait_s = self._wait_s
        self._due_at = now + wait_s
        self._wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        return wait_s

    def due_in(self) -> float | None:
        """Seconds until the process is to be started again, None when it runs."""
        return None if self._due_at is None else max(0.0, self._due_at - time.monotonic())


def end(process: subprocess.Popen[bytes] | None, patience_s: float) -> None:
    """Wait for a process whose pipe has ended, not long; then it is killed."""
    if process is None:
        return
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
