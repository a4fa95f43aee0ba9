"""Agreement: one decision for all ranks, applied by each at the end of the same step.

The leader asks about step N and, as soon as it has the answer, posts it with what it
proposed; the others post at the end of step N. At the end of step N+1 every rank takes what
came of the posts of step N, and applies that. The leader has its answer before the optimizer
of step N+1 steps, and by then each rank has been through a backward pass in which all took
part, so whoever is late at that point holds up the training itself.

The wait for it is bounded all the same. After one failure (a rank that died or stands
still, ranks that differ) the agreement is over for good on every rank that notices: it
says so once, answers CONTINUE with the reason ``not_agreed``, and seeds stay as they are.
"""

from __future__ import annotations

import logging
from typing import NamedTuple, Protocol

from esper_otel.leyline.decisions import NOT_AGREED, NOT_ASKED, Decision, unanswered
from esper_otel.ranks.circle import Circle, CircleError, Sent
from esper_otel.ranks.posts import DisagreementError, News, Order, Word, news, post

log = logging.getLogger("esper_otel")


class Shared(Protocol):
    """What the ranks must do alike: a garden, seen from here."""

    def heard(self, flags: bytes, order: Order | None) -> None:
        """What came of the posts of the step before."""

    def flags(self) -> bytes:
        """Of this rank, as many at every step, each 0 or 1; any rank's 1 counts."""

    def digest(self) -> int:
        """A number of 32 bits that is the same on all ranks while they are alike."""

    def order(self) -> Order | None:
        """On the leader: what it has proposed in this step."""

    def lost(self) -> None:
        """There will be no agreement any more."""


class _Prepared(NamedTuple):
    """What this rank is to post of a step, as it was at the step's end.

    ``shared`` is who took part in it: a garden may be planted later.
    """

    step: int
    digest: int
    flags: bytes
    order: Order | None
    shared: Shared | None


class Agreement:
    """Settles with the other ranks what is decided; see the module.

    ``shared`` (settable before the first step) takes part in it.
    """

    def __init__(self, circle: Circle, run: str) -> None:
        self.circle = circle
        self.shared: Shared | None = None
        self.holds = True
        """False once it is over."""
        self._run = run
        self._prepared: _Prepared | None = None
        self._sent: tuple[_Prepared, Sent] | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank asks for all."""
        return self.circle.leads

    def answered(self, decision: Decision) -> None:
        """On the leader: the answer about the step that was settled last. Never raises."""
        try:
            self._post(decision)
        except Exception as error:
            self._give_up_after(error)

    def settle(self, step: int) -> Decision:
        """Prepare what this rank posts of ``step``; returns what all have settled before.

        The decision returned is about the step before, ``not_asked`` at the first,
        ``not_agreed`` once the agreement is over. Never raises.
        """
        settled: News | None = None
        if self.holds:
            try:
                if self._prepared is not None:  # the leader's question was not even sent
                    self._post(unanswered(self._run, step - 1, NOT_ASKED))
                settled = self._take()
                self._prepare(step)
            except Exception as error:
                self._give_up_after(error)
                settled = None
        if settled is not None:
            return settled.word.decision
        if self.holds:
            return unanswered(self._run, step - 1, NOT_ASKED)
        return unanswered(self._run, step, NOT_AGREED)

    def give_up(self, why: str) -> None:
        """End it; ``why`` is told, once."""
        if self.holds:
            self._give_up(why)

    def close(self) -> None:
        """The run is over."""
        self.holds = False
        self._sent = self._prepared = None
        self.circle.leave()

    def _take(self) -> News | None:
        """What came of the posts of the step before; who took part in it hears of it."""
        if self._sent is None:
            return None
        (prepared, sent), self._sent = self._sent, None
        settled = news(prepared.step, prepared.digest, len(prepared.flags), sent.wait())
        if prepared.shared is not None:
            prepared.shared.heard(settled.flags, settled.word.order)
        return settled

    def _prepare(self, step: int) -> None:
        shared = self.shared
        if shared is None:
            self._prepared = _Prepared(step, 0, b"", None, None)
        else:
            order = shared.order() if self.leads else None
            self._prepared = _Prepared(step, shared.digest(), shared.flags(), order, shared)
        if not self.leads:
            self._post(None)

    def _post(self, decision: Decision | None) -> None:
        """``decision`` is the leader's answer, None on the others."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        word = None if decision is None else Word(decision, prepared.order)
        posted = post(prepared.step, prepared.digest, prepared.flags, word)
        self._sent = prepared, self.circle.send(posted)

    def _give_up_after(self, error: Exception) -> None:
        known = isinstance(error, CircleError | DisagreementError)
        self._give_up(str(error) if known else repr(error))

    def _give_up(self, why: str) -> None:
        self.close()
        log.warning(
            "the ranks of this run agree no more (%s): no decision is applied from here on, "
            "and seeds stay as they are",
            why,
        )
        if self.shared is not None:
            self.shared.lost()
