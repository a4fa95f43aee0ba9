"""Drain: the thread that turns step records and timelines into OTLP, and sums them up.

It does everything the training thread must not: encoding, span making, file writing. It
never waits for the network, so a receiver that stalls cannot hold it back: what can be sent
without waiting it sends, and the rest is for the threads of
:class:`~esper_otel.stream.sender.Sender`. What a run was like
so far (:class:`~esper_otel.stream.totals.RunTotals`) is added up here as well, or by whoever
asks for it, many steps at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ParamSpec

from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepFrame, StepTimeline
from esper_otel.run_config import RunConfig
from esper_otel.stream.console import printer
from esper_otel.stream.destination import Signal
from esper_otel.stream.encoding import Encoded, FrameEncoder, encode_end
from esper_otel.stream.logs import TrainerIdentity, emit_events, encode_events
from esper_otel.stream.providers import Tracers, users_logger
from esper_otel.stream.recording import Recording
from esper_otel.stream.ring import Doorbell, FrameRing, Frames, Rows, points
from esper_otel.stream.sender import Sender
from esper_otel.stream.spans import emit_spans
from esper_otel.stream.spool import Spool
from esper_otel.stream.spool_files import Keeper
from esper_otel.stream.totals import RunTotals

log = logging.getLogger("esper_otel")
P = ParamSpec("P")

SPAN_INTERVAL_S = 1.0
"""Frames are decided about, spans are looked at: a second later is soon enough, and one
request with the spans of several steps costs little more than one with a single step's. They
are encoded before that, as a timeline that waits is dozens of containers for Python's garbage
collector."""

MOST_TIMELINES = 256
"""Timelines that are made spans before frames are looked at again."""

_MOST_UNSUMMED = 1 << 20
"""Bytes of steps that may wait to be summed."""

PATIENT_TICKS = 3
"""Times in a row that nothing has come before the thread sleeps until something does."""

HASTE = 5
"""What then comes is taken this many times sooner than at an interval's end."""


class Lane:
    """What one run hands over, and what makes OTLP of it."""

    def __init__(
        self,
        *,
        ring: FrameRing,
        timelines: deque[StepTimeline],
        events: deque[Event],
        resource: bytes,
        trainer: TrainerIdentity,
        tracers: Tracers,
        recording: Recording | None,
        config: RunConfig | None = None,
    ) -> None:
        self.ring = ring
        self.timelines = timelines
        self.events = events
        self.ends: deque[StepFrame] = deque()
        """How the run ended; several where steps followed after all."""
        self.resource = resource
        self.trainer = trainer
        self.encoder = FrameEncoder(resource)
        self.tracers = tracers
        self.recording = recording
        self.show = printer(trainer.rank)
        """What prints frames for people, where that is asked for."""
        self.config = config
        """What the stream tells of the run's hyper-parameters; None: nothing."""
        self.totals = RunTotals()
        if recording is not None and recording.card is not None:
            recording.card.totals = self.totals
        self.begun = False  # steps have come
        self._unsummed = bytearray()
        self._summing = threading.RLock()
        self.over = False
        """Whether nothing more is handed over."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing was handed over that has not been taken."""
        told = not (self.has_config and self.begun)
        waits = self.timelines or self.events or self.ends or self.over
        return self.ring.is_empty and told and not waits

    @property
    def has_config(self) -> bool:
        """Whether there are hyper-parameters to be told of, behind the first steps."""
        return self.config is not None and self.config.is_new

    def sum_later(self, records: bytes) -> None:
        """Have ``records``, of :meth:`~esper_otel.stream.ring.FrameRing.drain_few`, summed."""
        with self._summing:
            self._unsummed += records
        if len(self._unsummed) > _MOST_UNSUMMED:
            self.sum_up()

    def sum_up(self, newer: Rows | None = None) -> None:
        """Take into the totals what has waited for it, and ``newer`` steps. On any thread."""
        with self._summing:
            records, self._unsummed = self._unsummed, bytearray()
            older = self.ring.frames_of(records).steps if records else None
            for rows in filter(None, (older, newer)):
                self.totals.add(rows.times, rows.values)


def drop_all(
    ring: FrameRing,
    timelines: deque[StepTimeline],
    events: deque[Event],
    spool: Spool,
    made: int = 0,
) -> None:
    """Count as dropped what a run has handed over and nobody will turn into OTLP.

    ``made`` are spans that are made and were not handed on.
    """
    ring.catch_up()
    frames = ring.drain()
    if frames is not None:
        spool.drop_unencoded(Signal.METRICS, points(frames))
    spans = made + sum(timeline.spans for timeline in timelines)
    if spans:
        spool.drop_unencoded(Signal.TRACES, spans)
    if events:
        spool.drop_unencoded(Signal.LOGS, len(events))


