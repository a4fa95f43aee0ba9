"""Observer: the engine's notifications for those that keep records.

An observer is called on the thread that answers: it hands over what it is told and returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Protocol

import msgspec

from esper_otel.leyline.decisions import Decision, Severity
from esper_otel.leyline.frames import StepFrame


class RuleState(StrEnum):
    """Where a rule stands with one rank or, for a rule about seeds, with one seed."""

    INACTIVE = "inactive"
    PENDING = "pending"
    """It held at the newest observation, not yet for as many as ``for`` asks."""
    FIRING = "firing"
    RECOVERING = "recovering"
    """It held until now and no longer does, but has not been released yet."""
    UNKNOWN = "unknown"
    """A value it needs is missing, so nobody can say. That is not the same as healthy."""


class RuleChange(msgspec.Struct, frozen=True):
    """A rule went from one state to another.

    ``since_step`` is the step at which ``before`` began, -1 when the rule was never judged
    before. ``values`` are those the rule saw, by the key of their metric, with
    ``baseline(key)`` and ``previous(key)`` as findings have them. ``silenced_by`` is the id
    of the rule that inhibits this one, empty when none does.
    """

    run: str
    rank: int
    step: int
    time_unix_nano: int
    rule: str
    severity: Severity
    seed_id: str | None
    before: RuleState
    after: RuleState
    since_step: int
    values: dict[str, float]
    silenced_by: str = ""


class EngineObserver(Protocol):
    """Sees what is judged and decided, in order; what it raises is counted and ignored."""

    def on_rule_change(self, change: RuleChange) -> None:
        """A rule's state changed."""

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """A frame was judged, which happens once however often it comes."""

    def on_end(self, frame: StepFrame) -> None:
        """A rank said that its run has ended: a frame with ``ended`` and without values."""

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        """A decision became the newest of its rank: about a new frame, or about the same
        step once more because a proposal came with it."""


class Observed:
    """Tells an observer, which cannot disturb whoever tells it."""

    def __init__(self, observer: EngineObserver | None) -> None:
        self._observer = observer
        self.failed = 0
        """Times that the observer raised."""

    def tell_decision(self, frame: StepFrame, decision: Decision, *, is_new: bool) -> None:
        """A decision became the newest of its rank; ``is_new``: about a frame just judged."""
        if self._observer is None:
            return
        try:
            if is_new:
                self._observer.on_frame(frame, decision)
            self._observer.on_decision(decision, frame)
        except Exception:
            self.failed += 1

    def tell_changes(self, changes: Iterable[RuleChange]) -> None:
        """States of rules changed."""
        if self._observer is None:
            return
        for change in changes:
            try:
                self._observer.on_rule_change(change)
            except Exception:
                self.failed += 1

    def tell_end(self, frame: StepFrame) -> None:
        """A rank said that its run has ended."""
        if self._observer is None:
            return
        try:
            self._observer.on_end(frame)
        except Exception:
            self.failed += 1
