"""Restoring: which snapshot of a run is good, and whether a decision may go back to it.

About every ``every`` steps a snapshot is made, at the end of a step, when the newest decision
asked for nothing. It is *good* once the ``every`` steps after it were: their values finite, and
each answered by the sidecar with neither OPTIMIZER nor PAUSE. Until then the one before stays,
so there are two in memory; trouble, or a step that nobody judged, drops the newer one. An
optimizer that is new to the run drops both: neither has its state, so neither can be put back.

A decision with ``restore`` puts the last good one back at the end of the step under way, whose
update is left out. That is bounded: ``most`` times a run, and to the same snapshot again only
after progress, which is more good steps in a row or apart than had been lost. A newer good
snapshot is progress as well. What is refused is reported once for each reason.

All of this follows from decisions and step numbers alone where ranks agree, and from the flag
by which one of them tells the others that it had trouble: so all have the same snapshots.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns

import msgspec

from esper_otel.leyline.decisions import (
    CONSERVATIVE_MODE,
    NOMINAL,
    NOT_ASKED,
    UNJUDGED,
    WARMING_UP,
    Action,
    Decision,
    Severity,
)
from esper_otel.leyline.events import RESTORE_REFUSED, RESTORED, Event
from esper_otel.tolaria.snapshots import Protected, Snapshot, SnapshotError
from esper_otel.tolaria.updates import Optimizer

log = logging.getLogger("esper_otel")

MOST_EVENTS = 64
"""Of those that nobody has taken; the oldest go."""

MOST_TIMES = 64
"""Copies whose time is remembered. The first looks for modules, and takes longer."""


class SnapshotReport(msgspec.Struct, frozen=True):
    """What became of a run's snapshots, for its summary.

    ``bytes`` is the memory of the host that they take together, ``copy_ms`` what making one
    took of the training thread in the median. ``good_step`` is the step of the last good one,
    None without any. ``restored`` has for each time the step that was gone back to and the one
    at whose end that was, ``refused`` how often it was not done, by reason.
    """

    taken: int
    good_step: int | None
    bytes: int
    copy_ms: float
    restored: list[tuple[int, int]]
    refused: dict[str, int]


class Restoring:
    """The snapshots of one run, and what decisions make of them. Nothing here raises.

    ``every`` 0: none are made. ``several_ranks`` says whether this process is one of several
    that train together.
    """

    def __init__(
        self,
        *,
        every: int = 0,
        most: int = 3,
        several_ranks: Callable[[], bool] = bool,
    ) -> None:
        self.every = every
        self.protected = Protected()
        self.ordered = False
        """Whether weights are put back at the end of the step under way."""
        self.failed = False
        """Whether a copy could not be made since this was set to False."""
        self._most = most
        self._several_ranks = several_ranks
        self._good: Snapshot | None = None
        self._newer: Snapshot | None = None
        self._spare: Snapshot | None = None
        self._copied: Snapshot | None = None
        """The one whose copies a device may not have made yet."""
        self._good_after = 0
        """Good steps since the newer one was made."""
        self._calm = self._was_nominal = False
        self._due = 0
        self._restored_to = self._restored_at = -1
        self._good_since = 0
        """Good steps since weights were put back last."""
        self._restored: list[tuple[int, int]] = []
        self._refused: Counter[str] = Counter()
        self._taken = 0
        self._took_ns: deque[int] = deque(maxlen=MOST_TIMES)
        self.events: list[Event] = []
        """What has happened, until somebody takes it; marks are of ``perf_counter_ns``."""
        self._told: set[str] = set()

    @property
    def keeps(self) -> bool:
        """Whether snapshots are made at all."""
        return self.every > 0

    @property
    def report(self) -> SnapshotReport | None:
        """What became of them; None where none are made and none was asked for."""
        if not (self.keeps or self._refused):
            return None
        kept = [each for each in (self._good, self._newer, self._spare) if each is not None]
        return SnapshotReport(
            taken=self._taken,
            good_step=None if self._good is None else self._good.step,
            bytes=sum(each.size for each in kept),
            copy_ms=median(self._took_ns) / 1e6 if self._took_ns else 0.0,
            restored=list(self._restored),
            refused=dict(self._refused),
        )

    def update_begins(self, optimizer: Optimizer) -> None:
        """An optimizer of the loop is about to change what was copied."""
        if not self.keeps:
            return
        try:
            if self.protected.add_optimizer(optimizer):
                self._begin_anew()
            if self._copied is not None:
                self._copied.queue_wait()
                self._copied = None
        except Exception as error:
            self._report_fault("taken", error)

    def judged(self, decision: Decision, *, finite: bool) -> None:
        """A decision about a step; ``finite``: so were the step's values, on every rank."""
        step, reason = decision.step, decision.reason
        if not self.keeps or reason == NOT_ASKED or step <= self._restored_at:
            return
        self._was_nominal = self._was_nominal or reason == NOMINAL
        # A young run has nothing better to go back to; one whose sidecar begins anew waits.
        is_judged = reason not in UNJUDGED or (reason == WARMING_UP and not self._was_nominal)
        self._calm = finite and is_judged and not _is_trouble(decision)
        if not self._calm:
            self._drop_newer()
            return
        newer = self._newer
        self._good_since += 1
        if newer is not None and step > newer.step:
            self._good_after += 1
            if self._good_after >= self.every:
                self._good, self._newer, self._spare = newer, None, self._good

    def order(self, decision: Decision, *, agreed: bool) -> bool:
        """``decision`` asks to go back; whether that is done at the end of the step under way.

        ``agreed``: all ranks do what this one does. A decision about a step before the weights
        were put back has had what it asked for.
        """
        if self.ordered or decision.step <= self._restored_at:
            return self.ordered
        why = self._refusal(agreed=agreed)
        if why:
            self._refuse(decision, why)
            return False
        self.ordered = True
        return True

    def restore(self, step: int) -> bool:
        """The end of ``step``, at which weights are put back; whether they were."""
        self.ordered = False
        good = self._good
        try:
            if good is None:  # dropped since it was ordered
                raise SnapshotError("an optimizer is new to the run")
            good.copy_back(self.protected.parts())
        except Exception as error:
            self._good = None
            self._report_fault("put back", error)
            self._refused["it could not be restored"] += 1
            return False
        self._restored.append((good.step, step))
        self._restored_to, self._restored_at, self._good_since = good.step, step, 0
        self._drop_newer()
        self._due = step + self.every
        text = f"weights and optimizer state are those of step {good.step} again"
        log.warning("esper-otel: at the end of step %d %s", step, text)
        self._add(RESTORED, step, text, good.step)
        return True

    def step_ended(self, step: int) -> None:
        """The end of ``step``: make a snapshot if one is due."""
        if not self.keeps or self._newer is not None or not self._calm or step < self._due:
            return
        began = perf_counter_ns()
        self._due = step + self.every
        snapshot, self._spare = self._spare or Snapshot(), None
        try:
            parts = self.protected.parts()
            if self._good is not None and self._good.misfit(parts):
                self._good = None  # parameters were replaced, as pruning does
            snapshot.copy_from(parts, step)
        except Exception as error:
            self.failed = True
            self._report_fault("taken", error)
            return
        self._newer = self._copied = snapshot
        self._good_after = 0
        self._taken += 1
        self._took_ns.append(perf_counter_ns() - began)
        if not parts.found_modules:
            self._tell(
                "no module holds the optimizer's parameters: snapshots have no buffers, unless "
                "run.protect(model) names it"
            )

    def _begin_anew(self) -> None:
        """No copy can be put back any more: make one soon, as a young run does."""
        self._good = None
        self._drop_newer()
        self._was_nominal = False
        self._due = 0

    def _drop_newer(self) -> None:
        if self._newer is not None:
            self._newer, self._spare = None, self._newer
        self._calm = False

    def _refusal(self, *, agreed: bool) -> str:
        if not self.keeps:
            return "no snapshots are kept (ESPER_SNAPSHOT_EVERY)"
        if not agreed and self._several_ranks():
            return "the ranks of this run do not synchronise decisions"
        good = self._good
        if good is None:
            return "no snapshot is good yet"
        if len(self._restored) >= self._most:
            return f"it was done {self._most} times (ESPER_SNAPSHOT_RESTORES_MAX)"
        lost = self._restored_at - self._restored_to
        if good.step == self._restored_to and self._good_since <= lost:
            return "the run has made no progress since it was done last"
        return ""

    def _refuse(self, decision: Decision, why: str) -> None:
        self._refused[why] += 1
        if self._refused[why] == 1:
            log.warning(
                "esper-otel: decision %s requests a restore, which is refused: %s",
                decision.id,
                why,
            )
        text = f"no snapshot was restored: {why}"
        self._add(RESTORE_REFUSED, decision.step, text, None)

    def _add(self, name: str, step: int, text: str, snapshot_step: int | None) -> None:
        attributes: dict[str, str | float | int | bool] = {"esper.step": step}
        if snapshot_step is not None:
            attributes["esper.snapshot.step"] = snapshot_step
        self.events.append(Event(name, perf_counter_ns(), Severity.WARNING, text, attributes))
        del self.events[:-MOST_EVENTS]

    def _report_fault(self, what: str, error: Exception) -> None:
        self._tell(f"a snapshot could not be {what}, and training continues", f": {error!r}")

    def _tell(self, message: str, detail: str = "") -> None:
        if message not in self._told:
            self._told.add(message)
            log.warning("esper-otel: %s%s", message, detail)


def _is_trouble(decision: Decision) -> bool:
    """Whether a decision says of a step that it was not as it should be."""
    return (
        decision.action in (Action.OPTIMIZER, Action.PAUSE)
        and decision.reason != CONSERVATIVE_MODE
    )
