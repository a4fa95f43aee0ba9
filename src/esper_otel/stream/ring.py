"""Ring: the buffer for the training thread's step records, numbers only.

One thread writes, one reads, and neither waits for the other: each side owns one
counter, and a record counts only once the writer has moved its counter past it.
Packing 31 doubles takes about 1 µs; a queue of Python objects would keep them alive and
make the garbage collector walk them.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from esper_otel.leyline.frames import NO_CUSTOM
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS

SeedRows = Sequence[tuple[str, list[float]]]
"""The seeds of one frame: (seed id, row in registry order)."""


class Rows(NamedTuple):
    """Records copied out of a ring, oldest first.

    ``times`` (n) are nanoseconds of the Unix epoch, ``tags`` (n) mean what the writer
    meant, ``values`` (n, width) hold NaN where a metric is absent.
    """

    times: npt.NDArray[np.int64]
    tags: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


class Frames(NamedTuple):
    """Whole frames: step rows, and the seed rows that belong to them.

    The tag of a step row is the end of its seeds in ``seeds``, the tag of a seed row its
    index in ``seed_ids``. ``customs`` are (place of the step, its custom values by name), of
    the steps that have any, in order.
    """

    steps: Rows
    seeds: Rows
    seed_ids: Sequence[str]
    customs: Sequence[tuple[int, Mapping[str, float]]] = ()


FEW = 32
"""Frames that are taken as bytes: to call numpy for them costs more than it saves, above all
after a pause, when hardly anything of it is in the processor's caches any more."""

STEP_RECORD = struct.Struct(f"<qq{len(STEP_KEYS)}d")
"""A step in the ring: its time, its tag and its values."""

_TIME = struct.Struct("<q")


class Ring:
    """Fixed number of records of one time, one tag and ``width`` doubles each."""

    __slots__ = (
        "_none",
        "_rows",
        "buffer",
        "capacity",
        "pack_into",
        "read",
        "size",
        "written",
    )

    def __init__(self, capacity: int, width: int) -> None:
        record = struct.Struct(f"<qq{width}d")
        self.capacity = capacity
        self.size = record.size
        self.buffer = bytearray(capacity * record.size)
        self.written = 0
        self.read = 0
        self.pack_into = record.pack_into
        layout = [("time", "<i8"), ("tag", "<i8"), ("values", "<f8", (width,))]
        self._rows = np.frombuffer(self.buffer, np.dtype(layout))
        none = self._rows[:0]
        self._none = Rows(none["time"], none["tag"], none["values"])

    def write(self, index: int, time_unix_nano: int, tag: int, row: Sequence[float]) -> None:
        """Fill the record of the running number ``index``; not visible until published.

        Raises :class:`struct.error` when the row has another width or holds no numbers.
        """
        offset = index % self.capacity * self.size
        self.pack_into(self.buffer, offset, time_unix_nano, tag, *row)

    def raw(self, start: int, end: int) -> bytes:
        """The bytes of the records with running numbers ``start`` to ``end`` - 1."""
        size, buffer = self.size, self.buffer
        first, last = start % self.capacity * size, end % self.capacity * size
        if first < last or start == end:
            return bytes(buffer[first:last])
        return bytes(buffer[first:] + buffer[:last])

    def rows(self, raw: bytes | bytearray) -> Rows:
        """The records that ``raw`` holds."""
        rows = np.frombuffer(raw, self._rows.dtype)
        return Rows(rows["time"], rows["tag"], rows["values"])

    def copy(self, start: int, end: int) -> Rows:
        """The records with running numbers ``start`` to ``end`` - 1."""
        if start == end:
            return self._none
        first, last = start % self.capacity, end % self.capacity
        if first < last:
            rows = self._rows[first:last].copy()
        else:
            rows = np.concatenate((self._rows[first:], self._rows[:last]))
        return Rows(rows["time"], rows["tag"], rows["values"])


