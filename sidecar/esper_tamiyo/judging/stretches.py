"""Stretches: steps of a rank that nobody waits for and among which no rule can change.

Nearly every step leaves every rule as it is. In a stretch that is known by ranges that the
step's values must not leave (:mod:`~esper_tamiyo.judging.holds`): then no rule is tried, and
what medians and slopes need of the step is put off until there are enough steps to take them in
at once, or somebody looks. All is as if each step had been judged alone. A step that leaves a
range ends the stretch and is judged; behind it the next one begins.

Steps that a trainer asks about are none: their bounds must be those behind the step before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from esper_otel.leyline.frames import MAX_STEP, MAX_TIME_UNIX_NANO, StepFrame
from esper_tamiyo.judging.admission import HELD_LEAP
from esper_tamiyo.judging.courses import Course
from esper_tamiyo.judging.holds import ENDLESS, Hold, Past, Wanted, holds_of
from esper_tamiyo.judging.liveness import FLOOR_NS
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.judging.rule_status import RuleStatus, RuleTransition
from esper_tamiyo.judging.rules import Values
from esper_tamiyo.language.table import Condition

if TYPE_CHECKING:
    from esper_tamiyo.judging.run_state import RunState

LEAST = 4
"""Steps that a stretch must be able to have: to begin one costs as much as to judge some."""

WORTH = 12
"""Steps that stretches must have on the average, but for the first, to be worth it."""

ENDS = 4
"""Stretches with the same ranges, after which others are tried."""

RULES_AT_ONCE = 12
"""Rules, of a rank or a seed, that ranges are chosen for at once, which takes 0.1 ms."""

PATIENCE = 32
"""Steps that are judged at most before another stretch is tried, where none was worth it."""

_WANTED: dict[object, Wanted] = {False: Wanted.FALSE, None: Wanted.UNKNOWN}

_NOTHING: list[RuleTransition] = []


class Stretch:
    """The stretch that a rank is in, and how it went with those before."""

    __slots__ = (
        "_choosing",
        "_course",
        "_crossed",
        "_ends",
        "_idle",
        "_ids",
        "_is_open",
        "_left",
        "_newest",
        "_patience",
        "_taken",
        "_waited",
        "behind",
    )

    def __init__(self) -> None:
        self._course: Course | None = None
        self._choosing: Iterator[bool] | None = None
        """Goes on choosing ranges for the course."""
        self._crossed: Counter[Condition | None] = Counter()
        self._ids: tuple[str, ...] = ()
        self._idle: list[tuple[RuleStatus, object]] = []
        """The verdicts that change nothing, of each rule's status."""
        self._newest: StepFrame | None = None
        """The newest step, where the past has not taken it in."""
        self._is_open = False
        self._left = 0
        """Steps for which the ranges still hold."""
        self._taken = self._ends = self._waited = self._patience = 0
        self.behind = False
        """Whether somebody who looks has to :meth:`catch_up` with it first."""

    def carry_on(
        self, state: RunState, frame: StepFrame, at_ns: int
    ) -> list[RuleTransition] | None:
        """Take in the frame behind the newest of its rank; None where it has to be judged.

        Else no rule changes, but for those that compare ranks in hindsight: how.
        """
        if not self._is_open or not (self._left or self._renew(state.book.together)):
            return None
        step, newest, book, seeds = frame.step, state.newest, state.book, frame.seeds
        time_ns, pace, course = frame.time_unix_nano, state.pace, self._course
        if (
            course is None
            or not newest < step <= newest + HELD_LEAP
            or step > MAX_STEP
            or not 0 <= time_ns <= MAX_TIME_UNIX_NANO
            or time_ns - pace.last_ns - pace.away_ns > FLOOR_NS
            or frame.instance != state.instance
            or ((seeds or self._ids) and tuple(seeds) != self._ids)
            or (state.silences.used and state.silences.at(step) != state._silenced)
            or (book.ranks and state._comparison.is_joined(time_ns))
        ):
            return None
        values = frame.values
        of_seeds: Collection[Values] = ()
        if seeds and book.judges_seeds:
            of_seeds = seeds.values()
            if book.mixes:
                of_seeds = [{**values, **own} for own in of_seeds]
        row = course.row_of(values, of_seeds)
        if row is None:
            return None
        if step > newest + 1:
            state._gaps.append((newest + 1, step - 1))
        pace.heard(time_ns, step - newest, at_ns)
        state.newest = step
        state.clean_steps += 1
        state.warm_up.steps += 1
        course.put_off(row)
        self._newest = frame
        self._left -= 1
        self._taken += 1
        self.behind = True
        if not book.ranks:
            return _NOTHING
        transitions = state.compare(frame)
        if transitions or state.acting:
            self.close(state)
        return transitions

    def catch_up(self, state: RunState) -> None:
        """Bring the past and the guards up to the newest step; the stretch goes on."""
        if self.behind:
            self._absorb()
            self.behind = False
            state.renew_guards()

    def stop(self) -> None:
        """A step is judged: have the past take in those before."""
        if self._course is not None:
            self._absorb()
            self._is_open = self.behind = False

    def close(self, state: RunState) -> None:
        """It is over: something else than a step has changed the rank."""
        self.catch_up(state)
        self._course = self._choosing = None
        self._is_open = False

    def start(self, state: RunState, frame: StepFrame) -> None:
        """Behind ``frame``, which was judged, go on with the same ranges or choose others.

        To choose takes a few such steps, as asks of others wait meanwhile.
        """
        if not _is_at_rest(state, frame):
            self._choosing = None
        elif self._choosing is not None:
            self._choose(state, frame)
        elif self._course is not None and self._taken < WORTH * (self._ends - 1):
            self._give_up()
        elif self._course is not None and self._ends < ENDS:
            self._ends += 1
            self._open(state, frame)
        elif self._waited < self._patience:
            self._waited += 1
        else:
            self._ids, self._idle = tuple(frame.seeds), []
            self._taken = self._ends = 0
            self._course = Course(state.book, self._crossed)
            self._choosing = self._chosen(state, frame, self._course)
            self._choose(state, frame)

    def _choose(self, state: RunState, frame: StepFrame) -> None:
        """Go on choosing, and begin once that is done."""
        if self._choosing is not None and next(self._choosing, True):
            self._choosing = None
            if self._course is not None:
                self._open(state, frame)

    def _chosen(self, state: RunState, frame: StepFrame, course: Course) -> Iterator[bool]:
        """Give a course ranges for a rank and each of its seeds, or give up; False while there
        is more to do."""
        book, rank, values = state.book, state._rank, frame.values
        in_company = bool(book.ranks) and state._comparison.has_company
        of_rank = [
            (place, entry)
            for place, entry, _, plain, about_seeds in book.judged
            if plain or not (in_company or about_seeds)
        ]
        of_seeds = [(place, book.rules[place]) for place in book.seed_places]
        holds = _same_phase(values)
        count = 0
        for target, rules in ((rank, of_rank), *((seed, of_seeds) for seed in state._live)):
            told = {**values, **target.values}
            past = Past(target.values, target.history, book.together, told, self._crossed)
            for place, entry in rules:
                idle = target.statuses[place].idle
                wanted = _WANTED.get(idle)
                found = None if wanted is None else holds_of(entry.rule.when, wanted, past)
                if found is None:
                    self._give_up()
                    return
                holds += found[1]
                self._idle.append((target.statuses[place], idle))
                count += 1
                if not count % RULES_AT_ONCE:
                    yield False
            own = values if target is rank else frame.seeds[target.seed_id or ""]
            course.add_part(target, {**values, **own} if book.mixes else own, holds)
            holds = []

    def _open(self, state: RunState, frame: StepFrame) -> None:
        """Begin with the ranges that were chosen, if they still are about the same."""
        course, live = self._course, (state._live if state.book.judges_seeds else [])
        is_same = (
            course is not None
            and self._ids == tuple(frame.seeds)
            and course.is_about([state._rank, *live])
            and all(status.idle is idle for status, idle in self._idle)
        )
        if not (is_same and self._renew(state.book.together)):
            self._give_up()
        elif self._taken >= WORTH * self._ends:
            self._patience = 0

    def _give_up(self) -> None:
        self._course = self._choosing = None
        self._taken = self._ends = self._waited = 0
        self._patience = min(2 * self._patience or 1, PATIENCE)

    def _renew(self, steps: int) -> bool:
        """Go on behind as many steps as the ranges held for; False where they do not."""
        self._absorb()
        self._left = 0 if self._course is None else self._course.renew(steps)
        self._is_open = self._left >= LEAST
        return self._is_open

    def _absorb(self) -> None:
        if self._newest is not None and self._course is not None:
            self._course.flush(self._newest)
            self._newest = None


def _same_phase(values: Values) -> list[Hold]:
    """What keeps a rank in its phase of the training."""
    phase = values.get("phase")
    return [] if phase is None else [Hold("phase", lambda _: (phase, phase, ENDLESS), True)]


def _is_at_rest(state: RunState, frame: StepFrame) -> bool:
    """Whether nothing was out of the ordinary with the newest step, which is ``frame``."""
    book, statuses = state.book, state._rank.statuses
    if (
        book.together < LEAST
        or state.acting
        or state.conservative
        or state.warm_up.under_way
        or not frame.values
        or any(statuses[place].state is not RuleState.INACTIVE for place, _ in book.silence)
    ):
        return False
    if not book.judges_seeds:
        return True
    live = [seed.seed_id for seed in state._live]
    return live == [*frame.seeds] and all(frame.seeds.values())
