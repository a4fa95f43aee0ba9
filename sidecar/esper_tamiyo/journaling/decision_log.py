"""The decision log: turns the engine's notifications into journal entries.

While a decision is worked out the log only keeps what it is given. Entries, field
reports and counts are made of it afterwards, when no trainer waits.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

from esper_otel.leyline.decisions import (
    RESTORE,
    SKIP_STEP,
    UNJUDGED,
    Action,
    Decision,
    Finding,
    Proposal,
)
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.wire import Hello
from esper_tamiyo.journaling.entries import (
    AnyEntry,
    Changed,
    Decided,
    Ended,
    Found,
    Proposed,
    RuleSilence,
    Silenced,
    StateRestored,
)
from esper_tamiyo.journaling.field_reports import DueReport, FieldReports
from esper_tamiyo.judging.observer import RuleChange, RuleState
from esper_tamiyo.judging.silences import SilenceOrder

log = logging.getLogger("tamiyo")

MAX_COUNT = (1 << 63) - 1
"""A sum stays here: no message can carry more."""

MAX_QUEUED = 16_384
"""Things kept until there is time for them; beyond it they are dropped, and counted."""

MAX_RANKS = 4096
MAX_RULES = 256
"""Rules, of a rank and of each of its seeds, whose beginning is remembered."""

RuleOf = tuple[str, str | None]
"""A rule, and the seed it is about."""

CHECKED = ("unchanged", "smaller", "skipped", "unjudged")
"""What is decided of an update before it is made."""

HELD = frozenset({RuleState.PENDING, RuleState.FIRING, RuleState.RECOVERING})


class _DecisionMade(NamedTuple):
    decision: Decision
    frame: StepFrame
    asked: bool
    proposal: Proposal | None
    time_unix_nano: int
    took_ns: int
    update: bool = False


_Heard = StepFrame | _DecisionMade | RuleChange | RuleSilence | StateRestored


class _Rank:
    """What is known of one rank besides what the engine knows."""

    __slots__ = (
        "decisions",
        "instance",
        "mode",
        "moved",
        "newest",
        "noticed",
        "rules",
        "silenced",
        "steps",
    )

    def __init__(self) -> None:
        self.steps = 0
        self.decisions = 0
        """Those that are not CONTINUE."""
        self.mode = ""
        self.instance = ""
        self.newest = -1
        self.noticed: tuple[int, list[RuleOf]] = (-1, [])
        """The step of the last notice, and its rules."""
        self.rules: dict[RuleOf, tuple[int | None, int | None]] = {}
        """Rules that hold: since when pending, since when firing."""
        self.silenced: dict[RuleOf, str] = {}
        self.moved: set[RuleOf] = set()
        """Rules that changed since the last step: the engine tells of them before the step."""

    def start_over(self, instance: str) -> None:
        """Another process took the rank over, and its first step has just been told."""
        self.instance = instance
        self.steps = self.decisions = 0
        self.noticed = (-1, [])
        moved = self.moved
        self.rules = {rule: when for rule, when in self.rules.items() if rule in moved}
        self.silenced = {rule: by for rule, by in self.silenced.items() if rule in moved}


class DecisionLog:
    """An :class:`~esper_tamiyo.judging.observer.EngineObserver` that writes down what it sees.

    Of ``trace_every`` CONTINUE decisions one is written as well, for its span (0: none).
    """

    def __init__(self, trace_every: int = 0) -> None:
        self._asked = False
        self._proposal: Proposal | None = None
        self._seen_at = 0
        self._trace_every = trace_every
        self.decisions: Counter[tuple[str, str, str]] = Counter()
        """Decisions by (action, severity, reason)."""
        self.checks: Counter[str] = Counter(dict.fromkeys(CHECKED, 0))
        """Updates that were checked before they were made, by what was decided."""
        self.ends: Counter[str] = Counter(dict.fromkeys(HowEnded, 0))
        """Ranks that said that their run has ended, by how."""
        self.missed = 0
        """Steps that lie between two that were seen, and were not seen in their turn."""
        self.dropped = 0
        """Things heard for which there was no room, or of which no entry could be made."""
        self._queue: deque[_Heard] = deque()
        self._ranks: OrderedDict[tuple[str, int], _Rank] = OrderedDict()
        self._reports = FieldReports()

    # On the way to an answer: only kept.

    def set_context(
        self, seen_at: int, *, asked: bool, proposal: Proposal | None = None
    ) -> None:
        """What follows is about a frame seen at a mark of ``perf_counter_ns``.

        ``asked`` says whether a trainer waits, ``proposal`` what it proposed.
        """
        self._seen_at = seen_at
        self._asked = asked
        self._proposal = proposal

    def on_rule_change(self, change: RuleChange) -> None:
        """A rule's state changed."""
        self._enqueue(change)

    def on_frame(self, frame: StepFrame, decision: Decision) -> None:
        """A frame was judged."""
        self._enqueue(frame)

    def on_end(self, frame: StepFrame) -> None:
        """A rank said that its run has ended."""
        if frame.ended is not None:
            self.ends[frame.ended.how] += 1
            self._enqueue(frame)

    def on_decision(self, decision: Decision, frame: StepFrame) -> None:
        """A decision became the newest of its rank."""
        self.decisions[(decision.action, decision.severity, decision.reason)] += 1
        every = self._trace_every
        is_told = decision.findings or decision.action is not Action.CONTINUE
        if not is_told and not (every and decision.step % every == 0):
            return
        took = time.perf_counter_ns() - self._seen_at
        made = _DecisionMade(decision, frame, self._asked, self._proposal, time.time_ns(), took)
        self._enqueue(made)

    def on_check(self, decision: Decision, known: StepFrame, seen_at: int) -> None:
        """An update was checked before it was made; ``known`` is what was known of its step."""
        self.checks[_became(decision)] += 1
        if decision.action is not Action.CONTINUE:
            took = time.perf_counter_ns() - seen_at
            self._enqueue(
                _DecisionMade(decision, known, True, None, time.time_ns(), took, update=True)
            )

    def on_hello(self, hello: Hello) -> None:
        """A trainer has introduced itself, and said what it does with decisions."""
        self._rank((hello.run, hello.rank)).mode = hello.mode

    def on_silence(self, order: SilenceOrder, uid: int) -> None:
        """The user ``uid`` has silenced a rule for a run, or ended that."""
        entry = RuleSilence(time_unix_nano=time.time_ns(), uid=uid, **order._asdict())
        self._enqueue(entry)

    def on_restored(self, restored: StateRestored) -> None:
        """This sidecar began with what the one before it knew."""
        self._enqueue(restored)

    # Afterwards, when there is time.

    @property
    def waiting(self) -> int:
        """Things heard that no entry has been made of yet."""
        return len(self._queue)

    @property
    def reports_pending(self) -> int:
        """Decisions whose outcome report is due."""
        return self._reports.pending

    def make_entries(self, limit: int, now_s: float) -> list[AnyEntry | DueReport]:
        """The entries made of the ``limit`` things that were heard first."""
        entries: list[AnyEntry | DueReport] = []
        heard = self._queue
        for _ in range(min(limit, len(heard))):
            thing = heard.popleft()
            try:
                entries += self._entries_of(thing, now_s)
            except Exception:
                if not self.dropped:  # one is enough to find out why
                    log.exception("cannot record %.200r", thing)
                self.dropped += 1
        return entries

    def _entries_of(self, thing: _Heard, now_s: float) -> list[AnyEntry | DueReport]:
        if isinstance(thing, StepFrame):
            if thing.ended is None:
                self._count_step(thing)
                return [*self._reports.add_frame(thing, now_s)]
            ended = self._end(thing, thing.ended)
            return [ended, *self._reports.end_rank(thing.run, thing.rank)]
        if isinstance(thing, RuleChange):
            return [self._change(thing)]
        if isinstance(thing, RuleSilence | StateRestored):
            return [thing]
        return [] if self._goes_on(thing) else [self._decision(thing)]

    def expire(self, now_s: float) -> list[AnyEntry | DueReport]:
        """Reports about runs that have ended, as far as silence can tell."""
        return list(self._reports.expire(now_s))

    def close(self) -> list[AnyEntry | DueReport]:
        """Everything that is left to say, when nothing more will be heard."""
        entries = self.make_entries(len(self._queue), 0.0)
        return [*entries, *self._reports.close()]

    def _enqueue(self, thing: _Heard) -> None:
        if len(self._queue) < MAX_QUEUED:
            self._queue.append(thing)
        else:
            self.dropped += 1

    def _rank(self, key: tuple[str, int]) -> _Rank:
        rank = self._ranks.get(key)
        if rank is None:
            rank = self._ranks[key] = _Rank()
            if len(self._ranks) > MAX_RANKS:
                self._ranks.popitem(last=False)
        else:
            self._ranks.move_to_end(key)
        return rank

    def _count_step(self, frame: StepFrame) -> None:
        rank, step = self._rank((frame.run, frame.rank)), frame.step
        if rank.instance != frame.instance:
            rank.start_over(frame.instance)
        elif 0 <= rank.newest < step - 1:
            self.missed = min(self.missed + step - rank.newest - 1, MAX_COUNT)
        rank.newest = step
        rank.steps += 1
        if rank.moved:
            rank.moved.clear()

    def _goes_on(self, made: _DecisionMade) -> bool:
        """Whether it is the notice of the step before once more, which is written once."""
        decision, frame = made.decision, made.frame
        if made.update or decision.action is not Action.CONTINUE or not frame.values:
            return False
        rank = self._rank((frame.run, frame.rank))
        rules = [(finding.rule, finding.seed_id) for finding in decision.findings]
        before, rank.noticed = rank.noticed, (decision.step, rules)
        return bool(rules) and before == (decision.step - 1, rules)

    def _decision(self, made: _DecisionMade) -> Decided:
        decision, frame = made.decision, made.frame
        rank = self._rank((frame.run, frame.rank))
        rank.decisions += decision.action is not Action.CONTINUE
        if made.update:
            self._reports.add_check(decision, frame, rank.mode)
        else:
            self._reports.add_decision(decision, frame, rank.mode)
        proposal = made.proposal
        return Decided(
            time_unix_nano=frame.time_unix_nano,
            id=decision.id,
            run=decision.run,
            rank=frame.rank,
            instance=frame.instance,
            step=decision.step,
            observed_step=decision.observed_step,
            action=decision.action,
            severity=decision.severity,
            reason=decision.reason,
            target_seed=decision.target_seed,
            seed_operation=decision.seed_operation,
            parameters=decision.parameters,
            conservative=decision.conservative,
            table_version=decision.table_version,
            mode=rank.mode,
            asked=made.asked and bool(frame.values),  # nobody asks about a silence
            decided_unix_nano=made.time_unix_nano,
            took_ms=made.took_ns / 1e6,
            proposal=None
            if proposal is None
            else Proposed(proposal.seed_id, proposal.operation),
            findings=[_found(finding, rank) for finding in decision.findings],
            silenced=[Silenced(rule, by, seed) for (rule, seed), by in rank.silenced.items()],
            update=made.update,
        )

    def _end(self, frame: StepFrame, ended: RunEnd) -> Ended:
        rank = self._rank((frame.run, frame.rank))
        return Ended(
            time_unix_nano=frame.time_unix_nano,
            run=frame.run,
            rank=frame.rank,
            instance=frame.instance,
            step=frame.step,
            how=ended.how,
            exception=ended.exception,
            steps=rank.steps,
            decisions=rank.decisions,
        )

    def _change(self, change: RuleChange) -> Changed:
        rank = self._rank((change.run, change.rank))
        whose = (change.rule, change.seed_id)
        rank.moved.add(whose)
        if change.after in HELD:
            pending, firing = rank.rules.get(whose, (None, None))
            if pending is None or change.before not in HELD:
                pending, firing = change.step, None
            if change.after is RuleState.PENDING:
                firing = None
            elif change.after is RuleState.FIRING and firing is None:
                firing = change.step
            rank.rules[whose] = (pending, firing)
            if len(rank.rules) > MAX_RULES:  # of seeds that are gone
                del rank.rules[next(iter(rank.rules))]
        elif change.after is RuleState.INACTIVE:
            rank.rules.pop(whose, None)
        if change.silenced_by:
            rank.silenced[whose] = change.silenced_by
        else:
            rank.silenced.pop(whose, None)
        return Changed(
            time_unix_nano=change.time_unix_nano,
            run=change.run,
            rank=change.rank,
            step=change.step,
            rule=change.rule,
            severity=change.severity,
            seed_id=change.seed_id,
            before=change.before,
            after=change.after,
            since_step=change.since_step,
            values=change.values,
            silenced_by=change.silenced_by,
        )


def _became(decision: Decision) -> str:
    """Which of :data:`CHECKED` it is."""
    if decision.reason in UNJUDGED:
        return "unjudged"
    if SKIP_STEP in decision.parameters or RESTORE in decision.parameters:
        return "skipped"
    return "smaller" if decision.parameters else "unchanged"


def _found(finding: Finding, rank: _Rank) -> Found:
    pending, firing = rank.rules.get((finding.rule, finding.seed_id), (None, None))
    return Found(
        rule=finding.rule,
        action=finding.action,
        severity=finding.severity,
        text=finding.text,
        values=finding.values,
        seed_id=finding.seed_id,
        pending_since=pending,
        firing_since=firing,
    )
