"""Everything Tamiyo remembers of one rank of one run."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from esper_otel.leyline.decisions import Decision, Finding
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.guards import Guards
from esper_tamiyo.judging.hindsight import Hindsight
from esper_tamiyo.judging.history import History
from esper_tamiyo.judging.peers import PeerBoard
from esper_tamiyo.judging.rulebook import Rulebook
from esper_tamiyo.judging.rules import CompiledRule, Values, Verdict
from esper_tamiyo.judging.silence import Pace
from esper_tamiyo.judging.standing import Standing
from esper_tamiyo.judging.subject import Subject
from esper_tamiyo.judging.update_guards import UpdateGuards
from esper_tamiyo.judging.witness import RuleState

MAX_GAPS = 64
"""Stretches of missing steps remembered, to tell a late frame from a second copy."""

MAX_SEEDS = 256
"""Seeds whose past is kept once they are no longer in the frames."""

Fired = tuple[CompiledRule, Finding]

_UNKNOWN, _INACTIVE, _FIRING = RuleState.UNKNOWN, RuleState.INACTIVE, RuleState.FIRING
_HELD = (RuleState.FIRING, RuleState.RECOVERING)


class Moved(NamedTuple):
    """A rule's state changed, or who silences it; becomes a ``RuleChange``."""

    entry: CompiledRule
    seed_id: str | None
    before: RuleState
    after: RuleState
    since_step: int
    values: dict[str, float]
    silenced_by: str


