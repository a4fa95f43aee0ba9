"""Asking: one request under way at most, sent at the end of a step and collected later.

The request about step N is sent at the end of step N. Its answer is taken when the optimizer
is about to make step N+1: that is the first update which the decision can change, and by
then a forward and a backward pass have gone by, so that it is nearly always there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns

import msgspec

from esper_otel.leyline.decisions import FAILED_OPEN, NOT_ASKED, Decision, Proposal, unanswered
from esper_otel.leyline.frames import NO_CUSTOM
from esper_otel.leyline.guards import Guards
from esper_otel.tolaria.ports import DecisionAgreement, DecisionClient


class Taken(msgspec.Struct, frozen=True):
    """A decision, and the marks between which it was asked for and taken."""

    decision: Decision
    sent: int
    taken: int


class Asking:
    """Asks for one rank, or takes what all ranks of its run have settled.

    ``client`` None means that nobody is asked.
    """

    def __init__(self, run: str, client: DecisionClient | None) -> None:
        self.spent_ns = 0
        """Time of the training thread, in nanoseconds, since it was set to 0 last."""
        self.unjudged = 0
        """Decisions in a row, up to the newest, that no sidecar made."""
        self.not_asked = unanswered(run, 0, NOT_ASKED)
        self._run = run
        self.asks = client is not None
        """Whether this rank asks the sidecar."""
        self.decides = self.asks
        """Whether decisions come here at all, from the sidecar or from another rank."""
        self.is_shared = False
        """Whether decisions are those that all ranks have settled."""
        self.unsound = self.any_unsound = False
        """Whether this rank had trouble of its own in the step that ends; and whether any of
        those that agree had, in the step that was settled last."""
        self._client = client
        self._agreement: DecisionAgreement | None = None
        self.sent = 0
        """Mark of the sending of what is under way, 0: nothing is."""
        self._settled_from = 0
        self._waited_ns = 0
        """For the newest answer."""

    @property
    def guards(self) -> Guards | None:
        """Bounds that an update is to be held against here.

        None before the sidecar has sent any, and where ranks act alike: one of them alone
        must not change its own update.
        """
        if self._agreement is not None or self._client is None:
            return None
        return self._client.guards

    def set_client(self, client: DecisionClient | None) -> None:
        """Ask ``client`` from here on; None: nobody."""
        self._client, self.sent = client, 0
        self.asks = client is not None
        self.decides = self.asks or self.is_shared

    def share_decisions(self, agreement: DecisionAgreement, *, asks: bool) -> None:
        """From here on take what all ranks have settled; ``asks``: for all of them."""
        self._agreement = agreement
        self.decides = self.is_shared = True
        if not asks:
            self.set_client(None)

    def send(
        self,
        step: int,
        time_unix_nano: int,
        row: list[float],
        seeds: Sequence[tuple[str, list[float]]],
        proposal: Proposal | None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Ask about ``step``; does not wait."""
        client = self._client
        if client is None:
            return
        began = perf_counter_ns()
        if custom:
            client.send(step, time_unix_nano, row, seeds, proposal, custom)
        elif seeds or proposal is not None:
            client.send(step, time_unix_nano, row, seeds, proposal)
        else:
            client.send(step, time_unix_nano, row)
        self.sent = began
        self.spent_ns += perf_counter_ns() - began

    def collect(self) -> Taken | None:
        """The decision of this rank that was asked for; waits until its deadline.

        None when nothing is under way, and where ranks agree: there it goes to the others.
        """
        sent, client = self.sent, self._client
        if not sent or client is None:
            return None
        self.sent = 0
        began = perf_counter_ns()
        decision = client.collect()
        agreement = self._agreement
        if decision is not None and agreement is not None:
            agreement.submit_answer(decision)
            self._settled_from, decision = sent, None
        ended = perf_counter_ns()
        self._waited_ns = ended - began
        self.spent_ns += self._waited_ns
        if decision is None:
            return None
        return self._count(Taken(decision, sent, ended))

    def collect_agreed(self, step: int) -> Taken | None:
        """Where ranks agree, at the end of ``step``: what all of them are to apply now."""
        agreement = self._agreement
        if agreement is None:
            return None
        began = perf_counter_ns()
        agreement.unsound = self.unsound
        decision = agreement.settle(step)
        self.any_unsound = agreement.any_unsound
        if self.asks and not self.sent:
            # All ranks do what they do together in the same order: nothing is to come later.
            agreement.submit_answer(unanswered(self._run, step, NOT_ASKED))
        ended = perf_counter_ns()
        self.spent_ns += ended - began
        sent, self._settled_from = self._settled_from or began, 0
        return self._count(Taken(decision, sent, ended))

    def check_update(self, step: int, time_unix_nano: int, row: list[float]) -> Decision:
        """What is to become of the update of ``step``; waits, within the deadline."""
        client = self._client
        assert client is not None
        began = perf_counter_ns()
        decision = client.check(step, time_unix_nano, row, self._waited_ns)
        self.spent_ns += perf_counter_ns() - began
        return decision

    def _count(self, taken: Taken) -> Taken:
        reason = taken.decision.reason
        if reason in FAILED_OPEN:
            self.unjudged += 1
        elif reason != NOT_ASKED:
            self.unjudged = 0
        return taken
