"""Drain: the thread that turns frames and timelines into OTLP.

It does everything the training thread must not: encoding, span making, file writing. It
never touches the network, so a receiver that stalls cannot hold it back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepTimeline
from esper_otel.stream.destination import Signal
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.logs import Trainer, emit_events, encode_events
from esper_otel.stream.providers import Tracers, users_logger
from esper_otel.stream.recording import Recording
from esper_otel.stream.ring import FrameRing, points
from esper_otel.stream.spans import tell
from esper_otel.stream.spool import Spool

log = logging.getLogger("esper_otel")

SPAN_INTERVAL_S = 1.0
"""Frames are decided about, spans are looked at: a second later is soon enough, and one
request with the spans of several steps costs little more than one with a single step's."""


class Drain:
    """Empties the ring every ``interval_s`` into the spool, and into a recording.

    Only signals in ``sent`` go to the spool and are accounted for; the others are made
    when there is a recording to hold them.
    """

    def __init__(
        self,
        *,
        ring: FrameRing,
        timelines: deque[StepTimeline],
        events: deque[Event],
        resource: bytes,
        trainer: Trainer,
        tracers: Tracers,
        spool: Spool,
        recording: Recording | None,
        sent: frozenset[Signal],
        interval_s: float,
    ) -> None:
        self._ring = ring
        self._timelines = timelines
        self._events = events
        self._resource = resource
        self._trainer = trainer
        self._encoder = FrameEncoder(resource)
        self._tracers = tracers
        self._spool = spool
        self._recording = recording
        self._sent = sent
        self._interval_s = interval_s
        self._faults: set[str] = set()
        self._stopping = threading.Event()
        self._spans_due = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="esper-stream", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Drain once more and end; False when that did not happen in time."""
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._drain()
        self._drain()
        if self._recording is not None:
            self._recording.close()

    def _drain(self) -> None:
        self._drain_frames()
        self._drain_events()
        if time.monotonic() < self._spans_due and not self._stopping.is_set():
            return
        self._spans_due = time.monotonic() + SPAN_INTERVAL_S
        try:
            self._drain_timelines()
        except Exception as error:
            self._fault("spans", error)

    def _drain_frames(self) -> None:
        # Prometheus keeps milliseconds, and refuses a whole request for a sample whose
        # millisecond has come in another one. So a millisecond is sent in one piece.
        now_ns = None if self._stopping.is_set() else time.time_ns()
        frames = self._ring.take(now_ns)
        if frames is None or not self._is_wanted(Signal.METRICS):
            return
        try:
            requests = list(self._encoder.encode(frames))
        except Exception as error:
            self._fault("frames", error)
            self._spool.never_made(Signal.METRICS, points(frames))
            return
        for request in requests:
            self._put(Signal.METRICS, request.body, request.points)

    def _drain_events(self) -> None:
        if not self._events:
            return
        events = [self._events.popleft() for _ in range(len(self._events))]
        logger = users_logger()
        if logger is not None:
            try:
                emit_events(events, logger, self._trainer)
            except Exception as error:
                self._fault("events", error)
        sent = Signal.LOGS in self._sent and logger is None
        if self._recording is None and not (sent and self._is_wanted(Signal.LOGS)):
            return
        try:
            body = encode_events(events, self._resource, self._trainer)
        except Exception as error:
            self._fault("events", error)
            if sent:
                self._spool.never_made(Signal.LOGS, len(events))
            return
        if self._recording is not None:
            self._recording.append(Signal.LOGS, body)
        if sent:
            self._spool.put(Signal.LOGS, body, len(events))

    def _drain_timelines(self) -> None:
        while self._timelines:
            timeline = self._timelines.popleft()
            if self._tracers.are_users or self._is_wanted(Signal.TRACES):
                tell(timeline, self._tracers)
        self._tracers.take(lambda body, spans: self._put(Signal.TRACES, body, spans))

    def _is_wanted(self, signal: Signal) -> bool:
        """Whether anybody will see telemetry of this signal."""
        is_sent = signal in self._sent and not self._spool.is_closed(signal)
        return is_sent or self._recording is not None

    def _put(self, signal: Signal, body: bytes, items: int) -> None:
        if self._recording is not None:
            self._recording.append(signal, body)
        if signal in self._sent:
            self._spool.put(signal, body, items)

    def _fault(self, what: str, error: Exception) -> None:
        """A fault of our own: said once, with its traceback for whoever looks closer."""
        if what not in self._faults:
            self._faults.add(what)
            log.warning("%s could not be turned into OTLP: %r", what, error)
            log.debug("the fault", exc_info=error)
