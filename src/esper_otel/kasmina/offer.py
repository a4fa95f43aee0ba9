"""Offer: the operation a garden proposes at the end of a step, used up by the next decision."""

from __future__ import annotations

from typing import NamedTuple

from esper_otel.kasmina.ground import Ground
from esper_otel.kasmina.sowing import Place
from esper_otel.leyline import events
from esper_otel.leyline.decisions import Proposal, Severity
from esper_otel.leyline.events import NO_OPERATION, Attribute


class Offer(NamedTuple):
    """A proposal, the slot it is about, and, to germinate, where."""

    proposal: Proposal
    slot: str
    place: Place | None = None


class Offering:
    """Holds the offer of the newest step, and tells when it is another one."""

    __slots__ = ("_ground", "_now", "_told")

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._now: Offer | None = None
        self._told: Proposal | None = None

    def make(self, offer: Offer | None) -> None:
        """This is the offer now, None: there is none."""
        self._now = offer

    def take(self) -> Offer | None:
        """The offer, which is gone then."""
        offer, self._now = self._now, None
        return offer

    def went_out(self, step: int) -> None:
        """The offer went with the ask about ``step``; tells when it was another one before."""
        offer = self._now
        proposal = None if offer is None else offer.proposal
        if proposal == self._told:
            return
        before, self._told = self._told, proposal
        if offer is None or proposal is None:
            gone = f"{before.operation.value} of {before.seed_id}" if before else "all"
            self._tell(f"nothing is proposed any more: {gone}", step, operation=NO_OPERATION)
            return
        attributes: dict[str, Attribute] = {"seed_id": proposal.seed_id, "slot": offer.slot}
        if offer.place is not None:
            attributes["blueprint"] = offer.place.blueprint
        operation = proposal.operation.value
        text = f"proposed: {operation} {proposal.seed_id}"
        self._tell(text, step, operation=operation, **attributes)

    def _tell(self, text: str, step: int, **attributes: Attribute) -> None:
        self._ground.tell(events.PROPOSED, Severity.NORMAL, text, step=step, **attributes)
