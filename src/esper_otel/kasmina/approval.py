"""Approval: whether a decision lets a proposal be carried out, and which seeds it freezes."""

from __future__ import annotations

from esper_otel.kasmina.context import GardenContext
from esper_otel.kasmina.state import FreezeState
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


def is_authoritative(decision: Decision, enforced: bool) -> bool:
    """Whether somebody gave ``decision``, and it is to be followed."""
    given = decision.reason != NOT_ASKED and decision.reason not in FAILED_OPEN
    return enforced and given


class Freeze:
    """What a PAUSE has frozen: nothing, some seeds, or everything.

    A frozen seed computes and learns on; its alpha and its stage stay as they are, and so
    does the clock of its stage. With everything frozen that holds for empty slots as well.
    """

    __slots__ = ("everything", "seeds")

    def __init__(self) -> None:
        self.everything = False
        self.seeds: frozenset[str] = frozenset()

    def covers(self, seed_id: str | None) -> bool:
        """Whether that seed is frozen; None: an empty slot."""
        return self.everything or seed_id in self.seeds

    def update(self, decision: Decision) -> bool:
        """Freeze what a PAUSE names, resume after any other decision that was given.

        Every rule that found a seed to be paused counts, not only the one that won.
        Returns whether that changes anything.
        """
        names: set[str | None] = set()
        if decision.action is Action.PAUSE:
            names = {
                found.seed_id for found in decision.findings if found.action is Action.PAUSE
            }
            names.add(decision.target_seed)
        now = None in names, frozenset(name for name in names if name is not None)
        if now == (self.everything, self.seeds):
            return False
        self.everything, self.seeds = now
        return True

    @property
    def state(self) -> FreezeState:
        """What is frozen, for :meth:`load_state`."""
        return FreezeState(everything=self.everything, seeds=sorted(self.seeds))

    def load_state(self, state: FreezeState) -> None:
        """Freeze what ``state`` says, and nothing else."""
        self.everything, self.seeds = state.everything, frozenset(state.seeds)

    def __str__(self) -> str:
        return "all seeds" if self.everything else ", ".join(sorted(self.seeds))

    def __bool__(self) -> bool:
        return self.everything or bool(self.seeds)


class Approval:
    """Reads decisions for a garden, and keeps the freeze they put on it."""

    def __init__(self, context: GardenContext) -> None:
        self.freeze = Freeze()
        self._context = context
        self._autonomous = context.settings.growth is Growth.AUTONOMOUS

    def allows(self, proposal: Proposal, decision: Decision, authoritative: bool) -> bool:
        """Whether ``proposal`` may be done; for the last see :func:`is_authoritative`."""
        if not authoritative:
            return self._autonomous and not self.freeze.covers(proposal.seed_id)
        if decision.action is Action.SEED:
            asked = (decision.target_seed, decision.seed_operation)
            return asked == (proposal.seed_id, proposal.operation)
        return decision.action is Action.CONTINUE and self._autonomous

    def update_freeze(self, decision: Decision) -> bool:
        """Freeze or resume as ``decision`` says; whether that changes anything."""
        freeze = self.freeze
        if not freeze.update(decision):
            return False
        why = decision.reason
        if freeze:
            text = f"{freeze} paused: {why}"
            self._context.add_event(events.PAUSED, Severity.WARNING, text, reason=why)
        else:
            text = "seeds go on"
            self._context.add_event(events.RESUMED, Severity.NORMAL, text, reason=why)
        return True

    def report_refusal(self, decision: Decision, known: bool) -> None:
        """Report that a SEED decision is not done; ``known``: its seed is here."""
        target, operation = decision.target_seed, decision.seed_operation
        why = "it was not proposed" if known else "there is no such seed"
        self._context.add_event(
            events.REFUSED,
            Severity.WARNING,
            f"{operation} of {target} is not done: {why}",
            seed_id=target or "",
            operation=str(operation),
            reason=why,
        )
