"""Ports: whom a recorder talks to, as far as it knows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from esper_otel.leyline.decisions import Decision, Proposal
from esper_otel.leyline.events import Event
from esper_otel.leyline.frames import GardenFrame, StepTimeline
from esper_otel.leyline.guards import Guards


class FrameSink(Protocol):
    """Where finished frames go; neither call may block or raise."""

    def frame(
        self,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]] = (),
    ) -> None:
        """Take one step's values."""

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
    ) -> None:
        """Ask about a step."""

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
