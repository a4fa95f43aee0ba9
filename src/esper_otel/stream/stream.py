"""Stream: the entrance for a recorder's step records.

The training thread writes numbers; two kinds of daemon thread do the rest: ``esper-stream``
turns frames into OTLP, ``esper-send-metrics``, ``-traces`` and ``-logs`` deliver it.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from esper_otel.leyline.events import Attribute, Event
from esper_otel.leyline.faults import alone, end_each
from esper_otel.leyline.frames import NO_CUSTOM, StepFrame, StepTimeline
from esper_otel.run_config import RunConfig
from esper_otel.settings import EsperSettings
from esper_otel.stream.destination import Signal
from esper_otel.stream.recording import Recording, recording_of, stem
from esper_otel.stream.spool import Account, Spool

if TYPE_CHECKING:
    from esper_otel.stream.delivery import Delivery
    from esper_otel.stream.drain import Drain, Lane
    from esper_otel.stream.ring import Doorbell, Notes, SeedRows
    from esper_otel.stream.totals import RunTotals

log = logging.getLogger("esper_otel")

MAX_TIMELINES = 4096
"""Steps whose spans may wait to be made."""

MAX_EVENTS = 4096
"""Events that may wait to become log records."""


class StreamReport(msgspec.Struct, frozen=True):
    """The account of a run's telemetry, at one moment.

    ``frames`` counts accepted step records, ``refused_frames`` those that found the ring
    full (their points count as dropped). ``metrics`` counts data points, ``traces`` spans of
    our own provider, ``logs`` events, except those of the user's own logger provider.
    ``files`` contain unsent telemetry, ``recordings`` all of it, if recording is on.
    """

    frames: int = 0
    refused_frames: int = 0
    metrics: Account = Account()
    traces: Account = Account()
    logs: Account = Account()
    files: tuple[Path, ...] = ()
    recordings: tuple[Path, ...] = ()


class _Counts(NamedTuple):
    """What a stream has taken, and what had no room in it."""

    frames: int = 0
    refused_frames: int = 0
    points: int = 0
    spans: int = 0
    events: int = 0

    def plus(self, other: _Counts) -> _Counts:
        """Both together."""
        return _Counts(*(a + b for a, b in zip(self, other, strict=True)))


class Stream:
    """Frames and timelines of one run on their way to OTLP.

    ``environ`` holds the ``OTEL_*`` variables that say where telemetry goes (default: the
    process's). ``beside``, which is started, shares its threads with this one: then what is
    delivered, or left in files, is that one's to tell and to wait for. In a forked child every
    method does nothing.
    """

    def __init__(
        self,
        settings: EsperSettings,
        *,
        run_id: str,
        instance_id: str,
        environ: Mapping[str, str] | None = None,
        beside: Stream | None = None,
    ) -> None:
        from esper_otel.stream.ring import Doorbell, FrameRing

        self._settings = settings
        self._run_id = run_id
        self._instance_id = instance_id
        self._environ = environ
        self._ring = FrameRing(settings.ring_steps)
        self._bell: Doorbell = beside._bell if beside else Doorbell()
        self._timelines: deque[StepTimeline] = deque()
        self._refused_spans = 0
        self._events: deque[Event] = deque()
        self._refused_events = 0
        self._beside = beside
        self._others: list[Stream] = []
        """Those beside this one that are open; of the others only counts are kept."""
        self._lost_by_others = _Counts()
        self._spool: Spool = beside._spool if beside else Spool(int(settings.spool_mb * 1e6))
        self._resource: Any = None
        self._lane: Lane | None = None
        self._recordings: list[Recording] = [] if beside is None else beside._recordings
        self._drain: Drain | None = None
        self._delivery: Delivery | None = None
        self._unregister: Callable[[], None] | None = None
        self._files: tuple[Path, ...] = ()
        self._config = RunConfig()
        self._on = True
        self._faulted = False
        self._closed = False
        self._pid = os.getpid()
        _streams.add(self)

    def start(self) -> None:
        """Load what sending needs and start the threads. Never raises.

        Loading (SDK, protobuf, requests or grpc) happens on the caller's thread and takes
        a few tenths of a second once. On a thread of ours it would meet the fork of the
        first DataLoader worker half done, and that worker would find the import locks
        held for ever.
        """
        if self._lane is not None or self._closed or os.getpid() != self._pid:
            return
        try:
            if self._beside is None:
                self._start()
            else:
                self._start_beside(self._beside)
        except Exception as error:
            self._on = False
            log.warning("telemetry is off, it could not be started: %r", error)
            log.debug("the fault", exc_info=True)

    def frame(
        self,
        time_unix_nano: int,
        row: list[float],
        seeds: SeedRows = (),
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Hand over one step: its row and the rows of its seeds, in registry order.

        ``custom`` values are by name. Takes a few microseconds, waits for nothing and never
        raises. NaN is absent.
        """
        if self._on:
            try:
                self._ring.put(time_unix_nano, row, seeds, custom)
                if self._bell.is_awaited:
                    self._bell.ring()
            except Exception as error:
                self._fault(error)

    def follow(self, notes: Notes) -> Doorbell | None:
        """Have our thread take up ``notes``; returns what wakes it, None if there is none."""
        if self._on and self._lane is not None:
            self._ring.notes = notes
            return self._bell
        return None

    def configure(self, values: Mapping[str, Attribute], *, explicit: bool = False) -> None:
        """Take in hyper-parameters (:meth:`RunConfig.add`), to be told of. Never raises."""
        self._config.add(values, explicit=explicit)
        if self._bell.is_awaited:
            self._bell.ring()

    def timeline(self, timeline: StepTimeline) -> None:
        """Hand over the times of one step, to be told as spans. Never raises."""
        if self._on and len(self._timelines) < MAX_TIMELINES:
            self._timelines.append(timeline)
            if self._bell.is_awaited:
                self._bell.ring()
        elif self._on:
            self._refused_spans += timeline.spans

    def event(self, event: Event) -> None:
        """Hand over an event whose mark is a Unix time, to be a log record. Never raises."""
        if self._on and len(self._events) < MAX_EVENTS:
            self._events.append(event)
            if self._bell.is_awaited:
                self._bell.ring()
        elif self._on:
            self._refused_events += 1

    def end(self, frame: StepFrame) -> None:
        """Hand over how the run ended, to be sent behind its frames. Never raises."""
        if self._on and self._lane is not None:
            self._lane.ends.append(frame)
            self._bell.ring()

    def snapshot(self) -> StreamReport:
        """What became of everything handed over so far."""
        counts = self._counts.plus(self._lost_by_others)
        for other in self._others:
            counts = counts.plus(other._counts)
        return StreamReport(
            frames=counts.frames,
            refused_frames=counts.refused_frames,
            metrics=_with_lost(self._spool.account(Signal.METRICS), counts.points),
            traces=_with_lost(self._spool.account(Signal.TRACES), counts.spans),
            logs=_with_lost(self._spool.account(Signal.LOGS), counts.events),
            files=self._files,
            recordings=tuple(path for each in self._recordings for path in each.paths),
        )

    @property
    def totals(self) -> RunTotals | None:
        """What the run was like so far; None where nothing is recorded."""
        lane = self._lane
        if lane is not None and os.getpid() == self._pid:  # else its lock may be held for ever
            lane.sum_up()
        return None if lane is None else lane.totals

    @property
    def _counts(self) -> _Counts:
        ring, spans, events = self._ring, self._refused_spans, self._refused_events
        return _Counts(ring.accepted, ring.refused_frames, ring.refused_points, spans, events)

    def close(self, timeout_s: float | None = None) -> StreamReport:
        """Deliver what can be delivered in time, leave the rest in files, and stop.

        ``timeout_s`` (default: the setting ``flush_timeout_s``) is the longest this takes
        whatever the receiver does, but for writing the files. Closing twice is closing
        once.
        """
        if os.getpid() != self._pid:
            return StreamReport()
        if self._closed:
            return self.snapshot()
        self._closed = True
        self._on = False
        if self._beside is not None:
            self._leave_beside(self._beside)
            return StreamReport(frames=self._ring.accepted)
        budget_s = self._settings.flush_timeout_s if timeout_s is None else timeout_s
        end_each([partial(self._finish, time.monotonic() + budget_s, budget_s)])
        return self.snapshot()

    def _finish(self, end: float, budget_s: float) -> None:
        """What is left to do until ``end``, of :func:`time.monotonic`."""
        delivery = self._delivery
        # The last part of the time is for writing what could not be sent.
        deadline = end - min(0.2 * budget_s, 0.25)
        if delivery is not None:
            delivery.stop_redelivery()
        end_each([self._unregister] if self._unregister is not None else [])
        end_each([partial(self._stop_drain, deadline)])
        self._spool.end_input()
        if delivery is not None:
            delivery.finish_by(deadline)
        end_each([self._abandon_lanes])
        batches = self._spool.seal()
        if delivery is not None:
            self._files = delivery.leave_in_files(batches, end)

    def _stop_drain(self, deadline: float) -> None:
        if self._drain is not None and not self._drain.stop(deadline - time.monotonic()):
            log.warning("telemetry of the last steps could not be written in time")

    def _start(self) -> None:
        from esper_otel.stream.environment import usable

        with usable():
            from esper_otel.stream.delivery import Delivery
            from esper_otel.stream.drain import Drain
            from esper_otel.stream.providers import trainer_resource

            settings = self._settings
            self._resource = trainer_resource(
                self._run_id,
                self._instance_id,
                settings.rank,
                settings.world_size,
                settings.local_rank,
                settings.labels,
            )
            self._delivery = Delivery(
                settings,
                self._spool,
                stem=stem(self._run_id, settings.rank),
                pid=self._pid,
                environ=self._environ,
            )
            self._drain = Drain(
                self._new_lane(self._resource),
                spool=self._spool,
                keeper=self._delivery.keeper,
                sent=self._delivery.sent,
                senders=self._delivery.senders,
                interval_s=settings.stream_interval_ms / 1e3,
                bell=self._bell,
            )
            alone("sending while the run goes on", self._drain.start)
            self._delivery.start()
            alone("gauges of OpenTelemetry's metrics API", self._register)

    def _start_beside(self, other: Stream) -> None:
        from esper_otel.stream.providers import resource_of_another

        if other._drain is None or other._resource is None or other._closed:
            self._on = False
            return
        resource = resource_of_another(other._resource, self._run_id, self._instance_id)
        other._others.append(self)
        other._drain.lanes.append(self._new_lane(resource))
        self._register()

    def _leave_beside(self, other: Stream) -> None:
        """Have the thread of ``other`` take what is there; it is not waited for."""
        if self._unregister is not None:
            self._unregister()
        if self in other._others:
            other._others.remove(self)
            other._lost_by_others = other._lost_by_others.plus(self._counts)
        if self._lane is not None:
            self._lane.over = True
            self._bell.ring()

    def _new_lane(self, resource: Any) -> Lane:
        from esper_otel.stream.drain import Lane
        from esper_otel.stream.logs import TrainerIdentity
        from esper_otel.stream.providers import NoSpans, Tracers, serialised_resource

        settings = self._settings
        recording = alone(
            "recording to files",
            lambda: recording_of(settings, self._run_id, self._config.values),
        )
        if recording is not None:
            self._recordings.append(recording)
        self._lane = Lane(
            ring=self._ring,
            timelines=self._timelines,
            events=self._events,
            resource=serialised_resource(resource),
            trainer=TrainerIdentity(self._run_id, settings.rank, self._instance_id),
            tracers=alone("spans", lambda: Tracers(resource)) or NoSpans(),
            recording=recording,
            config=None if settings.rank else self._config,
        )
        return self._lane

    def _register(self) -> None:
        from esper_otel.stream.gauges import register, unregister

        register(self._ring)
        self._unregister = lambda: unregister(self._ring)

    def _abandon_lanes(self) -> None:
        """Count what nobody will turn into OTLP any more."""
        from esper_otel.stream.drain import drop_all

        if self._drain is None:
            drop_all(self._ring, self._timelines, self._events, self._spool)
            return
        for lane in self._drain.lanes:
            drop_all(lane.ring, lane.timelines, lane.events, self._spool, lane.tracers.waiting)

    def _fault(self, error: Exception) -> None:
        """A frame that is none: counted and said once; its points are not known."""
        self._ring.refused_frames += 1
        if not self._faulted:
            self._faulted = True
            log.warning("a step could not be recorded: %r", error)

    def _silence(self) -> None:
        """In a forked child: the run belongs to the parent."""
        self._on = False
        if self._unregister is not None:
            self._unregister()


def _with_lost(account: Account, lost: int) -> Account:
    """``account`` and what never came as far as the spool."""
    return msgspec.structs.replace(
        account, produced=account.produced + lost, dropped=account.dropped + lost
    )


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def _silence_child() -> None:
    for stream in list(_streams):
        stream._silence()


os.register_at_fork(after_in_child=_silence_child)
