"""Everything Tamiyo remembers of one rank of one run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from esper_otel.leyline.decisions import Action, Decision
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.deciding import Fired
from esper_tamiyo.judging.guards import AskGuards
from esper_tamiyo.judging.history import History, WarmUp
from esper_tamiyo.judging.liveness import StepPace
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.judging.peers import PeerBoard, PeerComparison
from esper_tamiyo.judging.rule_status import (
    RuleStatus,
    RuleTarget,
    RuleTransition,
    bring_up,
    usual,
    would_hold,
)
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.judging.rules import CompiledRule, Values, Verdict
from esper_tamiyo.judging.silences import SILENCED, SilencedRules, unheard
from esper_tamiyo.judging.stretches import Stretch
from esper_tamiyo.judging.update_guards import UpdateGuards

MAX_GAPS = 64
"""Stretches of missing steps remembered, to tell a late frame from a second copy."""

_UNKNOWN, _INACTIVE, _FIRING = RuleState.UNKNOWN, RuleState.INACTIVE, RuleState.FIRING


class RunState:
    """The past, the rules' memory and the newest findings of one (run, rank, instance)."""

    __slots__ = (
        *("_active", "_comparison", "_gaps", "_live", "_rank", "_seeds", "_silenced"),
        *("_transitions", "_undecided", "_unrest", "acting", "book", "clean_steps"),
        *("conservative", "decision", "fired", "first", "first_ns", "guards", "instance"),
        *("newest", "pace", "silences", "stretch", "update_guards", "warm_up"),
    )

    def __init__(
        self,
        instance: str,
        book: Rulebook,
        board: PeerBoard,
        rank: int,
        silences: SilencedRules,
    ) -> None:
        self.instance = instance
        self.newest = -1
        self.first = -1
        self.first_ns = 0
        self.warm_up = WarmUp()
        self.pace = StepPace()
        self.conservative = False
        self.clean_steps = 0
        self.acting = False
        """Whether a rule has fired and was not released: then no step is a plain one."""
        self.fired: list[Fired] = []
        self.decision: Decision | None = None
        self.book = book
        self.silences = silences
        self._gaps: deque[tuple[int, int]] = deque(maxlen=MAX_GAPS)
        self._rank = RuleTarget(None, len(book.rules), History(book.step_watch))
        self._comparison = PeerComparison(board, rank, book.rank_watch)
        self._seeds: dict[str, RuleTarget] = {}
        self._live: list[RuleTarget] = []
        self.guards = AskGuards(book.guard_plan, self._rank.history)
        self._guard_updates(0)
        self._active: list[tuple[CompiledRule, RuleStatus, RuleTarget]] = []
        self._transitions: list[RuleTransition] = []
        self._undecided = False
        self._unrest: list[dict[str, str | int]] | None = None
        self.stretch = Stretch()

    @property
    def time_unix_nano(self) -> int:
        """When the newest step ended, 0 before the first."""
        return self.pace.last_ns

    @property
    def seeds(self) -> Mapping[str, RuleTarget]:
        """Those whose past is kept."""
        return self._seeds

    def was_seen(self, step: int) -> bool:
        """Whether a step that is not newer than the newest was judged before."""
        if step < self.first:
            return False
        for start, end in reversed(self._gaps):
            if step > end:
                return True
            if step >= start:
                return False
        return True

    def judge(self, frame: StepFrame, at_ns: int) -> list[RuleTransition]:
        """Hold a frame newer than all before it against the rules, then remember it."""
        self.stretch.stop()
        in_company = self._observe(frame, at_ns)
        self._transition(in_company)
        self._act()
        self._remember(frame)
        if self._transitions:
            self._unrest = None
        return self._transitions

    def compare(self, frame: StepFrame) -> list[RuleTransition]:
        """What comparing ranks in hindsight brings, of a frame that changes no other rule."""
        self._transitions = []
        comparison = self._comparison
        comparison.record(frame, self.book.rank_keys)
        if comparison.has_company:
            self._look_back(frame.time_unix_nano)
            if self._transitions:
                self._unrest = None
        return self._transitions

    def renew_guards(self) -> None:
        """Have the guards be those behind the newest step."""
        if self._live:  # the next step has seeds as well, and is not decided fast
            self.guards.mark_stale()
        else:
            self.guards.move_bounds()

    def would_fire(self, step: int, values: Values) -> list[Fired]:
        """The rules that would fire and act on the update of ``step``, if it were as ``values``
        say; changes nothing.

        Only what the update itself breaks counts: a rule that fired, and is on its way back,
        acts on the steps until then and not on an update that is within all bounds.
        """
        self.stretch.catch_up(self)
        rank = self._rank
        history, statuses = rank.history, rank.statuses
        silenced = self.silences.at(step)
        inhibited = {*silenced}
        for place, entry in self.book.updates.inhibiting:
            if entry.rule.id not in silenced and would_hold(
                place, entry, values, rank, self._live
            ):
                inhibited.update(entry.rule.inhibits)
        fired = []
        for place, entry in self.book.updates.acting:
            status, rule = statuses[place], entry.rule
            if rule.id in inhibited or step - status.fired_at <= rule.cooldown:
                continue
            if status.peek(entry, entry.test(values, history), None) is _FIRING:
                fired.append((entry, entry.finding(values, history, None)))
        return fired

    def fall_silent(self, place: int, entry: CompiledRule) -> RuleTransition | None:
        """The rule on silence fires; None when it does already."""
        status = self._rank.statuses[place]
        if status.state is _FIRING:
            return None
        self.stretch.close(self)
        transition = RuleTransition(entry, None, status.state, _FIRING, status.since, {}, "")
        status.enter(_FIRING, self.newest)
        self._unrest = None
        return transition

    def switch_table(self, book: Rulebook, places: list[int | None]) -> list[RuleTransition]:
        """Go on under another table.

        ``places`` says for each of its rules where the same rule was before, None for what
        is new. What is gone while it was pending or fired is told as having become unknown.
        """
        self.stretch.close(self)
        kept = {place for place in places if place is not None}
        if not book.warmed_by <= self.book.warmed_by:
            self.warm_up.steps = 0
        lost = [
            transition
            for target in (self._rank, *self._live)
            for transition in target.lost(self.book.rules, kept)
        ]
        self.book = book
        self._unrest = None
        before = self._rank.history
        self._rank.rearrange(places, History(book.step_watch, before=before))
        self._comparison.switch_table(book.rank_watch)
        for seed in self._seeds.values():
            past = History(book.seed_watch, self._rank.history, before=seed.history)
            seed.rearrange(places, past)
        if not book.judges_seeds:
            self._live = []
        self.guards = AskGuards(book.guard_plan, self._rank.history)
        self._guard_updates(self.newest)
        return lost

    def rules(self) -> list[dict[str, str | int]]:
        """The rules that are pending or have fired, as plain data.

        Looked for once after a change: a report asks every rank, and an ask may wait.
        """
        if self._unrest is None:
            self._unrest = [
                told
                for target in (self._rank, *self._live)
                for told in target.unrest(self.book.rules)
            ]
        return self._unrest

    def _observe(self, frame: StepFrame, at_ns: int) -> bool:
        """Take in what a frame says, to be judged; whether there are other ranks."""
        self._begin_step(frame, at_ns)
        rank, book = self._rank, self.book
        rank.values = frame.values
        phase = frame.values.get("phase", 0.0)
        self.warm_up.begin_step(rank.history, phase, book.warm_after)
        ended_ns = frame.time_unix_nano
        in_company = bool(book.ranks) and self._comparison.in_company(ended_ns, rank.history)
        if book.judges_seeds and (frame.seeds or self._live):
            self._see_seeds(frame)
        return in_company

    def _transition(self, in_company: bool) -> None:
        """Bring every rule from one state to the next."""
        rank, book = self._rank, self.book
        values, history, statuses = rank.values, rank.history, rank.statuses
        for place, entry, test, plain, about_seeds in book.judged:
            if plain or not (in_company or about_seeds):
                verdict = test(values, history)
                status = statuses[place]
                if verdict is not status.idle:
                    self._judge_rule(entry, status, rank, verdict)
            elif about_seeds:
                for seed in self._live:
                    verdict = test(seed.values, seed.history)
                    status = seed.statuses[place]
                    if verdict is not status.idle:
                        self._judge_rule(entry, status, seed, verdict)
            else:
                self._include(entry, statuses[place], self._comparison.target)
        for place, entry in book.silence:
            self._enter(entry, statuses[place], rank, _INACTIVE)

    def _begin_step(self, frame: StepFrame, at_ns: int) -> None:
        """First of all, so that a frame that breaks a rule is not judged twice."""
        if self.first < 0:
            self.first, self.first_ns = frame.step, frame.time_unix_nano
        elif frame.step > self.newest + 1:
            self._gaps.append((self.newest + 1, frame.step - 1))
        self.pace.heard(frame.time_unix_nano, frame.step - self.newest, at_ns)
        self.newest = frame.step
        if self.silences.used and self.silences.at(frame.step) != self._silenced:
            self._guard_updates(frame.step)
        self.fired = []
        self._active = []
        self._transitions = []
        self._undecided = False

    def _see_seeds(self, frame: StepFrame) -> None:
        """Bring up the seeds of a frame; of those that are gone nobody can say a thing."""
        seeds, book = frame.seeds, self.book
        for seed in self._live:
            if seed.seed_id not in seeds:
                for entry, status in zip(book.rules, seed.statuses, strict=True):
                    status.reset()
                    self._enter(entry, status, seed, _UNKNOWN)
        before, self._live = self._live, bring_up(self._seeds, frame, book, self._rank.history)
        if before != self._live:
            self._unrest = None

    def _guard_updates(self, step: int) -> None:
        """Which rules are silenced at ``step``, and what the rest checks updates for."""
        self._silenced = self.silences.at(step)
        plan = self.book.update_plan_without(self._silenced)
        self.update_guards = UpdateGuards(plan, self._rank.history)

    def _look_back(self, time_ns: int) -> None:
        """Compare the steps that all ranks have told by now; it counts from the next on."""
        comparison, statuses = self._comparison, self._rank.statuses
        for waiting in comparison.due(time_ns):
            comparison.compare(waiting, self.book.peer_keys, time_ns)
            target = comparison.target
            for place, entry in self.book.ranks:
                status = statuses[place]
                verdict = entry.test(target.values, target.history)
                if verdict is not status.idle:
                    self._advance_rule(entry, status, target, verdict)
                    self.acting = self.acting or status.active

    def _judge_rule(
        self, entry: CompiledRule, status: RuleStatus, target: RuleTarget, verdict: Verdict
    ) -> None:
        self._advance_rule(entry, status, target, verdict)
        self._include(entry, status, target)

    def _advance_rule(
        self, entry: CompiledRule, status: RuleStatus, target: RuleTarget, verdict: Verdict
    ) -> None:
        """One more observation of one rule."""
        kept = status.kept(entry, verdict, target.values, target.history)
        self._enter(entry, status, target, status.advance(entry, verdict, kept))
        if not status.active:
            status.silenced_by = ""

    def _include(self, entry: CompiledRule, status: RuleStatus, target: RuleTarget) -> None:
        """Have a rule that has fired, and was not released, count at this step."""
        if not status.active:
            return
        if status.state is _UNKNOWN:
            self._undecided = self._undecided or self._is_trouble(entry)
        else:
            self._active.append((entry, status, target))

    def _enter(
        self, entry: CompiledRule, status: RuleStatus, target: RuleTarget, after: RuleState
    ) -> None:
        if after is status.state:
            return
        self._add_transition(entry, status, target, after)
        status.enter(after, self.newest)

    def _add_transition(
        self, entry: CompiledRule, status: RuleStatus, target: RuleTarget, after: RuleState
    ) -> None:
        seed_id, seen = target.seed_id, entry.seen(target.values, target.history)
        self._transitions.append(
            RuleTransition(entry, seed_id, status.state, after, status.since, seen, "")
        )

    def _act(self) -> None:
        """From the rules that have fired to findings and conservative mode."""
        active = self._active
        self.acting = bool(active) or self._undecided
        is_any_unheard = self.book.inhibits or self.silences.used
        inhibited = self._inhibit() if active and is_any_unheard else {}
        clean, enters = True, False
        step = self.newest
        named: CompiledRule | None = None
        for entry, status, target in active:
            clean = clean and not self._is_trouble(entry)
            rule = entry.rule
            if rule.id in inhibited:
                if rule.action is Action.CONTINUE and inhibited[rule.id] != SILENCED:
                    status.fired_at = step  # its event is reported, and not again later
                continue
            if step - status.fired_at <= rule.cooldown:
                continue
            if entry is named:  # of several seeds the first; its cool-down gives others a turn
                continue
            named = entry
            status.fired_at = step
            enters = enters or (rule.conservative and entry.acts)
            finding = entry.finding(target.values, target.history, target.seed_id)
            self.fired.append((entry, finding))
        if enters:
            self.conservative = True
        if not clean:
            self.clean_steps = 0
        elif not self._undecided:  # a rule that fired and is unknown now is not over
            self.clean_steps += 1
        if self.clean_steps >= self.book.clean_steps:
            self.conservative = False

    def _is_trouble(self, entry: CompiledRule) -> bool:
        return entry.is_trouble and entry.rule.id not in self._silenced

    def _inhibit(self) -> dict[str, str]:
        """Inhibited rules and who inhibits them; a change of that is told as well."""
        by = unheard(self._active, self._silenced)
        told = {transition.whose for transition in self._transitions}
        inhibited = {}
        for entry, status, target in self._active:
            whose, inhibitor = (entry.rule.id, target.seed_id), by.get(entry.rule.id, "")
            if status.silenced_by != inhibitor:
                status.silenced_by = inhibitor
                if whose not in told:
                    self._add_transition(entry, status, target, status.state)
            inhibited[whose] = inhibitor
        self._transitions = [
            transition._replace(silenced_by=inhibited.get(transition.whose, ""))
            for transition in self._transitions
        ]
        return by

    def _remember(self, frame: StepFrame) -> None:
        """Make a frame part of the past, and compare what the other ranks have told by now."""
        warm_up = self.warm_up
        warm_up.steps += 1
        values = usual(frame.values, self._active, self.newest, warm_up.under_way)
        self._rank.history.absorb(values)
        for seed in self._live:
            seed.history.absorb(seed.values)
        self.renew_guards()
        if self.book.ranks:
            self._comparison.record(frame, self.book.rank_keys)
            self._look_back(frame.time_unix_nano)
