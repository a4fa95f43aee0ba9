"""Consent: what a decision says of a proposal, and of going on at all."""

from __future__ import annotations

from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.pause import Pause
from esper_otel.leyline import events
from esper_otel.leyline.decisions import (
    FAILED_OPEN,
    NOT_ASKED,
    Action,
    Decision,
    Proposal,
    Severity,
)
from esper_otel.settings import Growth


class Consent:
    """Reads decisions for a garden, and keeps the pause they put on it."""

    def __init__(self, ground: Ground) -> None:
        self.pause = Pause()
        self._ground = ground
        self._autonomous = ground.settings.growth is Growth.AUTONOMOUS

    def to(self, proposal: Proposal, decision: Decision, judged: bool) -> bool:
        """Whether ``proposal`` may be done; ``judged``: see :func:`judges`."""
        if not judged:
            return self._autonomous and not self.pause.holds(proposal.seed_id)
        if decision.action is Action.SEED:
            asked = (decision.target_seed, decision.seed_operation)
            return asked == (proposal.seed_id, proposal.operation)
        return decision.action is Action.CONTINUE and self._autonomous

    def follow(self, decision: Decision) -> bool:
        """Pause or resume as ``decision`` says; whether that changes anything."""
        pause = self.pause
        if not pause.follow(decision):
            return False
        why = decision.reason
        if pause:
            text = f"{pause} paused: {why}"
            self._ground.tell(events.PAUSED, Severity.WARNING, text, reason=why)
        else:
            self._ground.tell(events.RESUMED, Severity.NORMAL, "seeds go on", reason=why)
        return True

    def refuse(self, decision: Decision, known: bool) -> None:
        """Say that a SEED decision is not done; ``known``: its seed is here."""
        target, operation = decision.target_seed, decision.seed_operation
        why = "it was not proposed" if known else "there is no such seed"
        self._ground.tell(
            events.REFUSED,
            Severity.WARNING,
            f"{operation} of {target} is not done: {why}",
            seed_id=target or "",
            operation=str(operation),
            reason=why,
        )


def judges(decision: Decision, enforced: bool) -> bool:
    """Whether somebody gave ``decision``, and it is to be followed."""
    given = decision.reason != NOT_ASKED and decision.reason not in FAILED_OPEN
    return enforced and given
