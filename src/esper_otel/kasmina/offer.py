"""Offer: the operation a garden proposes at the end of a step, until it is decided about."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.sowing import Place
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Proposal, Severity
from esper_otel.leyline.events import NO_OPERATION, Attribute


class Offer(NamedTuple):
    """A proposal, the slot it is about, and, to germinate, where, or why to cull."""

    proposal: Proposal
    slot: str
    place: Place | None = None
    reason: str = ""


class Offering:
    """The offer of the newest step, and the one whose decision is awaited.

    An offer goes out with the request about its step; the decision comes at the end of the
    next. Until then it is under way, and nothing else is proposed.
    """

    __slots__ = ("_asked_at", "_ground", "_now", "_told", "_under_way")

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._now: Offer | None = None
        self._under_way: Offer | None = None
        self._asked_at = 0
        self._told: Proposal | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether an offer waits for its decision."""
        return self._under_way is not None

    def make(self, offer: Offer | None) -> None:
        """Propose ``offer`` in this step, or nothing (None)."""
        self._now = offer

    def withdraw(self) -> Offer | None:
        """Propose nothing in this step after all; returns what was to be proposed."""
        offer, self._now = self._now, None
        return offer

    def clear(self) -> None:
        """Forget what is proposed and what is under way."""
        self._now = self._under_way = None

    def answered(self, step: int | None) -> Offer | None:
        """The offer that went with the request about ``step``; it is used up by that.

        None for ``step``: whichever is under way. An offer older than ``step`` is dropped,
        as nobody will decide about it any more.
        """
        offer = self._under_way
        if offer is None or (step is not None and step < self._asked_at):
            return None
        self._under_way = None
        return offer if step is None or step == self._asked_at else None

    def went_out(self, step: int) -> None:
        """The offer of this step, if there is one, went with the request about ``step``."""
        offer, self._now = self._now, None
        if self._under_way is not None:
            return
        self._under_way, self._asked_at = offer, step
        self.tell(offer, step)

    def tell(self, offer: Offer | None, step: int) -> None:
        """Report that ``offer`` was proposed in ``step``, if it is another one than before."""
        proposal = None if offer is None else offer.proposal
        if proposal == self._told:
            return
        before, self._told = self._told, proposal
        if offer is None or proposal is None:
            gone = f"{before.operation.value} of {before.seed_id}" if before else "all"
            self._report(f"nothing is proposed any more: {gone}", step, operation=NO_OPERATION)
            return
        attributes: dict[str, Attribute] = {"seed_id": proposal.seed_id, "slot": offer.slot}
        if offer.place is not None:
            attributes["blueprint"] = offer.place.blueprint
        operation = proposal.operation.value
        text = f"proposed: {operation} {proposal.seed_id}"
        self._report(text, step, operation=operation, **attributes)

    def _report(self, text: str, step: int, **attributes: Attribute) -> None:
        self._ground.tell(events.PROPOSED, Severity.NORMAL, text, step=step, **attributes)
