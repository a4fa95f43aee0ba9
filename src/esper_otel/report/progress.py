"""Progress of long work, shown on a terminal only."""

from __future__ import annotations

import sys
import time

from esper_otel.leyline.terminal import is_terminal, tell_over

EVERY_S = 0.2


class Progress:
    """One line on standard error that is written over, and gone at the end."""

    def __init__(self, what: str, whole: int) -> None:
        """``whole`` is the size of all the work, in bytes."""
        self._what = what
        self._whole = max(whole, 1)
        self._shown = is_terminal(sys.stderr)
        self._next = time.monotonic() + EVERY_S
        self._written = False

    def reached(self, done: int) -> None:
        """So many bytes are done."""
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_S
        share = min(done / self._whole, 1.0)
        text = f"{self._what}: {share:.0%} of {self._whole / 1e6:,.0f} MB"
        tell_over(text)
        self._written = True

    def end(self) -> None:
        """Take the line away."""
        if self._written:
            tell_over("")
            self._written = False
