"""Everything Tamiyo remembers of one rank of one run."""

from __future__ import annotations

from collections import deque

from esper_otel.leyline.decisions import Decision, Finding
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.guards import GuardPlan, Guards
from esper_tamiyo.history import History, Watched
from esper_tamiyo.rules import CompiledRule, Values, Verdict

MAX_GAPS = 64
"""Stretches of missing steps remembered, to tell a late frame from a second copy."""

MAX_SEEDS = 256
"""Seeds whose past is kept once they are no longer in the frames."""

NEVER = -(1 << 62)

Fired = tuple[CompiledRule, Finding]


class RunState:
    """The past, the rules' memory and the newest findings of one (run, rank, instance)."""

    __slots__ = (
        "_fired_at",
        "_gaps",
        "_history",
        "_persisted",
        "_seed_watch",
        "_seeds",
        "clean_steps",
        "conservative",
        "decision",
        "fired",
        "first",
        "guards",
        "instance",
        "newest",
        "time_unix_nano",
    )

    def __init__(
        self,
        instance: str,
        rules: int,
        step_watch: Watched,
        seed_watch: Watched,
        guard_plan: GuardPlan,
    ) -> None:
        self.instance = instance
        self.newest = -1
        self.first = -1
        self.time_unix_nano = 0
        self.conservative = False
        self.clean_steps = 0
        self.fired: list[Fired] = []
        self.decision: Decision | None = None
        self.guards = Guards(guard_plan)
        self._gaps: deque[tuple[int, int]] = deque(maxlen=MAX_GAPS)
        self._history = History(step_watch)
        self._seed_watch = seed_watch
        self._seeds: dict[str, History] = {}
        self._persisted = [0] * rules
        self._fired_at = [NEVER] * rules

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

    def judge(
        self, frame: StepFrame, rules: tuple[CompiledRule, ...], clean_steps: int
    ) -> None:
        """Hold a frame newer than all before it against the rules, then remember it."""
        self._advance(frame)
        values = frame.values
        history = self._history
        persisted = self._persisted
        fired_at = self._fired_at
        step = frame.step
        fired: list[Fired] = []
        clean = True
        enters = False
        place = -1
        for compiled in rules:
            place += 1
            seed_id = None
            if compiled.about_seeds:
                verdict, seed_id = self._of_any_seed(compiled, frame)
            else:
                verdict = compiled.test(values, history)
            if not verdict:
                if verdict is False:
                    persisted[place] = 0
                continue
            persisted[place] += 1
            rule = compiled.rule
            if persisted[place] < rule.persistence:
                continue
            if not rule.downgrade:
                clean = False
            if step - fired_at[place] <= rule.cooldown:
                continue
            fired_at[place] = step
            enters = enters or rule.conservative
            fired.append((compiled, self._finding(compiled, frame, seed_id)))
        self.fired = fired
        self._keep_mode(clean, enters, clean_steps)
        self._absorb(frame)

    def pass_over(
        self, frame: StepFrame, rules: tuple[CompiledRule, ...], clean_steps: int
    ) -> None:
        """As :meth:`judge`, for a frame that crosses no guard and has no judged seeds.

        No rule is true of it, so rules matter only where one has held before: whether
        it is false now, or unknown, decides if it starts anew.
        """
        if any(self._persisted):
            self.judge(frame, rules, clean_steps)
            return
        self._advance(frame)
        self._keep_mode(clean=True, enters=False, clean_steps=clean_steps)
        self._absorb(frame)

    def _advance(self, frame: StepFrame) -> None:
        """First of all, so that a frame that breaks a rule is not judged twice."""
        if self.first < 0:
            self.first = frame.step
        elif frame.step > self.newest + 1:
            self._gaps.append((self.newest + 1, frame.step - 1))
        self.newest = frame.step
        self.time_unix_nano = frame.time_unix_nano
        self.fired = []

    def _keep_mode(self, clean: bool, enters: bool, clean_steps: int) -> None:
        if enters:
            self.conservative = True
        self.clean_steps = self.clean_steps + 1 if clean else 0
        if self.clean_steps >= clean_steps:
            self.conservative = False

    def _of_any_seed(
        self, compiled: CompiledRule, frame: StepFrame
    ) -> tuple[Verdict, str | None]:
        """True with the first seed it is true of; without seeds it is unknown."""
        verdict: Verdict = None if not frame.seeds else False
        for seed_id in frame.seeds:
            found = compiled.test(self._seed_values(frame, seed_id), self._past_of(seed_id))
            if found:
                return True, seed_id
            if found is None:
                verdict = None
        return verdict, None

    def _finding(
        self, compiled: CompiledRule, frame: StepFrame, seed_id: str | None
    ) -> Finding:
        if seed_id is None:
            return compiled.finding(frame.values, self._history, None)
        values = self._seed_values(frame, seed_id)
        return compiled.finding(values, self._past_of(seed_id), seed_id)

    @staticmethod
    def _seed_values(frame: StepFrame, seed_id: str) -> Values:
        return {**frame.values, **frame.seeds[seed_id]}

    def _past_of(self, seed_id: str) -> History:
        past = self._seeds.get(seed_id)
        if past is None:
            past = self._seeds[seed_id] = History(self._seed_watch, self._history)
        return past

    def _absorb(self, frame: StepFrame) -> None:
        self._history.absorb(frame.values)
        self.guards.follow(self._history)
        if frame.seeds and (self._seed_watch.medians or self._seed_watch.lasts):
            for seed_id, values in frame.seeds.items():
                self._past_of(seed_id).absorb(values)
        if len(self._seeds) > MAX_SEEDS:
            self._seeds = {
                seed_id: past for seed_id, past in self._seeds.items() if seed_id in frame.seeds
            }
