"""A table made ready to run, once for all ranks that it evaluates.

And what another table changes: rules that are the same go on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from esper_tamiyo.judging.excursions import LAG
from esper_tamiyo.judging.guards import plan
from esper_tamiyo.judging.history import BaselineKey, RecordKey, Watched, earlier_span
from esper_tamiyo.judging.rules import Values, compiled
from esper_tamiyo.judging.update_guards import UpdatePlan, update_plan
from esper_tamiyo.language.derived import is_seeds, needed
from esper_tamiyo.language.operators import (
    ON_BASELINES,
    ON_EARLIER,
    ON_PEERS,
    ON_RECORDS,
    BaselineKind,
    Operator,
)
from esper_tamiyo.language.table import (
    Condition,
    Rule,
    Table,
    acts_on_updates,
    conditions,
    is_known_before_update,
)

_ON_LASTS = (Operator.RISES_BY, Operator.UNCHANGED_FOR, Operator.MISSING_FOR)


TOGETHER = 24
"""Steps of a stretch (:mod:`~esper_tamiyo.judging.stretches`) at most. With more of them it is
cheaper, and ends more often: a median of 64 stays within the quarters of its window for 16,
and has come to their ends by 31."""


class UpdateRules:
    """The rules of a table by which updates are checked, each with its place in the table.

    ``acting`` act on updates; ``inhibiting`` are those that inhibit one of them.
    """

    __slots__ = ("acting", "inhibiting")

    def __init__(self, table: Table) -> None:
        acting = {rule.id for rule in table.rules if acts_on_updates(rule)}
        placed = [
            (place, compiled(rule, is_known_before_update))
            for place, rule in enumerate(table.rules)
        ]
        self.acting = tuple(one for one in placed if one[1].rule.id in acting)
        self.inhibiting = tuple(
            one for one in placed if one[1].acts and not acting.isdisjoint(one[1].rule.inhibits)
        )


class Rulebook:
    """The rules of a table compiled, and what of the past they need."""

    __slots__ = (
        "clean_steps",
        "derived",
        "guard_plan",
        "inhibits",
        "judged",
        "judges_seeds",
        "mixes",
        "patience",
        "peer_keys",
        "rank_keys",
        "rank_watch",
        "ranks",
        "rules",
        "seed_places",
        "seed_watch",
        "silence",
        "step_watch",
        "table",
        "together",
        "update_plan",
        "updates",
        "warm_after",
        "warmed_by",
    )

    def __init__(self, table: Table) -> None:
        self.table = table
        self.clean_steps = table.clean_steps
        self.rules = tuple(compiled(rule) for rule in table.rules)
        self.inhibits = any(entry.rule.inhibits and entry.acts for entry in self.rules)
        self._sort_rules()
        self._watch_steps()
        self._warm_up()
        self._watch_peers()
        self.guard_plan = plan(table)
        self.updates = UpdateRules(table)
        """By which updates are checked before they are made."""
        self.update_plan = update_plan(table)
        self.together = min(TOGETHER, (table.baseline.window - 1) // 2)
        """Steps that a past takes in together at most, where nobody looks at it between."""

    def update_plan_without(self, silenced: Collection[str]) -> UpdatePlan:
        """The guards of updates where the rules with these ids act on none."""
        if not silenced:
            return self.update_plan
        heard = tuple(rule for rule in self.table.rules if rule.id not in silenced)
        return update_plan(msgspec.structs.replace(self.table, rules=heard))

    def values_of_seed(self, of_step: Mapping[str, float], own: Mapping[str, float]) -> Values:
        """What rules about seeds look at: a seed's ``own`` values, and what else they need."""
        if not self.derived and not self.mixes:
            return own
        values = {**of_step, **own} if self.mixes else {**own}
        for derived in self.derived:
            value = derived.of(own)
            if value is not None:
                values[derived.metric.key] = value
        return values

    def _sort_rules(self) -> None:
        """Tell the rules apart by what they are about."""
        placed = tuple(enumerate(self.rules))
        self.judged = tuple(
            (
                place,
                entry,
                entry.test,
                not entry.rule.about_seeds and not entry.rule.about_ranks,
                entry.rule.about_seeds,
            )
            for place, entry in placed
            if not entry.rule.about_silence
        )
        """The rules that a frame is held against: place in the table, rule, its test, and
        whether it is about the step alone (neither about seeds nor about other ranks), or about
        seeds. The test is at hand because each is tried at every step."""
        self.ranks = tuple(one for one in placed if one[1].rule.about_ranks)
        """The rules that compare ranks."""
        self.silence = tuple(one for one in placed if one[1].rule.about_silence)
        """The rules on ranks that send nothing."""
        self.patience = {
            place: next(
                part.number
                for part in conditions(entry.rule.when)
                if part.operator is Operator.MISSING_FOR
            )
            for place, entry in self.silence
        }
        """Steps without which they fire, by place."""
        self.seed_places = tuple(place for place, one in placed if one.rule.about_seeds)
        """Places of the rules about seeds."""
        of_seeds = [self.rules[place].rule for place in self.seed_places]
        self.judges_seeds = bool(of_seeds)
        self.mixes = any(
            not is_seeds(part.metric) for rule in of_seeds for part in conditions(rule.when)
        )
        """Whether a rule about seeds looks at values of the step as well."""

    def _warm_up(self) -> None:
        """From when on the rules that act can have a past to compare a step with."""
        acting = [
            entry.rule
            for entry in self.rules
            if entry.is_trouble and not (entry.rule.about_seeds or entry.rule.about_ranks)
        ]
        needs = {
            (part.metric, part.operator, part.baseline_of, part.baseline, steps)
            for rule in acting
            for part in conditions(rule.when)
            if (steps := steps_to_warm(part, self.table))
        }
        self.warm_after = max((need[-1] for need in needs), default=0)
        """Steps after which each of them can, if its metric comes with every step."""
        self.warmed_by = frozenset(needs)
        """What that takes: a table that needs more warms up anew."""

    def _watch_steps(self) -> None:
        """What frames have to be remembered for."""
        framed = [part for _, entry, *_ in self.judged for part in conditions(entry.rule.when)]
        self.step_watch = watched(self.table, framed, of_seeds=False)
        self.seed_watch = watched(self.table, framed, of_seeds=True)
        self.derived = needed(
            key for part in framed for key in (part.metric, part.baseline_of) if key
        )

    def _watch_peers(self) -> None:
        """What ranks are compared by."""
        compared = [part for _, entry in self.ranks for part in conditions(entry.rule.when)]
        self.rank_watch = watched(self.table, compared, of_seeds=False)
        self.rank_keys = frozenset(
            key for part in compared for key in ("step", *_looked_at(part))
        )
        """What rules that compare ranks need of a step."""
        self.peer_keys = tuple(
            {part.metric: None for part in compared if part.operator in ON_PEERS}
        )
        """What they compare."""


