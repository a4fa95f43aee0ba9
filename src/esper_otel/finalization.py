"""Finalization: keeps our threads out of torch when the interpreter ends.

Until 3.14 CPython ends a thread that wants the interpreter back after finalization has
begun by unwinding its stack (``PyThread_exit_thread``). Where that stack has torch's C++ on
it, which let go of the interpreter, the process dies of SIGABRT ("terminate called without
an active exception"): a training that went well would end with status 134. So a daemon
thread calls torch within :func:`no_shutdown_inside`, and the end of the process waits until
nobody is in there.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import Condition

WAIT_S = 1.0
"""Longest that the end of the process is put off; whoever hangs longer takes the risk."""


class FinalizingError(RuntimeError):
    """The interpreter is about to end: it is too late to call torch from a thread."""


class ShutdownGuard:
    """Counts who is inside; nobody gets in once it is closed."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._inside = 0
        self._closed = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be inside; raises :class:`FinalizingError` once it is closed."""
        with self._changed:
            if self._closed:
                raise FinalizingError("the interpreter is about to end")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self, timeout_s: float = WAIT_S) -> bool:
        """Let nobody in any more; returns whether all have come out in time."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: self._inside == 0, timeout_s)


_shield = ShutdownGuard()


def no_shutdown_inside() -> AbstractContextManager[None]:
    """Within it the interpreter does not end, for :data:`WAIT_S` at most.

    Entering it raises :class:`FinalizingError` when it is about to.
    """
    return _shield.held()


def leak(thing: object) -> None:
    """Let ``thing`` be there until the process is gone: nothing ever frees it.

    A list of this module would be emptied while the interpreter ends, and ``thing`` with it.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _anew() -> None:
    """In a forked child there are no threads but its own."""
    global _shield
    _shield = ShutdownGuard()


# Made before any run is: what runs do at exit comes first, and then nobody is let in.
atexit.register(lambda: _shield.close())
os.register_at_fork(after_in_child=_anew)
