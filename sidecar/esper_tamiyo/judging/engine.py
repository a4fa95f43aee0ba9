"""The engine: step records in, one decision per step out.

It does no I/O and reads no clock, so a replayed stream gives the same decisions. A frame
may come twice, in an ask and in the stream; whichever copy is first is judged. Findings
follow from frames alone; what is proposed only changes how findings become a decision.
That is why a sidecar that hears asks and one that reads the stream agree.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from esper_otel.leyline.decisions import (
    PROTOCOL_ERROR,
    SUPERSEDED,
    Decision,
    Finding,
    Proposal,
    unanswered,
)
from esper_otel.leyline.frames import (
    MAX_NAME,
    MAX_SEEDS_PER_FRAME,
    MAX_STEP,
    MAX_TIME_UNIX_NANO,
    StepFrame,
)
from esper_otel.leyline.metrics import STEP_KEYS, STEP_SLOT
from esper_otel.leyline.wire import Ask, SilenceRequest
from esper_tamiyo.judging.admission import RefusalReason, fault_of
from esper_tamiyo.judging.deciding import decide, decide_update
from esper_tamiyo.judging.liveness import Key, RankCensus
from esper_tamiyo.judging.observer import EngineObserver, Observed
from esper_tamiyo.judging.roster import STATE_BYTES, Roster
from esper_tamiyo.judging.rule_status import RuleTransition
from esper_tamiyo.judging.rulebook import ReloadReport, Rulebook, difference, earlier_places
from esper_tamiyo.judging.run_state import RunState
from esper_tamiyo.judging.silences import SilenceOrder
from esper_tamiyo.judging.update_guards import UpdateGuards
from esper_tamiyo.language.table import Table

log = logging.getLogger("tamiyo")

_PHASE = STEP_SLOT["phase"]

SWITCHED_AT_ONCE = 8
"""Ranks that go over to another table in one tick, when they send nothing themselves."""


class Engine:
    """Judges frames of many runs by one table, in bounded memory: as many ranks, seeds and
    steps as :mod:`~esper_tamiyo.judging.roster` has room for."""

    def __init__(
        self,
        table: Table,
        state_bytes: int = STATE_BYTES,
        observer: EngineObserver | None = None,
    ) -> None:
        """``observer`` is told of every change and decision; it cannot disturb them."""
        self._book = Rulebook(table)
        self._observed = Observed(observer)
        self.roster = Roster(self._book, state_bytes)
        self._runs = self.roster.ranks
        self._silences = self.roster.silences
        self._refused = Counter({reason.value: 0 for reason in RefusalReason})
        self._counts = dict.fromkeys(("judged", "duplicate", "late", "superseded", "bad"), 0)

    @property
    def table(self) -> Table:
        """The table it judges by."""
        return self._book.table

    def observe(
        self,
        frame: StepFrame,
        proposal: Proposal | None = None,
        at_ns: int | None = None,
        *,
        asked: bool = False,
    ) -> Decision:
        """Judge ``frame`` unless it was seen before, and decide. Never raises.

        One that cannot be judged, or whose process a newer one has replaced, is counted and
        gets the CONTINUE that says nobody judged. ``at_ns`` is when it was heard, by the clock
        of :meth:`tick`; its own time unless given. ``asked``: by a process that was introduced.
        """
        try:
            heard_ns = frame.time_unix_nano if at_ns is None else at_ns
            if not asked and proposal is None:
                decision = self._go_on(frame, heard_ns)
                if decision is not None:
                    return decision
            fault = fault_of(frame, proposal)
            if fault is not None:
                return self.refuse(frame.run, frame.step, fault)
            return self._observe(frame, proposal, heard_ns, asked=asked)
        except Exception:
            self._count_failure(frame)
            return unanswered(frame.run, frame.step, PROTOCOL_ERROR)

    def decide_fast(self, key: Key, instance: str, ask: Ask) -> Decision | None:
        """The decision that :meth:`observe` would give, where no rule can fire; else None.

        ``ask.values`` must be in registry order. None also when anything else is out of the
        ordinary. Once the answer is on its way the frame has to be given to :meth:`commit`.
        """
        state = self._runs.get(key)
        step = ask.step
        if (
            state is None
            or state.book is not self._book
            or state.acting
            or state.conservative
            or state.instance != instance
            or not state.newest < step <= MAX_STEP
            or not 0 <= ask.time_unix_nano <= MAX_TIME_UNIX_NANO
            or len(ask.values) != len(STEP_KEYS)
            or (ask.seeds and (self._book.judges_seeds or len(ask.seeds) > MAX_SEEDS_PER_FRAME))
            or (ask.proposal is not None and len(ask.proposal.seed_id) > MAX_NAME)
            or (ask.custom and not state.guards.custom.isdisjoint(ask.custom))
        ):
            return None
        warm_up, phase = state.warm_up, ask.values[_PHASE]
        if phase != warm_up.phase and (phase == phase or warm_up.phase):
            return None  # another phase begins
        if state.stretch.behind:
            state.stretch.catch_up(state)
        ask.values[STEP_SLOT["step"]] = step  # two places say it, and frames follow this one
        if state.guards.crossed(ask.values):
            return None
        return decide(
            *(key, step, step, [], ask.proposal),
            conservative=False,
            table_version=self._book.table.version,
            warming_up=warm_up.steps < self._book.warm_after,
        )

    def commit(self, frame: StepFrame, decision: Decision, at_ns: int | None = None) -> None:
        """Remember a frame that :meth:`decide_fast` has decided about. Never raises."""
        try:
            key = (frame.run, frame.rank)
            state = self._runs[key]
            self._runs.move_to_end(key)
            if state.book is not self._book:
                self._catch_up(state, key)
            self._judge(state, key, frame, frame.time_unix_nano if at_ns is None else at_ns)
            self._conclude(state, frame, decision, is_new=True)
        except Exception:
            self._count_failure(frame)

    def check(self, frame: StepFrame) -> Decision:
        """Decide about an update that is not made yet; ``frame`` is what is known of its step.

        Nothing is remembered of it: the step itself is judged by :meth:`observe`, after the
        update. A rank on the way to another table is still judged by the one before. Where
        nobody can judge, as the rank is not known, another process's or further on already,
        it is the CONTINUE that says so. Never raises.
        """
        run, step, key = frame.run, frame.step, (frame.run, frame.rank)
        try:
            fault = fault_of(frame)
            if fault is not None:
                return self.refuse(run, step, fault)
            state = self._runs.get(key)
            if (
                state is None
                or step <= state.newest
                or (frame.instance and state.instance not in ("", frame.instance))
            ):
                return unanswered(run, step, PROTOCOL_ERROR)
            return decide_update(
                *(key, step, state.newest, state.would_fire(step, frame.values)),
                conservative=state.conservative,
                table_version=state.book.table.version,
            )
        except Exception:
            self._count_failure(frame)
            return unanswered(run, step, PROTOCOL_ERROR)

    def update_guards(self, key: Key, instance: str) -> UpdateGuards | None:
        """The bounds that no update of a rank may cross unchecked; None when it is not known,
        or another process's."""
        state = self._runs.get(key)
        if state is None or state.instance != instance:
            return None
        state.stretch.catch_up(state)
        return state.update_guards

    def tick(self, now_ns: int) -> None:
        """Note the ranks that have sent nothing for too long at ``now_ns``.

        By the clock of ``at_ns`` of :meth:`observe`. To be called about once a second; never
        raises. A replay need not: the frame that ends a silence finds it.
        """
        any(self.tick_in_parts(now_ns, len(self._runs) + 1))

    def tick_in_parts(self, now_ns: int, ranks_at_once: int) -> Iterator[None]:
        """The same, with a stop after so many ranks each: an ask may come between."""
        try:
            yield from self.roster.trim_in_parts(ranks_at_once)
            behind = SWITCHED_AT_ONCE
            for part in self._runs.in_parts(ranks_at_once):
                for key, state in part:
                    if state.book is not self._book:
                        behind -= 1
                        if behind < 0:
                            continue
                        self._catch_up(state, key)
                    self._find_silence(state, key, now_ns - state.pace.heard_ns)
                yield
        except Exception:
            log.exception("could not check for stale ranks")

    def reload(self, table: Table) -> ReloadReport:
        """Judge by ``table`` from the next frame on.

        Rules that are the same keep their state, and baselines that are still watched their
        window. Each rank goes over at its next frame, or within a few ticks.
        """
        before = self._book.table
        self._book = Rulebook(table)
        self.roster.use_table(self._book)
        return difference(before, table)

    def silence(self, request: SilenceRequest) -> SilenceOrder:
        """Silence a rule for a run, or end that, from each rank's next step on.

        Raises :class:`~esper_tamiyo.judging.silences.SilenceError`.
        """
        ids = [rule.id for rule in self.table.rules]
        return self._silences.order(request, self.roster.newest_steps(), ids)

    def refuse(self, run: str, step: int, reason: RefusalReason) -> Decision:
        """Count what is beyond a limit; the decision that says that nobody judged it."""
        self._refused[reason.value] += 1
        self.note_bad_frame()
        return unanswered(run[:MAX_NAME], step, PROTOCOL_ERROR)

    def note_bad_frame(self) -> None:
        """Count a frame that could not even be read."""
        self._counts["bad"] += 1

    def _count_failure(self, frame: StepFrame) -> None:
        self.note_bad_frame()
        log.exception("could not evaluate step %s of run %.80r", frame.step, frame.run)

    def latest(self, run: str = "", rank: int = 0) -> Decision | None:
        """The newest decision of that rank; an empty ``run`` means the run heard of last."""
        if not run and self._runs:
            run = next(reversed(self._runs))[0]
        state = self._runs.get((run, rank))
        return state.decision if state else None

    def overview(self, now_ns: int | None = None) -> dict[str, Any]:
        """Counts of what it has seen, and some ranks, as plain data: with ``now_ns``, by the
        clock of :meth:`tick`, each of them with its ``RankState``."""
        *_, whole = self.overview_in_parts(now_ns, len(self._runs) + 1)
        return whole or {}

    def overview_in_parts(
        self, now_ns: int | None, ranks_at_once: int
    ) -> Iterator[dict[str, Any] | None]:
        """The overview last, and None after so many ranks each, of which one with many seeds
        counts as several: an ask may come between."""
        census = RankCensus(now_ns)
        for part in self._runs.in_parts(ranks_at_once):
            yield from census.count_in_parts(part, ranks_at_once)
        newest = self.roster.newest_steps() if self._silences.used else {}
        yield {
            "frames": {**self._counts, "runs_forgotten": self.roster.forgotten},
            "refused": dict(self._refused),
            **self.roster.overview(),
            "witness_failed": self._observed.failed,
            "silences": self._silences.overview(newest),
            **census.result(),
        }

    def _observe(
        self, frame: StepFrame, proposal: Proposal | None, at_ns: int, *, asked: bool
    ) -> Decision:
        key = (frame.run, frame.rank)
        state = self._runs.get(key)
        if frame.ended is not None:
            return self.roster.endings.hear(frame, self._runs, self._silences, self._observed)
        if state is None or (frame.instance and state.instance != frame.instance):
            admitted = self.roster.admit(frame, self._book, at_ns, asked=asked)
            if admitted is None:
                self._counts["superseded"] += 1
                return unanswered(frame.run, frame.step, SUPERSEDED)
            if isinstance(admitted, RefusalReason):
                return self.refuse(frame.run, frame.step, admitted)
            state = admitted
            self.roster.endings.begin(frame, self._runs, self._silences, self._observed)
        is_new = frame.step > state.newest
        if is_new:
            fault = self.roster.fault_of_next(state, frame, at_ns, asked=asked)
            if fault is not None:
                return self.refuse(frame.run, frame.step, fault)
        self._runs.move_to_end(key)
        if state.book is not self._book:
            self._catch_up(state, key)
        if is_new:
            self._judge(state, key, frame, at_ns)
            if not asked:
                state.stretch.start(state, frame)
        elif state.was_seen(frame.step):
            self._counts["duplicate"] += 1
        else:
            self._counts["late"] += 1
            if asked:
                return unanswered(frame.run, frame.step, PROTOCOL_ERROR)
        decision = decide(
            *(key, frame.step, state.newest, state.fired, proposal),
            conservative=state.conservative,
            table_version=self._book.table.version,
            warming_up=state.warm_up.under_way,
        )
        # The stream's copy of a step that was asked about must not hide what was answered.
        if is_new or (proposal is not None and frame.step == state.newest):
            self._conclude(state, frame, decision, is_new=is_new)
        return decision

    def _go_on(self, frame: StepFrame, at_ns: int) -> Decision | None:
        """The decision about a frame that changes nothing but what is remembered; else None."""
        key = (frame.run, frame.rank)
        state = self._runs.get(key)
        if state is None or state.book is not self._book or frame.ended is not None:
            return None
        if (transitions := state.stretch.carry_on(state, frame, at_ns)) is None:
            return None
        self._runs.move_to_end(key)
        self._counts["judged"] += 1
        if transitions:
            self._notify(key, frame.step, frame.time_unix_nano, transitions)
        version, step = self._book.table.version, frame.step
        decision = decide(key, step, step, [], None, conservative=False, table_version=version)
        self._conclude(state, frame, decision, is_new=True)
        return decision

    def _catch_up(self, state: RunState, key: Key) -> None:
        """Have ``state`` go over to the table that is in use."""
        places = earlier_places(state.book.table, self._book.table)
        lost = state.switch_table(self._book, places)
        self._notify(key, state.newest, state.time_unix_nano, lost)

    def _judge(self, state: RunState, key: Key, frame: StepFrame, at_ns: int) -> None:
        self._counts["judged"] += 1
        self._find_silence(state, key, state.pace.since_newest(frame.time_unix_nano))
        seeds = len(state.seeds)
        transitions = state.judge(frame, at_ns)
        self.roster.seeds += len(state.seeds) - seeds
        if transitions:
            self._notify(key, frame.step, frame.time_unix_nano, transitions)

    def _conclude(
        self, state: RunState, frame: StepFrame, decision: Decision, *, is_new: bool
    ) -> None:
        state.decision = decision
        self._observed.tell_decision(frame, decision, is_new=is_new)

    def _notify(
        self, key: Key, step: int, time_ns: int, transitions: list[RuleTransition]
    ) -> None:
        self._observed.tell_changes(
            transition.as_change(*key, step, time_ns) for transition in transitions
        )

    def _find_silence(self, state: RunState, key: Key, silent_ns: int) -> None:
        """Let the rules on silence fire whose patience ended within ``silent_ns``."""
        for place, entry in self._book.silence:
            ended = state.pace.silent_since(silent_ns, self._book.patience[place])
            transition = None if ended is None else state.fall_silent(place, entry)
            if ended is None or transition is None:
                continue
            silent_s = (ended - state.time_unix_nano) / 1e9
            seen = {"step": float(state.newest), "silent(s)": silent_s}
            self._notify(key, state.newest, ended, [transition._replace(values=seen)])
            rule = entry.rule
            if rule.id in state.silences.at(state.newest):
                continue
            finding = Finding(rule.id, rule.action, rule.severity, rule.text, seen)
            decision = decide(
                *(key, state.newest, state.newest, [(entry, finding)], None),
                conservative=state.conservative,
                table_version=self._book.table.version,
                warming_up=state.warm_up.under_way,
            )
            empty = StepFrame(key[0], state.instance, key[1], state.newest, ended, {})
            self._conclude(state, empty, decision, is_new=False)