class RunState:
    """The past, the rules' memory and the newest findings of one (run, rank, instance)."""

    __slots__ = (
        "_active",
        "_gaps",
        "_hindsight",
        "_live",
        "_moves",
        "_rank",
        "_seeds",
        "_undecided",
        "_unrest",
        "acting",
        "book",
        "clean_steps",
        "conservative",
        "decision",
        "fired",
        "first",
        "guards",
        "instance",
        "newest",
        "pace",
        "update_guards",
    )

    def __init__(self, instance: str, book: Rulebook, board: PeerBoard, rank: int) -> None:
        self.instance = instance
        self.newest = -1
        self.first = -1
        self.pace = Pace()
        self.conservative = False
        self.clean_steps = 0
        self.acting = False
        """Whether a rule has fired and was not released: then no step is a plain one."""
        self.fired: list[Fired] = []
        self.decision: Decision | None = None
        self.book = book
        self._gaps: deque[tuple[int, int]] = deque(maxlen=MAX_GAPS)
        self._rank = Subject(None, len(book.rules), History(book.step_watch))
        self._hindsight = Hindsight(board, rank, book.rank_watch)
        self._seeds: dict[str, Subject] = {}
        self._live: list[Subject] = []
        self.guards = Guards(book.guard_plan, self._rank.history)
        self.update_guards = UpdateGuards(book.update_plan, self._rank.history)
        self._active: list[tuple[CompiledRule, Standing, Subject]] = []
        self._moves: list[Moved] = []
        self._undecided = False
        self._unrest: list[dict[str, str | int]] | None = None

    @property
    def time_unix_nano(self) -> int:
        """When the newest step ended, 0 before the first."""
        return self.pace.last_ns

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

    def judge(self, frame: StepFrame, at_ns: int) -> list[Moved]:
        """Hold a frame newer than all before it against the rules, then remember it."""
        self._advance(frame, at_ns)
        rank = self._rank
        rank.values = values = frame.values
        history = rank.history
        book = self.book
        company = bool(book.ranks) and self._hindsight.in_company(frame.time_unix_nano, history)
        if book.judges_seeds and (frame.seeds or self._live):
            self._see_seeds(frame)
        standings = rank.standings
        for place, entry, plain in book.judged:
            if plain or not (company or entry.rule.about_seeds):
                verdict = entry.test(values, history)
                standing = standings[place]
                if verdict is not standing.idle:
                    self._weigh(entry, standing, rank, verdict)
            elif entry.rule.about_seeds:
                for seed in self._live:
                    verdict = entry.test(seed.values, seed.history)
                    standing = seed.standings[place]
                    if verdict is not standing.idle:
                        self._weigh(entry, standing, seed, verdict)
            else:
                self._include(entry, standings[place], self._hindsight.subject)
        for place, entry in book.silence:
            self._move(entry, standings[place], rank, _INACTIVE)
        self._act()
        self._absorb(frame)
        if book.ranks:
            self._hindsight.tell(frame, book.rank_keys)
            self._look_back(frame.time_unix_nano)
        if self._moves:
            self._unrest = None
        return self._moves

    def would_fire(self, step: int, values: Values) -> list[Fired]:
        """The rules that would fire and act on the update of ``step``, if it were as ``values``
        say; changes nothing.

        Only what the update itself breaks counts: a rule that fired, and is on its way back,
        acts on the steps until then and not on an update that is within all bounds.
        """
        rank = self._rank
        history, standings = rank.history, rank.standings
        silenced: set[str] = set()
        for place, entry in self.book.updates.silencing:
            if self._would_hold(place, entry, values):
                silenced.update(entry.rule.silences)
        fired = []
        for place, entry in self.book.updates.acting:
            standing, rule = standings[place], entry.rule
            if rule.id in silenced or step - standing.fired_at <= rule.cooldown:
                continue
            if standing.peek(entry, entry.test(values, history), None) is _FIRING:
                fired.append((entry, entry.finding(values, history, None)))
        return fired

    def fall_silent(self, place: int, entry: CompiledRule) -> Moved | None:
        """The rule on silence fires; None when it does already."""
        standing = self._rank.standings[place]
        if standing.state is _FIRING:
            return None
        moved = Moved(entry, None, standing.state, _FIRING, standing.since, {}, "")
        standing.enter(_FIRING, self.newest)
        self._unrest = None
        return moved

    def adopt(self, book: Rulebook, places: list[int | None]) -> list[Moved]:
        """Go on under another table.

        ``places`` says for each of its rules where the same rule was before, None for what
        is new. What is gone while it was pending or fired is told as having become unknown.
        """
        kept = {place for place in places if place is not None}
        lost = [
            Moved(entry, subject.seed_id, standing.state, _UNKNOWN, standing.since, {}, "")
            for subject in (self._rank, *self._live)
            for place, (entry, standing) in enumerate(
                zip(self.book.rules, subject.standings, strict=True)
            )
            if place not in kept and standing.state not in (_UNKNOWN, _INACTIVE)
        ]
        self.book = book
        self._unrest = None
        before = self._rank.history
        self._rank.rearrange(places, History(book.step_watch, before=before))
        self._hindsight.adopt(book.rank_watch)
        for seed in self._seeds.values():
            past = History(book.seed_watch, self._rank.history, before=seed.history)
            seed.rearrange(places, past)
        if not book.judges_seeds:
            self._live = []
        self.guards = Guards(book.guard_plan, self._rank.history)
        self.update_guards = UpdateGuards(book.update_plan, self._rank.history)
        return lost

    def rules(self) -> list[dict[str, str | int]]:
        """The rules that are pending or have fired, as plain data.

        Looked for once after a change: a report asks every rank, and an ask may wait.
        """
        if self._unrest is None:
            self._unrest = self._not_at_rest()
        return self._unrest

    def _would_hold(self, place: int, entry: CompiledRule, values: Values) -> bool:
        """Whether a rule would have fired and not be released; as it stands now, if ``values``
        cannot tell."""
        rule, rank = entry.rule, self._rank
        if not (rule.about_seeds or rule.about_ranks):
            standing = rank.standings[place]
            verdict = entry.test(values, rank.history)
            kept: Verdict = None
            if standing.active and not verdict and entry.keeps is not None:
                kept = entry.keeps(values, rank.history)
            after = standing.peek(entry, verdict, kept)
            if after is not _UNKNOWN:
                return after in _HELD
        subjects = self._live if rule.about_seeds else (rank,)
        return any(
            standing.active and standing.state in _HELD
            for standing in (subject.standings[place] for subject in subjects)
        )

    def _not_at_rest(self) -> list[dict[str, str | int]]:
        return [
            {
                "rule": entry.rule.id,
                "state": standing.state.value,
                "since_step": standing.since,
                **({} if subject.seed_id is None else {"seed_id": subject.seed_id}),
                **({"silenced_by": standing.silenced_by} if standing.silenced_by else {}),
            }
            for subject in (self._rank, *self._live)
            for entry, standing in zip(self.book.rules, subject.standings, strict=True)
            if standing.active or standing.state not in (_UNKNOWN, _INACTIVE)
        ]

    def _advance(self, frame: StepFrame, at_ns: int) -> None:
        """First of all, so that a frame that breaks a rule is not judged twice."""
        if self.first < 0:
            self.first = frame.step
        elif frame.step > self.newest + 1:
            self._gaps.append((self.newest + 1, frame.step - 1))
        self.pace.heard(frame.time_unix_nano, frame.step - self.newest, at_ns)
        self.newest = frame.step
        self.fired = []
        self._active = []
        self._moves = []
        self._undecided = False

    def _see_seeds(self, frame: StepFrame) -> None:
        """Bring up the seeds of a frame; of those that are gone nobody can say a thing."""
        seeds = frame.seeds
        for seed in self._live:
            if seed.seed_id not in seeds:
                for entry, standing in zip(self.book.rules, seed.standings, strict=True):
                    standing.reset()
                    self._move(entry, standing, seed, _UNKNOWN)
        if [seed.seed_id for seed in self._live] != list(seeds):
            self._unrest = None
        live = []
        for seed_id, own in seeds.items():
            known = self._seeds.get(seed_id)
            if known is None:
                past = History(self.book.seed_watch, self._rank.history)
                known = self._seeds[seed_id] = Subject(seed_id, len(self.book.rules), past)
            known.values = self._of_seed(frame.values, own)
            live.append(known)
        self._live = live

    def _of_seed(self, of_step: Mapping[str, float], own: Mapping[str, float]) -> Values:
        book = self.book
        if not book.derived and not book.mixes:
            return own
        values = {**of_step, **own} if book.mixes else {**own}
        for derived in book.derived:
            value = derived.of(own)
            if value is not None:
                values[derived.metric.key] = value
        return values

    def _look_back(self, time_ns: int) -> None:
        """Compare the steps that all ranks have told by now; it counts from the next on."""
        hindsight, standings = self._hindsight, self._rank.standings
        for waiting in hindsight.due(time_ns):
            hindsight.compare(waiting, self.book.peer_keys, time_ns)
            subject = hindsight.subject
            for place, entry in self.book.ranks:
                standing = standings[place]
                verdict = entry.test(subject.values, subject.history)
                if verdict is not standing.idle:
                    self._observe(entry, standing, subject, verdict)
                    self.acting = self.acting or standing.active

    def _weigh(
        self, entry: CompiledRule, standing: Standing, subject: Subject, verdict: Verdict
    ) -> None:
        self._observe(entry, standing, subject, verdict)
        self._include(entry, standing, subject)

    def _observe(
        self, entry: CompiledRule, standing: Standing, subject: Subject, verdict: Verdict
    ) -> None:
        """One more observation of one rule."""
        kept: Verdict = None
        if standing.active and not verdict and entry.keeps is not None:
            kept = entry.keeps(subject.values, subject.history)
        self._move(entry, standing, subject, standing.take(entry, verdict, kept))
        if not standing.active:
            standing.silenced_by = ""

    def _include(self, entry: CompiledRule, standing: Standing, subject: Subject) -> None:
        """Have a rule that has fired, and was not released, count at this step."""
        if not standing.active:
            return
        if standing.state is _UNKNOWN:
            self._undecided = self._undecided or entry.is_trouble
        else:
            self._active.append((entry, standing, subject))

    def _move(
        self, entry: CompiledRule, standing: Standing, subject: Subject, after: RuleState
    ) -> None:
        before = standing.state
        if after is before:
            return
        seen = entry.seen(subject.values, subject.history)
        since = standing.since
        self._moves.append(Moved(entry, subject.seed_id, before, after, since, seen, ""))
        standing.enter(after, self.newest)

    def _act(self) -> None:
        """From the rules that have fired to findings and conservative mode."""
        active = self._active
        self.acting = bool(active) or self._undecided
        silenced = self._silence() if active and self.book.silences else {}
        clean, enters = True, False
        step = self.newest
        named: CompiledRule | None = None
        for entry, standing, subject in active:
            clean = clean and not entry.is_trouble
            rule = entry.rule
            if rule.id in silenced or step - standing.fired_at <= rule.cooldown:
                continue
            if entry is named:  # of several seeds the first; its cool-down gives others a turn
                continue
            named = entry
            standing.fired_at = step
            enters = enters or (rule.conservative and entry.acts)
            finding = entry.finding(subject.values, subject.history, subject.seed_id)
            self.fired.append((entry, finding))
        if enters:
            self.conservative = True
        if not clean:
            self.clean_steps = 0
        elif not self._undecided:  # a rule that fired and is unknown now is not over
            self.clean_steps += 1
        if self.clean_steps >= self.book.clean_steps:
            self.conservative = False

    def _silence(self) -> dict[str, str]:
        """Silenced rules and who silences them; a change of that is told as well."""
        by = {
            silenced: entry.rule.id
            for entry, _, _ in reversed(self._active)
            if entry.acts
            for silenced in entry.rule.silences
        }
        told = {(moved.entry.rule.id, moved.seed_id) for moved in self._moves}
        for entry, standing, subject in self._active:
            silencer = by.get(entry.rule.id, "")
            if standing.silenced_by == silencer:
                continue
            standing.silenced_by = silencer
            if (entry.rule.id, subject.seed_id) not in told:
                seen = entry.seen(subject.values, subject.history)
                state, since = standing.state, standing.since
                self._moves.append(Moved(entry, subject.seed_id, state, state, since, seen, ""))
        silenced = {
            (entry.rule.id, subject.seed_id): standing.silenced_by
            for entry, standing, subject in self._active
        }
        self._moves = [
            moved._replace(silenced_by=silenced.get((moved.entry.rule.id, moved.seed_id), ""))
            for moved in self._moves
        ]
        return by

    def _absorb(self, frame: StepFrame) -> None:
        self._rank.history.absorb(frame.values)
        for seed in self._live:
            seed.history.absorb(seed.values)
        if self._live:  # the next step has seeds as well, and is not glanced at
            self.guards.fall_behind()
        else:
            self.guards.follow()
        if len(self._seeds) > MAX_SEEDS:
            live = {seed.seed_id for seed in self._live}
            self._seeds = {key: seed for key, seed in self._seeds.items() if key in live}
