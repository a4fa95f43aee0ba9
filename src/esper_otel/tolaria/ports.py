"""Ports: interfaces of the collaborators of a recorder, and stand-ins for absent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from esper_otel.leyline.decisions import Decision, Proposal
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import NO_CUSTOM, GardenFrame, StepTimeline
from esper_otel.leyline.guards import Guards
from esper_otel.leyline.metrics import STEP_SLOT


class FrameSink(Protocol):
    """Where finished frames go; neither call may block or raise."""

    def frame(
        self,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Take one step's values; ``custom`` by name, and not given where there are none."""

    def timeline(self, timeline: StepTimeline) -> None:
        """Take one step's phases, to become spans."""

    def event(self, event: Event) -> None:
        """Take something that happened to a seed, its mark a Unix time."""


class DecisionClient(Protocol):
    """Who is asked for a decision. No call raises; only the last two wait, for a deadline."""

    @property
    def guards(self) -> Guards | None:
        """Bounds that no update may cross unjudged, None before any are known."""

    def send(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Ask about a step; ``custom`` is not given where there are none."""

    def collect(self) -> Decision | None:
        """The decision about it; None when it has been collected."""

    def check(
        self, step: int, time_unix_nano: int, row: list[float], waited_ns: int = 0
    ) -> Decision:
        """What is to become of a step's update, which has not been made yet.

        ``waited_ns``: how much of the deadline is used up.
        """


class DecisionAgreement(Protocol):
    """Who makes one decision of what the ranks of a run are told."""

    unsound: bool
    """To be set before :meth:`settle`: this rank had trouble of its own in the step."""

    @property
    def any_unsound(self) -> bool:
        """Whether any rank had, in the step that was settled last."""

    def submit_answer(self, decision: Decision) -> None:
        """On the rank that asks: the answer about the step that was settled last."""

    def settle(self, step: int) -> Decision:
        """At the end of ``step``; returns what every rank is to apply now."""


class GardenPort(Protocol):
    """As much of :class:`esper_otel.kasmina.garden.Garden` as a recorder calls."""

    planted: bool
    """False once it has been uprooted."""

    def learn(self, optimizer: Any) -> None:
        """Let the seeds' optimizers step: the host's, ``optimizer``, just has."""

    def finalize(self, step: int, latest: Sequence[float]) -> GardenFrame:
        """End ``step``; ``latest`` is the newest row whose values have all arrived."""

    def proposal_sent(self, step: int) -> None:
        """The frame's proposal went with the request about ``step``, or would have."""

    def apply(self, decision: Decision, *, enforced: bool) -> bool:
        """Do what the decision says of the proposal that went with its request.

        Returns whether the decision changed anything: not what the garden did by itself.
        """

    def take_events(self) -> list[Event]:
        """What has happened since last asked."""


class PhaseTimes(NamedTuple):
    """How long the phases of some steps took, in nanoseconds."""

    forward: int = 0
    backward: int = 0
    optimizer: int = 0
    wait: int = 0
    hook: int = 0
    """What this package did."""


NO_TIME = PhaseTimes()

_TIMES = [
    STEP_SLOT[key]
    for key in ("forward_ms", "backward_ms", "optimizer_ms", "input_wait_ms", "hook_latency_ms")
]


class HeldRun:
    """Keeps what a run would send and ask until it is known to be one.

    After :meth:`release` it hands on what comes.
    """

    guards: Guards | None = None

    def __init__(self) -> None:
        self._frames: list[tuple[Any, ...]] = []
        self._timelines: list[StepTimeline] = []
        self._events: list[Event] = []
        self._asks: list[tuple[Any, ...]] = []
        self._sink: FrameSink | None = None

    def phase_times(self) -> PhaseTimes:
        """Those of all steps that are kept."""
        rows = [row for _, row, *_ in self._frames]
        return PhaseTimes(
            *(
                sum(round(row[slot] * 1e6) for row in rows if row[slot] == row[slot])
                for slot in _TIMES
            )
        )

    def release(self, sink: FrameSink, client: DecisionClient | None) -> None:
        """It is a run: ``sink`` gets what was kept, and ``client`` is asked about it."""
        self._sink = sink
        for frame in self._frames:
            sink.frame(*frame)
        for timeline in self._timelines:
            sink.timeline(timeline)
        for event in self._events:
            sink.event(event)
        if client is not None:
            for ask in self._asks:
                client.send(*ask)  # the answers are dropped: their updates have been made
        for kept in (self._frames, self._timelines, self._events, self._asks):
            kept.clear()
        self.frame = sink.frame  # type: ignore[method-assign]  # without the detour

    def frame(
        self,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Keep one step's values."""
        frame = (time_unix_nano, row, seeds)
        self._frames.append((*frame, custom) if custom else frame)

    def timeline(self, timeline: StepTimeline) -> None:
        """Keep one step's phases, or hand them on."""
        if self._sink is not None:
            self._sink.timeline(timeline)
        else:
            self._timelines.append(timeline)

    def event(self, event: Event) -> None:
        """Keep what happened to a seed, or hand it on."""
        if self._sink is not None:
            self._sink.event(event)
        else:
            self._events.append(event)

    def send(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
        proposal: Proposal | None = None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Keep a request."""
        ask = (step, time_unix_nano, row, seeds)
        self._asks.append((*ask, None, custom) if custom else ask)

    def collect(self) -> Decision | None:
        """Nobody has been asked yet."""
        return None

    def check(
        self, step: int, time_unix_nano: int, row: list[float], waited_ns: int = 0
    ) -> Decision:
        """Never called, as there are no guards."""
        raise NotImplementedError