def _looked_at(part: Condition) -> tuple[str, ...]:
    """What a condition needs of a step."""
    if part.operator is Operator.NONFINITE:
        return (part.metric, "nonfinite")
    return (part.metric, part.baseline_of) if part.baseline_of else (part.metric,)


def steps_to_warm(part: Condition, table: Table) -> int:
    """Observations after which a condition can have what it compares with; 0 where it needs
    none, or only the one before."""
    spans = table.baseline
    if part.operator in ON_BASELINES:
        frozen = part.baseline is BaselineKind.FROZEN
        return spans.warmup + (spans.window if frozen else 0)
    if part.operator in ON_RECORDS:  # first the level, then the scatter around it
        return 2 * (table.record.warmup + LAG)
    if part.operator in ON_EARLIER:
        span, lag, _ = earlier_span(spans.window)
        return span + lag
    return spans.warmup + spans.window if part.operator is Operator.RUNS_OUT_WITHIN else 0


def watched(table: Table, framed: Iterable[Condition], *, of_seeds: bool) -> Watched:
    """The metrics of seeds, or of steps, whose past ``framed`` conditions need."""
    baselines: dict[BaselineKey, None] = {}
    lasts: dict[str, None] = {}
    slopes: dict[str, None] = {}
    records: dict[RecordKey, None] = {}
    earlier: dict[str, None] = {}
    for part in framed:
        if part.operator in ON_BASELINES:
            if part.baseline in (BaselineKind.LOWEST, BaselineKind.HIGHEST):
                baselines[BaselineKey(part.baseline_of, BaselineKind.ROLLING)] = None
            baselines[BaselineKey(part.baseline_of, part.baseline)] = None
        elif part.operator in ON_RECORDS:
            below = part.operator is Operator.BELOW_RECORD
            records[RecordKey(part.metric, below, part.hold)] = None
        elif part.operator in ON_EARLIER:
            earlier[part.metric] = None
        elif part.operator in _ON_LASTS:
            lasts[part.metric] = None
        elif part.operator is Operator.RUNS_OUT_WITHIN:
            slopes[part.metric] = None

    def mine(key: str) -> bool:
        return is_seeds(key) is of_seeds

    return Watched(
        baselines=tuple(watch for watch in baselines if mine(watch.metric)),
        lasts=tuple(filter(mine, lasts)),
        slopes=tuple(filter(mine, slopes)),
        records=tuple(watch for watch in records if mine(watch.metric)),
        record=table.record,
        earlier=tuple(filter(mine, earlier)),
        window=table.baseline.window,
        warmup=table.baseline.warmup,
    )


class ReloadReport(msgspec.Struct, frozen=True):
    """What another table changed; rules by id, in the order of their tables.

    ``kept`` rules are the same in every field and went on as if nothing had happened;
    ``changed``, ``added`` and ``removed`` ones began anew, or ended. ``baselines_kept`` is
    false when the new table's baselines span other windows: then they warm up again.
    """

    before: str
    version: str
    kept: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    baselines_kept: bool


def difference(before: Table, after: Table) -> ReloadReport:
    """What ``after`` changes when it takes the place of ``before``."""
    old = dict.fromkeys(rule.id for rule in before.rules)
    ids = [rule.id for rule in after.rules]
    kept_at = dict(zip(ids, earlier_places(before, after), strict=True))
    return ReloadReport(
        before=before.version,
        version=after.version,
        kept=tuple(name for name, place in kept_at.items() if place is not None),
        changed=tuple(name for name, place in kept_at.items() if place is None and name in old),
        added=tuple(name for name in kept_at if name not in old),
        removed=tuple(name for name in old if name not in kept_at),
        baselines_kept=after.baseline == before.baseline,
    )


def earlier_places(before: Table, after: Table) -> list[int | None]:
    """Where each rule of ``after`` was in ``before``, None for what is new or different."""
    old: dict[str, tuple[int, Rule]] = {
        rule.id: (place, rule) for place, rule in enumerate(before.rules)
    }
    return [
        old[rule.id][0] if rule.id in old and old[rule.id][1] == rule else None
        for rule in after.rules
    ]
