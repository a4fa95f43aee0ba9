"""Spool: undelivered telemetry, bounded, and its account.

For each signal *produced = delivered + spooled + dropped* holds at every moment, because
one lock guards the four numbers and the queue. The training thread never takes it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from enum import Enum

import msgspec

from esper_otel.stream.destination import Signal

MAX_GROUP = 2 << 20
"""Bytes sent in one request; a single batch may be larger."""

OVERDUE_S = 0.1
"""A receiver that has not taken a batch by then is away. A healthy one answers within
milliseconds, and what is on its way for so long is too much to lose with the process."""


class Account(msgspec.Struct, frozen=True):
    """Data points, or spans, of one signal.

    ``spooled`` waits for delivery, in memory or in a file. ``refused`` is the part of
    ``dropped`` that a receiver rejected.
    """

    produced: int = 0
    delivered: int = 0
    spooled: int = 0
    dropped: int = 0
    refused: int = 0


class Batch(msgspec.Struct, eq=False):
    """One serialised request and how many points or spans it holds.

    ``put_s`` is the monotonic time of its coming. ``alone``: it was refused together with
    others, so it is sent by itself. ``settled``: it was delivered, refused or dropped, and
    nobody waits for it. ``segment`` is the file that holds it as well, if one does
    (:class:`~esper_otel.stream.spool_files.Segment`).
    """

    signal: Signal
    body: bytes
    items: int
    number: int
    put_s: float = 0.0
    alone: bool = False
    settled: bool = False
    segment: object | None = None


class BatchGroup(msgspec.Struct, eq=False):
    """Batches on their way in one request.

    Serialised protobuf messages laid end to end are the message of both, so batches need
    no decoding to travel together. ``signal`` is that of all, ``items`` are their points or
    spans, ``size`` their bytes.
    """

    batches: list[Batch]
    signal: Signal
    items: int
    size: int

    def body(self) -> bytes:
        """The request."""
        if len(self.batches) == 1:
            return self.batches[0].body
        return b"".join(batch.body for batch in self.batches)


class _Phase(Enum):
    OPEN = "batches come and go"
    FINISHING = "no more batches come"
    SEALED = "the rest was taken away; results of requests in flight come too late"


class Spool:
    """Bounded queue of batches, one line per signal; the oldest of all gives way."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # What is in flight cannot be dropped, so it should leave room for what is newer.
        self.max_group = min(MAX_GROUP, max_bytes // 4)
        """Bytes of one request, where it has more than one batch."""
        self.away: set[Signal] = set()
        """Signals that nobody takes at the moment: theirs is kept on disk as well."""
        self.size = 0
        """Bytes that wait or are on their way."""
        self._numbered = 0
        self._lines: dict[Signal, deque[Batch]] = {signal: deque() for signal in Signal}
        self._in_flight: dict[Signal, BatchGroup | None] = dict.fromkeys(Signal)
        self._taken: set[Signal] = set()
        """Signals of which what is in flight was taken at once, and not handed on."""
        self._handed_on: set[Signal] = set()
        """Signals of which what is in flight is for who waits in :meth:`next_group`."""
        self._counts = {
            signal: dict.fromkeys(Account.__struct_fields__, 0) for signal in Signal
        }
        self.closed: set[Signal] = set()
        """Signals that have no receiver."""
        self._phase = _Phase.OPEN
        self._lock = threading.RLock()
        # One per signal: waking the other sender for nothing cost as much as a frame.
        self._changed = {signal: threading.Condition(self._lock) for signal in Signal}

    def line(self, signal: Signal) -> deque[Batch]:
        """The batches of ``signal`` that wait, for others to look at only."""
        return self._lines[signal]

    def put(self, signal: Signal, body: bytes, items: int) -> None:
        """Take one batch in; where it does not fit, the oldest ones are dropped.

        Who waits for it is woken by :meth:`wake`, if nobody takes it at once.
        """
        with self._lock:
            if signal in self.closed:
                self._count(signal, produced=items, dropped=items, refused=items)
                return
            if self._phase is _Phase.SEALED:
                self._count(signal, produced=items, dropped=items)
                return
            self._numbered += 1
            batch = Batch(signal, body, items, self._numbered, time.monotonic())
            self._lines[signal].append(batch)
            self.size += len(body)
            counts = self._counts[signal]
            counts["produced"] += items
            counts["spooled"] += items
            while self.size > self._max_bytes and self._drop_oldest():
                pass

    def wake(self, signal: Signal) -> None:
        """Wake who waits for batches of ``signal``, if there are any."""
        if self._lines[signal]:
            with self._lock:
                self._changed[signal].notify_all()

    def take_at_once(self, signal: Signal) -> BatchGroup | None:
        """As :meth:`next_group` where batches wait and nobody is at any of ``signal``, else
        None."""
        if not self._lines[signal]:
            return None
        with self._lock:
            if self._in_flight[signal] is not None or signal in self.away:
                return None
            if self._phase is not _Phase.OPEN or not self._lines[signal]:
                return None
            self._taken.add(signal)
            return self._take(signal)

    def hand_on(self, group: BatchGroup) -> None:
        """Who waits in :meth:`next_group` is to settle ``group``, which is in flight."""
        with self._lock:
            if self._in_flight[group.signal] is group:
                self._taken.discard(group.signal)
                self._handed_on.add(group.signal)
                self._changed[group.signal].notify_all()

    def next_group(self, signal: Signal) -> BatchGroup | None:
        """The oldest batches of ``signal`` for one request, or what was handed on; waits for
        some.

        None when there will be none any more. Every group taken must be settled by one of
        :meth:`deliver`, :meth:`refuse` and :meth:`put_back`.
        """
        line = self._lines[signal]
        with self._lock:
            while self._phase is _Phase.OPEN and signal not in self.closed:
                if signal in self._handed_on or (line and signal not in self._taken):
                    break
                self._changed[signal].wait()
            if self._phase is _Phase.SEALED:
                return None
            if signal in self._handed_on:
                self._handed_on.discard(signal)
                if self._in_flight[signal] is not None:
                    return self._in_flight[signal]
            return self._take(signal) if line and signal not in self._taken else None

    def deliver(self, group: BatchGroup, rejected: int = 0) -> None:
        """``group`` was taken by the receiver but for ``rejected`` of its items."""
        with self._lock:
            if self._settle(group):
                items = group.items
                for batch in group.batches:
                    batch.settled = True
                if self.away and not self._lines[group.signal]:
                    self.away.discard(group.signal)
                counts = self._counts[group.signal]
                counts["spooled"] -= items
                counts["delivered"] += items
                if rejected > 0:
                    rejected = min(rejected, items)
                    self._count(
                        group.signal, delivered=-rejected, dropped=rejected, refused=rejected
                    )

    def refuse(self, group: BatchGroup) -> bool:
        """The receiver will never take ``group``; False when its parts get another try.

        One bad batch should not take its neighbours along, nor a limit on the size of
        requests all of them: several are sent again one by one.
        """
        with self._lock:
            if len(group.batches) > 1:
                for batch in group.batches:
                    batch.alone = True
                self._return(group)
                return False
            if self._settle(group):
                self._drop(group.batches, refused=True)
            return True

    def put_back(self, group: BatchGroup) -> None:
        """``group`` was not taken now; it is first in line again."""
        with self._lock:
            self.away.add(group.signal)
            self._return(group)

    def look_for_overdue(self, now: float) -> None:
        """Take a receiver for away that has let a batch wait, at monotonic time ``now``."""
        if not self.size:
            return
        with self._lock:
            for signal in self._lines.keys() - self.away - self.closed:
                oldest = self._oldest(signal)
                if oldest is not None and now - oldest.put_s >= OVERDUE_S:
                    self.away.add(signal)

    def unkept(self) -> list[Batch]:
        """Batches of the signals that are away which no file holds yet, oldest first."""
        found: list[Batch] = []
        with self._lock:
            for signal in self.away:
                group = self._in_flight[signal]
                if group is not None:
                    found += [each for each in group.batches if each.segment is None]
                for batch in reversed(self._lines[signal]):
                    if batch.segment is not None:
                        break
                    found.append(batch)
        return sorted(found, key=lambda batch: batch.number)

    def close_line(self, signal: Signal) -> None:
        """No receiver for ``signal``: what waits and what still comes is refused."""
        with self._lock:
            self.closed.add(signal)
            group = self._in_flight[signal]
            if group is not None:
                self._return(group)
            self.away.discard(signal)
            line = self._lines[signal]
            self.size -= sum(len(batch.body) for batch in line)
            self._drop(line, refused=True)
            line.clear()
            self._changed[signal].notify_all()

    def end_input(self) -> None:
        """No more batches come: :meth:`next_group` stops waiting for them."""
        with self._lock:
            self._phase = _Phase.FINISHING
            self._wake_all()

    def seal(self) -> list[Batch]:
        """Hand over everything unsent, oldest first; it stays counted as spooled.

        A batch in flight is among it: whether it was taken will not be known in time.
        """
        with self._lock:
            self._phase = _Phase.SEALED
            batches = [batch for line in self._lines.values() for batch in line]
            for group in self._in_flight.values():
                batches += group.batches if group else []
            for signal in Signal:
                self._lines[signal].clear()
                self._in_flight[signal] = None
            self.size = 0
            self._wake_all()
            return sorted(batches, key=lambda batch: batch.number)

    def drop_spooled(self, signal: Signal, items: int) -> None:
        """``items`` that were spooled could not be kept."""
        with self._lock:
            self._count(signal, spooled=-items, dropped=items)

    def drop_unencoded(self, signal: Signal, items: int) -> None:
        """``items`` were due, but no batch could be made of them."""
        with self._lock:
            self._count(signal, produced=items, dropped=items)

    def account(self, signal: Signal) -> Account:
        """The numbers of ``signal`` at this moment."""
        with self._lock:
            return Account(**self._counts[signal])

    def _wake_all(self) -> None:
        for changed in self._changed.values():
            changed.notify_all()

    def _take(self, signal: Signal) -> BatchGroup:
        """The oldest batches of ``signal`` for one request, in flight from now on."""
        line = self._lines[signal]
        first = line.popleft()
        group = BatchGroup([first], signal, first.items, len(first.body))
        # What lies in one file travels together, so that the file goes with its delivery.
        while line and not (line[0].alone or first.alone):
            size = group.size + len(line[0].body)
            if size > self.max_group or line[0].segment is not first.segment:
                break
            group.size = size
            group.items += line[0].items
            group.batches.append(line.popleft())
        self._in_flight[signal] = group
        return group

    def _settle(self, group: BatchGroup) -> bool:
        """End the flight of ``group``; False when the spool was sealed meanwhile."""
        if self._in_flight[group.signal] is not group:
            return False
        self._in_flight[group.signal] = None
        self._taken.discard(group.signal)
        self.size -= group.size
        return True

    def _return(self, group: BatchGroup) -> None:
        if self._settle(group):
            self._lines[group.signal].extendleft(reversed(group.batches))
            self.size += group.size
            while self.size > self._max_bytes and self._drop_oldest():
                pass

    def _oldest(self, signal: Signal) -> Batch | None:
        """The oldest unsent batch of ``signal``, in flight or waiting."""
        group, line = self._in_flight[signal], self._lines[signal]
        if group is not None:
            return group.batches[0]
        return line[0] if line else None

    def _drop_oldest(self) -> bool:
        """Drop the oldest waiting batch; False when all that is left is in flight."""
        waiting = [line for line in self._lines.values() if line]
        if not waiting:
            return False
        batch = min(waiting, key=lambda line: line[0].number).popleft()
        self.size -= len(batch.body)
        self._drop([batch])
        return True

    def _drop(self, batches: Iterable[Batch], refused: bool = False) -> None:
        for batch in batches:
            batch.settled = True
            self._count(
                batch.signal,
                spooled=-batch.items,
                dropped=batch.items,
                refused=batch.items if refused else 0,
            )

    def _count(self, signal: Signal, **changes: int) -> None:
        counts = self._counts[signal]
        for name, by in changes.items():
            counts[name] += by
