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
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esper_otel.leyline.decisions import FAILED_OPEN, Action
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import StepFrame, StepTimeline
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.run_config import RunConfig
from esper_otel.stream.console import printer
from esper_otel.stream.decision_marks import DecisionMarks
from esper_otel.stream.destination import Signal
from esper_otel.stream.encoding import FrameEncoder, encode_end
from esper_otel.stream.logs import TrainerIdentity, emit_events, encode_events
from esper_otel.stream.loss_curve import LossCurve
from esper_otel.stream.providers import Tracers, users_logger
from esper_otel.stream.recording import Recording
from esper_otel.stream.ring import FrameRing, points
from esper_otel.stream.spans import emit_spans
from esper_otel.stream.spool import Spool
from esper_otel.stream.spool_files import Keeper

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("esper_otel")

SPAN_INTERVAL_S = 1.0
"""Frames are decided about, spans are looked at: a second later is soon enough, and one
request with the spans of several steps costs little more than one with a single step's. They
are encoded before that, as a timeline that waits is dozens of containers for Python's garbage
collector."""

_LATENCY = STEP_SLOT["step_latency_ms"]
_LOSS = STEP_SLOT["loss"]
_NONFINITE = STEP_SLOT["nonfinite"]
_LR_SCALE = STEP_SLOT["lr_scale"]
_SKIPPED = STEP_SLOT["update_skipped"]
_UNJUDGED = STEP_SLOT["unjudged_steps"]


_SUMMED = (
    "steps",
    "nonfinite_steps",
    "skipped_updates",
    "unjudged_steps",
    "held_unjudged_steps",
    "decisions",
    "applied",
    "_timed_steps",
    "_sums",
    "_counts",
)


class RunTotals:
    """Sums of one run. Read while it is written it may be a few steps behind, never wrong
    by more than those."""

    def __init__(self) -> None:
        self.runs = 1
        """How many are summed."""
        self.complete = False
        """Whether no step follows."""
        self.steps = 0
        self.first_unix_nano = 0
        self.last_unix_nano = 0
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.losses = LossCurve()
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
        self.marks = DecisionMarks()
        self._timed_steps = 0
        self._sums = np.zeros(len(STEP_KEYS))
        self._counts = np.zeros(len(STEP_KEYS), np.int64)

    @classmethod
    def sum_of(cls, several: Sequence[RunTotals]) -> RunTotals:
        """Those of several runs, one after the other or in turn; no losses of one are kept."""
        total = cls()
        total.runs = sum(each.runs for each in several)
        total.complete = all(each.complete for each in several)
        some = [each for each in several if each.steps]
        total.first_unix_nano = min((each.first_unix_nano for each in some), default=0)
        total.last_unix_nano = max((each.last_unix_nano for each in some), default=0)
        for each in several:
            for name in _SUMMED:
                setattr(total, name, getattr(total, name) + getattr(each, name))
            total.unanswered |= each.unanswered
        return total

    def add(self, times: NDArray[Any], rows: NDArray[Any]) -> None:
        """Take in ``rows`` (steps × metrics, NaN is absent), at Unix ``times`` (steps)."""
        if not self.steps:
            self.first_unix_nano = int(times[0])
            self.marks.begin(rows)
        self.last_unix_nano = int(times[-1])
        self.steps += len(rows)
        broken = rows[:, _NONFINITE] > 0.0
        self.nonfinite_steps += int(broken.sum())
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
        self.losses.extend(rows[:, _LOSS], broken)
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
            self.marks.note(timeline)
            if timeline.applied:
                self.applied[what] += 1

    def per_step(self, key: str) -> float | None:
        """What a step with a latency had of ``key`` on average, None when none had any."""
        if not self._counts[STEP_SLOT[key]]:
            return None
        return float(self._sums[STEP_SLOT[key]]) / self._timed_steps


MOST_TOTALS = 256
"""Trainings whose sums are kept apart. Beyond it those in the middle are added up."""


