"""Drain: the thread that turns frames and timelines into OTLP, and adds up what goes by.

It does everything the training thread must not: encoding, span making, file writing. It
never touches the network, so a receiver that stalls cannot hold it back. What a run was like
so far (:class:`RunTotals`) is added up here as well, so that a step pays nothing for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import numpy as np

from esper_otel.leyline.decisions import FAILED_OPEN, Action
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.stream.destination import Signal
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.logs import TrainerIdentity, emit_events, encode_events
from esper_otel.stream.providers import Tracers, users_logger
from esper_otel.stream.recording import Recording
from esper_otel.stream.ring import FrameRing, points
from esper_otel.stream.spans import emit_spans
from esper_otel.stream.spool import Spool

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("esper_otel")

SPAN_INTERVAL_S = 1.0
"""Frames are decided about, spans are looked at: a second later is soon enough, and one
request with the spans of several steps costs little more than one with a single step's."""

_LATENCY = STEP_SLOT["step_latency_ms"]
_LOSS = STEP_SLOT["loss"]
_NONFINITE = STEP_SLOT["nonfinite"]
_LR_SCALE = STEP_SLOT["lr_scale"]
_SKIPPED = STEP_SLOT["update_skipped"]
_UNJUDGED = STEP_SLOT["unjudged_steps"]


class RunTotals:
    """Sums of one run. Read while it is written it may be a few steps behind, never wrong
    by more than those."""

    def __init__(self) -> None:
        self.steps = 0
        self.first_unix_nano = 0
        self.last_unix_nano = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.nonfinite_steps = 0
        self.skipped_updates = 0
        self.unjudged_steps = 0
        """Steps at which the newest decision request had not been answered."""
        self.held_unjudged_steps = 0
        """Those of them at which a decision still scaled the learning rates."""
        self.decisions: Counter[tuple[str, str]] = Counter()
        """How often each (action, reason) was decided; CONTINUE without a finding is not
        counted."""
        self.applied: Counter[tuple[str, str]] = Counter()
        """How often it changed something in the run."""
        self.unanswered: set[str] = set()
        """Why nobody answered, where nobody did and the step had spans."""
        self._timed_steps = 0
        self._sums = np.zeros(len(STEP_KEYS))
        self._counts = np.zeros(len(STEP_KEYS), np.int64)

    def add(self, times: NDArray[Any], rows: NDArray[Any]) -> None:
        """Take in ``rows`` (steps × metrics, NaN is absent), at Unix ``times`` (steps)."""
        if not self.steps:
            self.first_unix_nano = int(times[0])
        self.last_unix_nano = int(times[-1])
        self.steps += len(rows)
        self.nonfinite_steps += int((rows[:, _NONFINITE] > 0.0).sum())
        self.skipped_updates += int((rows[:, _SKIPPED] > 0.0).sum())
        unjudged = rows[:, _UNJUDGED] > 0.0
        self.unjudged_steps += int(unjudged.sum())
        self.held_unjudged_steps += int((unjudged & (rows[:, _LR_SCALE] != 1.0)).sum())
        present = ~np.isnan(rows)
        # Steps whose whole time is known, which the first one's is not: their parts add up.
        timed = present & present[:, [_LATENCY]]
        self._timed_steps += int(timed[:, _LATENCY].sum())
        self._sums += np.where(timed, rows, 0.0).sum(axis=0)
        self._counts += timed.sum(axis=0)
        losses = rows[present[:, _LOSS], _LOSS]
        if len(losses):
            if self.first_loss is None:
                self.first_loss = float(losses[0])
            self.last_loss = float(losses[-1])

    def count_decision(self, timeline: StepTimeline) -> None:
        """Take in what was decided about a step."""
        decision = timeline.decision
        if decision is None:
            return
        if decision.reason in FAILED_OPEN:
            self.unanswered.add(decision.reason)
        elif decision.action is not Action.CONTINUE or decision.findings:
            what = decision.action.value, decision.reason
            self.decisions[what] += 1
            if timeline.applied:
                self.applied[what] += 1

    def per_step(self, key: str) -> float | None:
        """What a step with a latency had of ``key`` on average, None when none had any."""
        if not self._counts[STEP_SLOT[key]]:
            return None
        return float(self._sums[STEP_SLOT[key]]) / self._timed_steps


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
        trainer: TrainerIdentity,
        tracers: Tracers,
        spool: Spool,
        recording: Recording | None,
        totals: RunTotals,
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
        self._totals = totals
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
        frames = self._ring.drain(now_ns)
        if frames is None:
            return
        self._totals.add(frames.steps.times, frames.steps.values)
        if not self._is_wanted(Signal.METRICS):
            return
        try:
            requests = list(self._encoder.encode(frames))
        except Exception as error:
            self._fault("frames", error)
            self._spool.drop_unencoded(Signal.METRICS, points(frames))
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
                self._spool.drop_unencoded(Signal.LOGS, len(events))
            return
        if self._recording is not None:
            self._recording.append(Signal.LOGS, body)
        if sent:
            self._spool.put(Signal.LOGS, body, len(events))

    def _drain_timelines(self) -> None:
        while self._timelines:
            timeline = self._timelines.popleft()
            self._totals.count_decision(timeline)
            if self._tracers.are_users or self._is_wanted(Signal.TRACES):
                emit_spans(timeline, self._tracers)
        self._tracers.encode_finished(lambda body, spans: self._put(Signal.TRACES, body, spans))

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
