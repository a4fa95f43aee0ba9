"""Answer latency: when there is time for other work, and priorities of the processes."""

from __future__ import annotations

import gc
import os
import platform
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle

COLLECT_EVERY = 32
"""Judged steps between two collections of young garbage, made when nobody is waiting. To look
through all that is remembered takes longer: that waits for a second of rest."""

YOUNG_OBJECTS = 4000
"""Objects that came and did not go, after which young garbage is collected at once: to look
through them takes half a millisecond. Steps of new runs and seeds leave 250 each behind."""

LOOK_AGAIN_NS = 200_000
"""After so long it is looked whether somebody asks: as long as an answer takes."""

SLICE_NS = 100_000
"""The slice of the process that answers, the shortest there is: about what one answer takes."""

_USUAL = 0
"""Instead of a slice: the one that all processes have."""

_SYSTEM_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""Numbers of ``sched_setattr`` and ``sched_getattr`` by machine, for processes of 64 bits.
Python has no functions for them, nor have most C libraries."""

_ATTRIBUTES = struct.Struct("=IIQiIQQQII")
"""``struct sched_attr``: its size, the policy, flags, the niceness, the priority, the runtime,
the deadline, the period, and two bounds of utilization."""

_SIZE, _POLICY, _RUNTIME = 0, 1, 5
"""Places in :data:`_ATTRIBUTES`."""

_SHARED_FAIRLY = (0, 3)
"""The policies SCHED_OTHER and SCHED_BATCH: for others the runtime means something else."""


class GarbageSchedule:
    """Collections happen between answers, and skip what lives forever."""

    def __init__(self) -> None:
        self._steps = 0
        self._owes_full = False

    def take_over(self) -> None:
        """Collect once, and from now on only when told to."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def count_step(self) -> None:
        """A step was judged, or the update of one."""
        self._steps += 1

    def collect_young(self) -> None:
        """At the end of a turn, if it is worth it."""
        if self._steps >= COLLECT_EVERY or gc.get_count()[0] >= YOUNG_OBJECTS:
            self._steps = 0
            self._owes_full = True
            gc.collect(0)

    def collect_all(self) -> None:
        """While nothing happens, if it is worth it."""
        if self._owes_full:
            self._owes_full = False
            gc.collect()


class Upkeep:
    """Work besides answers, in parts: whoever asks waits for one of them, not for all.

    Each part goes on a little, or does nothing where nothing is due.
    """

    def __init__(
        self, parts: Sequence[Callable[[], None]], is_asked: Callable[[], bool]
    ) -> None:
        self._count = len(parts)
        self._parts = cycle(parts)
        self._is_asked = is_asked

    def go_on(self, looked_at: int) -> None:
        """Do each part once, or as many as there is time for until somebody asks.

        The next time begins with those that were left. ``looked_at`` is when it was last looked
        whether somebody asks, of ``perf_counter_ns``.
        """
        for _ in range(self._count):
            next(self._parts)()
            now = time.perf_counter_ns()
            if now - looked_at > LOOK_AGAIN_NS:
                if self._is_asked():
                    return
                looked_at = now


def never_preempt(pid: int = 0) -> None:
    """Have a process, this one if 0, wake up on a free processor or behind whoever runs there.

    So the process that answers does where slices cannot be chosen (:func:`shorten_slice`). A
    trainer sends its request and goes on computing. A process that is woken takes the processor
    from the one that woke it, if both are on the same: then the whole evaluation lies within
    the trainer's ``send``, 80 to 200 µs instead of some 10. The policy SCHED_BATCH says that
    this one need not; whoever waits for an answer gives its processor away anyway.
    """
    with suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setscheduler(pid, os.SCHED_BATCH, os.sched_param(0))


def put_behind(pid: int) -> None:
    """Have a child that was just started come after this process, which answers.

    At once, since to start keeps a processor busy for as long as hundreds of answers take. What
    is handed to it later wakes it, and one that may preempt takes the processor before the next
    answer. The short slice, which it has inherited, is the usual one again. Its niceness is its
    own to choose once it has started: behind a training on all processors a nice one would
    need minutes for that.
    """
    never_preempt(pid)
    _set_slice(pid, _USUAL)


def shorten_slice(pid: int = 0) -> bool:
    """Whether a process, this one if 0, has the slice of :data:`SLICE_NS` now.

    Among processes that wait for a processor, Linux runs the one whose slice would end first
    (EEVDF), so one with a short slice hardly waits, be the machine as busy as it may. Its share
    of the processors stays the same. Woken, it may take the processor from who woke it: it
    should give that back as soon as it has answered. sched_yield(2) forgoes one slice for the
    others, and that is a short one.

    A process may choose its slice by ``sched_runtime`` of sched_setattr(2) since Linux 6.12
    (kernel documentation, *EEVDF Scheduler*). An older kernel ignores it; other systems, and
    other machines than those in :data:`_SYSTEM_CALLS`, are not asked.
    """
    return _set_slice(pid, SLICE_NS)


def _set_slice(pid: int, slice_ns: int) -> bool:
    """Whether the kernel has set the slice of a process as told."""
    numbers = _SYSTEM_CALLS.get(platform.machine())
    if not sys.platform.startswith("linux") or numbers is None or sys.maxsize < 2**32:
        return False
    set_number, get_number = numbers
    attributes = bytearray(_ATTRIBUTES.size)
    try:
        _system_call(get_number, pid, attributes, len(attributes), 0)
        wanted = [*_ATTRIBUTES.unpack(attributes)]
        if wanted[_POLICY] not in _SHARED_FAIRLY:
            return False
        wanted[_SIZE], wanted[_RUNTIME] = len(attributes), slice_ns
        _ATTRIBUTES.pack_into(attributes, 0, *wanted)
        _system_call(set_number, pid, attributes, 0)
        _system_call(get_number, pid, attributes, len(attributes), 0)
    except (ImportError, AttributeError, OSError):
        return False
    return bool(_ATTRIBUTES.unpack(attributes)[_RUNTIME] == slice_ns)


def _system_call(number: int, pid: int, attributes: bytearray, *others: int) -> None:
    """Call the kernel by a number; raises ``OSError`` when it refuses."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    place = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    words = [ctypes.c_long(number), ctypes.c_long(pid), place, *map(ctypes.c_long, others)]
    if library.syscall(*words) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