class Drain:
    """Empties the rings of ``lanes`` every ``interval_s`` into the spool, and into recordings.

    Only signals in ``sent`` go to the spool and are accounted for; the others are made
    when there is a recording to hold them. While nothing comes it sleeps until somebody rings
    ``bell``, as whoever hands something over does when it is awaited.

    While a receiver is away rings are emptied twice as often: with ``keeper`` writing at once
    what comes of it, a process that is killed has lost the steps of half an interval, and of
    the time that encoding and writing took.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        spool: Spool,
        keeper: Keeper,
        sent: frozenset[Signal],
        interval_s: float,
        bell: Doorbell,
        senders: Sequence[Sender] = (),
    ) -> None:
        self.lanes = [lane]
        """Those that are not over, or not emptied yet; whoever begins another appends it."""
        self._spool = spool
        self._keeper = keeper
        self._sent = sent
        self._senders = senders
        self._interval_s = interval_s
        self._faults: set[str] = set()
        self._bell = bell
        self._stopping = False
        self._spans_due = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="esper-stream", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Drain once more and end; False when that did not happen in time."""
        self._stopping = True
        self._bell.ring()
        if self._thread.ident is None:  # the system gave no thread: here, at the end
            self._drain()
            return True
        self._thread.join(max(timeout_s, 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        bell, interval_s = self._bell, self._interval_s
        idle, patience = 0, PATIENT_TICKS
        while not self._stopping:
            bell.sleep(interval_s / 2 if self._spool.away else interval_s)
            if self._spool.size or not self._is_idle():
                # Twice in a row: steps are many.
                patience = patience if idle else PATIENT_TICKS
                idle = 0
                self._drain(rest=not patience)
                continue
            idle += 1
            if idle <= patience:
                self._drain(rest=idle == patience)
                continue
            bell.sleep_while(self._is_idle)
            if not self._stopping:
                # Steps are few: what has come waits for no others.
                bell.sleep(interval_s / HASTE)
                self._drain(rest=True)
                patience = 0
        self._drain()
        for sender in self._senders:
            sender.look_at_answer()

    def _is_idle(self) -> bool:
        """Whether there is nothing to do, and the end has not come."""
        waits = self._stopping or self._spool.size
        return not waits and all(lane.is_idle for lane in self.lanes)

    def _drain(self, rest: bool = False) -> None:
        """Take what there is; ``rest``: also what waits for more of its kind."""
        for sender in self._senders:
            if sender.awaited is not None:  # after a pause, each call comes from main memory
                sender.look_at_answer()
        now, spool = time.monotonic(), self._spool
        if spool.size:
            spool.look_for_overdue(now)
        stopping = self._stopping
        rest = stopping or rest
        due = rest or now >= self._spans_due
        if due:
            self._spans_due = now + SPAN_INTERVAL_S
        for lane in list(self.lanes):
            over = stopping or lane.over  # looked at before it is emptied for the last time
            self._do("frames", self._drain_frames, lane, over)
            # Sums are there for who looks at the card, or stops looking as nothing comes.
            if over or rest or (due and lane.recording is not None):
                self._do("sums of frames", lane.sum_up)
            if over or due or lane.ends or lane.events or lane.timelines or lane.has_config:
                self._drain_rest(lane, due, over)
        for sender in self._senders:
            if sender.line:
                sender.send_at_once()
        if spool.away:
            self._keeper.look()

    def _drain_rest(self, lane: Lane, due: bool, over: bool) -> None:
        """Take what is no frame; ``due``: also what waits for more of its kind."""
        if lane.ends:
            self._do("ends", self._drain_ends, lane, over)
        if lane.events or lane.has_config:
            self._do("events", self._drain_events, lane)
        if lane.timelines:
            self._do("timelines", self._drain_timelines, lane, over)
        if due or over:
            self._do("spans", self._put_spans, lane)
        if over:
            if lane.recording is not None:
                lane.recording.close()
            lane.totals.complete = True
            self.lanes.remove(lane)

    def _do(
        self, what: str, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        try:
            work(*args, **kwargs)
        except Exception as error:  # one fault must not end all that follows
            self._fault(what, error)

    def _drain_frames(self, lane: Lane, over: bool) -> None:
        # Prometheus keeps milliseconds, and refuses a whole request for a sample whose
        # millisecond has come in another one. So a millisecond is sent in one piece: that of
        # now, which is looked at first, stays, as steps end while others are taken up.
        now_ns = None if over else time.time_ns()
        ring, encoder = lane.ring, lane.encoder
        if ring.notes is not None:
            ring.notes.catch_up()
        few = ring.drain_few(now_ns)
        if few:
            if lane.show is not None:
                self._show(lane, ring.frames_of(few))
            self._put_frames(
                lane, partial(encoder.encode_few, few), lambda: points(ring.frames_of(few))
            )
            lane.sum_later(few)
        elif few is None and (frames := ring.drain(now_ns)) is not None:
            self._do("sums of frames", lane.sum_up, frames.steps)
            self._show(lane, frames)
            self._put_frames(lane, partial(encoder.encode, frames), lambda: points(frames))

    def _show(self, lane: Lane, frames: Frames) -> None:
        if lane.show is not None:
            try:
                lane.show(frames)
            except Exception as error:  # a terminal that is gone
                lane.show = None
                log.warning("steps are no longer printed: %r", error)

    def _put_frames(
        self, lane: Lane, encode: Callable[[], Iterable[Encoded]], count: Callable[[], int]
    ) -> None:
        """Put all requests that ``encode`` makes, or none; ``count`` gives their points."""
        lane.begun = True
        if not self._is_wanted(lane, Signal.METRICS):
            return
        try:
            requests = list(encode())
        except Exception as error:
            self._fault("frames", error)
            self._spool.drop_unencoded(Signal.METRICS, count())
            return
        for request in requests:
            self._put(lane, Signal.METRICS, request.body, request.points)

    def _drain_ends(self, lane: Lane, over: bool) -> None:
        # Behind its frames, of which those of the millisecond under way may be left.
        while lane.ends and (over or lane.ring.is_empty):
            end = lane.ends.popleft()
            if lane.recording is not None and lane.recording.card is not None:
                lane.recording.card.ended = str(end.ended or "")
            if self._is_wanted(lane, Signal.METRICS):
                body = encode_end(end, lane.resource)
                self._put(lane, Signal.METRICS, body, 1 + len(end.values))

    def _drain_events(self, lane: Lane) -> None:
        config = lane.config
        if config is not None and config.is_new and lane.begun:
            told = config.take_event(time.time_ns())
            if config.is_explicit:
                lane.events.append(told)
            elif lane.recording is not None:
                body = encode_events([told], lane.resource, lane.trainer)
                lane.recording.append(Signal.LOGS, body)
        if not lane.events:
            return
        events = [lane.events.popleft() for _ in range(len(lane.events))]
        logger = users_logger()
        if logger is not None:
            try:
                emit_events(events, logger, lane.trainer)
            except Exception as error:
                self._fault("events", error)
        sent = Signal.LOGS in self._sent and logger is None
        if lane.recording is None and not (sent and self._is_wanted(lane, Signal.LOGS)):
            return
        try:
            body = encode_events(events, lane.resource, lane.trainer)
        except Exception as error:
            self._fault("events", error)
            if sent:
                self._spool.drop_unencoded(Signal.LOGS, len(events))
            return
        if lane.recording is not None:
            lane.recording.append(Signal.LOGS, body)
        if sent:
            self._spool.put(Signal.LOGS, body, len(events))

    def _drain_timelines(self, lane: Lane, over: bool) -> None:
        # No more than there are: of a fast loop others come all the time, and its ring fills.
        count = len(lane.timelines)
        for _ in range(count if over else min(count, MOST_TIMELINES)):
            timeline = lane.timelines.popleft()
            lane.totals.count_decision(timeline)
            if lane.tracers.are_users or self._is_wanted(lane, Signal.TRACES):
                emit_spans(timeline, lane.tracers)

    def _put_spans(self, lane: Lane) -> None:
        lane.tracers.encode_finished(
            lambda body, spans: self._put(lane, Signal.TRACES, body, spans)
        )

    def _is_wanted(self, lane: Lane, signal: Signal) -> bool:
        """Whether anybody will see telemetry of this signal."""
        is_sent = signal in self._sent and signal not in self._spool.closed
        return is_sent or lane.recording is not None

    def _put(self, lane: Lane, signal: Signal, body: bytes, items: int) -> None:
        if lane.recording is not None:
            lane.recording.append(signal, body)
        if signal in self._sent:
            self._spool.put(signal, body, items)

    def _fault(self, what: str, error: Exception) -> None:
        """A fault of our own: said once, with its traceback for whoever looks closer."""
        if what not in self._faults:
            self._faults.add(what)
            log.warning("%s could not be turned into OTLP: %r", what, error)
            log.debug("the fault", exc_info=error)
