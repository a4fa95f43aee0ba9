"""Agreement: one decision for all ranks, applied by each at the end of the same step.

The leader asks about step N and posts the decision with what it proposed; nobody waits for
it. At the end of step N+1 every rank takes what came of the posts of step N, and applies
that. By then each rank has been through a backward pass in which all took part, so the
post has long arrived; whoever is late at that point holds up the training itself.

The wait for it is bounded all the same. After one failure (a rank that died or stands
still, ranks that differ) the agreement is over for good on every rank that notices: it
says so once, answers CONTINUE with the reason ``not_agreed``, and seeds stay as they are.
"""

from __future__ import annotations

import logging
from typing import Protocol

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
        self._sent: tuple[int, int, int, Sent] | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank asks for all."""
        return self.circle.leads

    def settle(self, step: int, decision: Decision) -> Decision:
        """Post what this rank knows of ``step``; returns what all have settled before.

        ``decision`` is the answer about ``step`` on the leader, and without meaning
        elsewhere. The one returned is about the step before, ``not_asked`` at the first,
        ``not_agreed`` once the agreement is over. Never raises.
        """
        if not self.holds:
            return unanswered(self._run, step, NOT_AGREED)
        try:
            settled = self._take()
            if settled is not None and self.shared is not None:
                self.shared.heard(settled.flags, settled.word.order)
            self._post(step, decision)
        except (CircleError, DisagreementError) as error:
            self._give_up(str(error))
            settled = None
        except Exception as error:
            self._give_up(repr(error))
            settled = None
        if settled is None:
            return unanswered(self._run, step, NOT_ASKED if self.holds else NOT_AGREED)
        return settled.word.decision

    def give_up(self, why: str) -> None:
        """End it; ``why`` is told, once."""
        if self.holds:
            self._give_up(why)

    def close(self) -> None:
        """The run is over."""
        self.holds = False
        self._sent = None
        self.circle.leave()

    def _take(self) -> News | None:
        if self._sent is None:
            return None
        step, digest, flags, sent = self._sent
        self._sent = None
        return news(step, digest, flags, sent.wait())

    def _post(self, step: int, decision: Decision) -> None:
        shared = self.shared
        flags, digest = (b"", 0) if shared is None else (shared.flags(), shared.digest())
        word = None
        if self.leads:
            word = Word(decision, None if shared is None else shared.order())
        sent = self.circle.send(post(step, digest, flags, word))
        self._sent = (step, digest, len(flags), sent)

    def _give_up(self, why: str) -> None:
        self.close()
        log.warning(
            "the ranks of this run agree no more (%s): no decision is applied from here on, "
            "and seeds stay as they are",
            why,
        )
        if self.shared is not None:
            self.shared.lost()