class Doorbell:
    """What the thread that takes frames sleeps by: for a time, or until something comes.

    One thread sleeps; any may ring.
    """

    __slots__ = ("_lock", "is_awaited")

    def __init__(self) -> None:
        # A lock and not an event: that one makes a lock and a queue each time it is waited for.
        self._lock = threading.Lock()
        self._lock.acquire()
        self.is_awaited = False
        """Whether nothing happens any more until it is rung."""

    def ring(self) -> None:
        """Wake who sleeps, or have the next sleep end at once; a few microseconds."""
        self.is_awaited = False
        with suppress(RuntimeError):  # it was rung already
            self._lock.release()

    def sleep(self, timeout_s: float) -> None:
        """Until it is rung, or ``timeout_s`` have passed."""
        self._lock.acquire(True, timeout_s)

    def sleep_while(self, is_idle: Callable[[], bool]) -> None:
        """Until it is rung, if ``is_idle`` then, when whoever hands something over rings."""
        self.is_awaited = True
        if is_idle():
            self._lock.acquire()
        self.is_awaited = False


class Notes(Protocol):
    """Steps that are still to be put, by whichever thread takes them up."""

    waiting: Collection[Any]

    def catch_up(self) -> None:
        """Take up those that wait."""


class FrameRing:
    """Ring of step frames, and ring of the seed rows that go with them.

    A frame is written whole or refused whole, and read whole: its seed rows come first,
    its step row publishes it. ``refused_frames`` and ``refused_points`` belong to the
    writing thread.
    """

    def __init__(self, capacity: int) -> None:
        self._steps = Ring(capacity, len(STEP_KEYS))
        self._seeds = Ring(capacity, len(SEED_KEYS))
        self._numbers: dict[str, int] = {}
        self._seed_ids: list[str] = []
        # Objects and not records: few steps have custom values, whose names come and go.
        self._customs: deque[tuple[int, Mapping[str, float]]] = deque()
        self._latest_custom: dict[str, float] = {}
        self.notes: Notes | None = None
        """What is still to be put, where the writer only notes it."""
        self.refused_frames = 0
        self.refused_points = 0

    @property
    def is_empty(self) -> bool:
        """Whether every frame was taken, and none is still to be put."""
        is_noted = self.notes is not None and self.notes.waiting
        return self._steps.read == self._steps.written and not is_noted

    @property
    def accepted(self) -> int:
        """Frames written so far."""
        self.catch_up()
        return self._steps.written

    @property
    def latest_custom(self) -> dict[str, float]:
        """The newest of each custom value."""
        self.catch_up()
        return self._latest_custom

    def catch_up(self) -> None:
        """Have put what is only noted yet."""
        if self.notes is not None:
            self.notes.catch_up()

    def put(
        self,
        time_unix_nano: int,
        row: Sequence[float],
        seeds: SeedRows,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> bool:
        """Write one frame; False when there is no room, which is counted."""
        steps = self._steps
        if steps.written - steps.read >= steps.capacity:
            return self._refuse(row, seeds, custom)
        if seeds and not self._put_seeds(time_unix_nano, seeds):
            return self._refuse(row, seeds, custom)
        written = steps.written
        if custom:
            self._customs.append((written, custom))
            self._latest_custom.update(custom)
        # Ring.write, without a call of it: most of what a frame costs are calls.
        offset = written % steps.capacity * steps.size
        steps.pack_into(steps.buffer, offset, time_unix_nano, self._seeds.written, *row)
        steps.written = written + 1
        return True

    def drain(self, now_ns: int | None = None) -> Frames | None:
        """Every frame written since the last call, None when there is none.

        With ``now_ns``, the Unix time, the frames of the millisecond that is under way stay
        for the next call.
        """
        steps, seeds = self._steps, self._seeds
        end = steps.written
        if end == steps.read:
            return None
        step_rows = steps.copy(steps.read, end)
        if now_ns is not None:
            end -= _under_way(step_rows.times, now_ns)
            if end == steps.read:
                return None
            taken = end - steps.read
            times, tags, values = step_rows
            step_rows = Rows(times[:taken], tags[:taken], values[:taken])
        first_seed = seeds.read
        last_seed = int(step_rows.tags[-1])
        seed_rows = seeds.copy(first_seed, last_seed)
        step_rows = step_rows._replace(tags=step_rows.tags - first_seed)
        customs = self._take_customs(steps.read, end) if self._customs else ()
        seeds.read = last_seed
        steps.read = end
        return Frames(step_rows, seed_rows, self._seed_ids, customs)

    def drain_few(self, now_ns: int | None = None) -> bytes | None:
        """As :meth:`drain` where a few frames wait that are rows alone: their
        :data:`STEP_RECORD`.

        None where it is for :meth:`drain` to take what waits: seeds and custom values as well.
        """
        steps, seeds = self._steps, self._seeds
        start, end = steps.read, steps.written
        # Custom values are put before their step: those of what was written are there by now.
        if end - start > FEW or seeds.written != seeds.read or self._customs:
            return None
        raw = steps.raw(start, end)
        if now_ns is not None and raw:
            began = now_ns - now_ns % 1_000_000
            (newest,) = _TIME.unpack_from(raw, len(raw) - steps.size)
            if began <= newest < began + 1_000_000:
                end = start + sum(each[0] < began for each in STEP_RECORD.iter_unpack(raw))
                raw = raw[: (end - start) * steps.size]
        steps.read = end
        return raw

    def frames_of(self, raw: bytes | bytearray) -> Frames:
        """What ``raw``, several :meth:`drain_few` laid end to end, holds."""
        steps = self._steps.rows(raw)
        return Frames(steps._replace(tags=steps.tags * 0), self._seeds.copy(0, 0), ())

    def latest(self) -> Frames | None:
        """The newest frame alone, whether taken or not; None before the first."""
        self.catch_up()
        steps = self._steps
        end = steps.written
        if end == 0:
            return None
        rows = steps.copy(max(end - 2, 0), end)
        first_seed = int(rows.tags[0]) if end > 1 else 0
        seed_rows = self._seeds.copy(first_seed, int(rows.tags[-1]))
        newest = Rows(rows.times[-1:], rows.tags[-1:] - first_seed, rows.values[-1:])
        return Frames(newest, seed_rows, self._seed_ids)

    def _put_seeds(self, time_unix_nano: int, seeds: SeedRows) -> bool:
        """Write the seed rows of a frame, all or none of them."""
        ring = self._seeds
        if ring.written + len(seeds) - ring.read > ring.capacity:
            return False
        for index, (seed_id, values) in enumerate(seeds, ring.written):
            number = self._numbers.get(seed_id)
            if number is None:
                number = self._numbers[seed_id] = len(self._seed_ids)
                self._seed_ids.append(seed_id)
            ring.write(index, time_unix_nano, number, values)
        ring.written += len(seeds)
        return True

    def _take_customs(self, start: int, end: int) -> list[tuple[int, Mapping[str, float]]]:
        """Those of the steps before ``end``, of which ``start`` is the first to be taken."""
        waiting, taken = self._customs, []
        while waiting and waiting[0][0] < end:
            number, values = waiting.popleft()
            taken.append((number - start, values))
        return taken

    def _refuse(
        self, row: Sequence[float], seeds: SeedRows, custom: Mapping[str, float]
    ) -> bool:
        self.refused_frames += 1
        self.refused_points += sum(map(isfinite, row)) + len(custom)
        self.refused_points += sum(sum(map(isfinite, values)) for _, values in seeds)
        return False


def _under_way(times: npt.NDArray[np.int64], now_ns: int) -> int:
    """How many of ``times``, which rise, lie in the millisecond of ``now_ns``.

    None when the last is beyond it: then somebody has set the clock back.
    """
    began = now_ns - now_ns % 1_000_000
    if int(times[-1]) >= began + 1_000_000:
        return 0
    return len(times) - int(np.searchsorted(times, began))


def part(frames: Frames, start: int, end: int) -> Frames:
    """The frames from ``start`` to ``end`` - 1, with their seeds."""
    if start == 0 and end >= len(frames.steps.times):
        return frames
    steps = _between(frames.steps, start, end)
    first = int(frames.steps.tags[start - 1]) if start else 0
    seeds = _between(frames.seeds, first, int(steps.tags[-1]))
    customs = [(at - start, values) for at, values in frames.customs if start <= at < end]
    return Frames(steps._replace(tags=steps.tags - first), seeds, frames.seed_ids, customs)


def chosen(rows: Rows, indices: Sequence[int]) -> Rows:
    """The rows at ``indices``."""
    where = np.array(indices)
    return Rows(rows.times[where], rows.tags[where], rows.values[where])


def _between(rows: Rows, start: int, end: int) -> Rows:
    return Rows(rows.times[start:end], rows.tags[start:end], rows.values[start:end])


def points(frames: Frames) -> int:
    """How many data points the frames make: one per finite value."""
    own = sum(len(values) for _, values in frames.customs)
    rows = (frames.steps, frames.seeds)
    return own + sum(int(np.isfinite(each.values).sum()) for each in rows)