def shortened(totals: Iterable[tuple[str, RunTotals]]) -> list[tuple[str, RunTotals]]:
    """``totals``, those that are complete added up where there are too many."""
    kept = list(totals)
    if len(kept) <= MOST_TOTALS:
        return kept
    first, others = kept[: MOST_TOTALS // 4], kept[MOST_TOTALS // 4 :]
    complete = [each for _, each in others if each.complete]
    rest = [(name, each) for name, each in others if not each.complete]
    if not complete:
        return kept
    return [*first, ("", RunTotals.sum_of(complete)), *rest]


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
        self.over = False
        """Whether nothing more is handed over."""


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
    when there is a recording to hold them. While a receiver is away that is done twice as
    often: with ``keeper`` writing at once what comes of it, a process that is killed has lost
    the steps of half an interval, and of the time that encoding and writing took.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        spool: Spool,
        keeper: Keeper,
        sent: frozenset[Signal],
        interval_s: float,
    ) -> None:
        self.lanes = [lane]
        """Those that are not over, or not emptied yet; whoever begins another appends it."""
        self._spool = spool
        self._keeper = keeper
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
        if self._thread.ident is None:  # the system gave no thread: here, at the end
            self._drain()
            return True
        self._thread.join(max(timeout_s, 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s / (2 if self._spool.away else 1)):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        now = time.monotonic()
        self._spool.look_for_overdue(now)
        stopping = self._stopping.is_set()
        due = stopping or now >= self._spans_due
        if due:
            self._spans_due = now + SPAN_INTERVAL_S
        for lane in list(self.lanes):
            over = stopping or lane.over  # looked at before it is emptied for the last time
            for what, drain in (
                ("frames", self._drain_frames),
                ("ends", self._drain_ends),
                ("events", self._drain_events),
                ("timelines", self._drain_timelines),
                ("spans", self._put_spans),
            ):
                if what != "spans" or due or over:
                    try:
                        drain(lane, over)
                    except Exception as error:  # one fault must not end all that follows
                        self._fault(what, error)
            if over:
                if lane.recording is not None:
                    lane.recording.close()
                lane.totals.complete = True
                self.lanes.remove(lane)
        self._keeper.look()

    def _drain_frames(self, lane: Lane, over: bool) -> None:
        # Prometheus keeps milliseconds, and refuses a whole request for a sample whose
        # millisecond has come in another one. So a millisecond is sent in one piece.
        now_ns = None if over else time.time_ns()
        frames = lane.ring.drain(now_ns)
        if frames is None:
            return
        try:
            lane.totals.add(frames.steps.times, frames.steps.values)
        except Exception as error:
            self._fault("sums of frames", error)
        if lane.show is not None:
            try:
                lane.show(frames)
            except Exception as error:  # a terminal that is gone
                lane.show = None
                log.warning("steps are not printed any more: %r", error)
        if not self._is_wanted(lane, Signal.METRICS):
            return
        try:
            requests = list(lane.encoder.encode(frames))
        except Exception as error:
            self._fault("frames", error)
            self._spool.drop_unencoded(Signal.METRICS, points(frames))
            return
        for request in requests:
            self._put(lane, Signal.METRICS, request.body, request.points)

    def _drain_ends(self, lane: Lane, over: bool) -> None:
        while lane.ends:
            end = lane.ends.popleft()
            if lane.recording is not None and lane.recording.card is not None:
                lane.recording.card.ended = str(end.ended or "")
            if self._is_wanted(lane, Signal.METRICS):
                body = encode_end(end, lane.resource)
                self._put(lane, Signal.METRICS, body, 1 + len(end.values))

    def _drain_events(self, lane: Lane, over: bool) -> None:
        config = lane.config
        if config is not None and config.is_new and lane.totals.steps:
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
        while lane.timelines:
            timeline = lane.timelines.popleft()
            lane.totals.count_decision(timeline)
            if lane.tracers.are_users or self._is_wanted(lane, Signal.TRACES):
                emit_spans(timeline, lane.tracers)

    def _put_spans(self, lane: Lane, over: bool) -> None:
        lane.tracers.encode_finished(
            lambda body, spans: self._put(lane, Signal.TRACES, body, spans)
        )

    def _is_wanted(self, lane: Lane, signal: Signal) -> bool:
        """Whether anybody will see telemetry of this signal."""
        is_sent = signal in self._sent and not self._spool.is_closed(signal)
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
