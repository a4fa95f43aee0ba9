"""A table made ready to run, once for all ranks that are judged by it."""

from __future__ import annotations

from collections.abc import Iterable

from esper_tamiyo.judging.guards import plan
from esper_tamiyo.judging.history import Watch, Watched
from esper_tamiyo.judging.rules import compiled
from esper_tamiyo.judging.update_guards import update_plan
from esper_tamiyo.judging.updates import UpdateRules
from esper_tamiyo.language.derived import is_seeds, needed
from esper_tamiyo.language.operators import ON_BASELINES, ON_PEERS, BaselineKind, Operator
from esper_tamiyo.language.table import Condition, Table, conditions

_ON_LASTS = (Operator.RISES_BY, Operator.UNCHANGED_FOR, Operator.MISSING_FOR)


class Rulebook:
    """The rules of a table compiled, and what of the past they need."""

    __slots__ = (
        "clean_steps",
        "derived",
        "guard_plan",
        "judged",
        "judges_seeds",
        "mixes",
        "peer_keys",
        "rank_keys",
        "rank_watch",
        "ranks",
        "rules",
        "seed_watch",
        "silence",
        "silences",
        "step_watch",
        "table",
        "update_plan",
        "updates",
    )

    def __init__(self, table: Table) -> None:
        self.table = table
        self.clean_steps = table.clean_steps
        self.rules = tuple(compiled(rule) for rule in table.rules)
        self.judged = tuple(
            (place, entry, not entry.rule.about_seeds and not entry.rule.about_ranks)
            for place, entry in enumerate(self.rules)
            if not entry.rule.about_silence
        )
        """The rules that a frame is held against: place in the table, rule, and whether it
        is about the step alone, neither about seeds nor about other ranks."""
        self.ranks = tuple(
            (place, entry) for place, entry in enumerate(self.rules) if entry.rule.about_ranks
        )
        """The rules that compare ranks."""
        self.silence = tuple(
            (place, entry) for place, entry in enumerate(self.rules) if entry.rule.about_silence
        )
        """The rules on ranks that send nothing."""
        self.judges_seeds = any(rule.about_seeds for rule in table.rules)
        self.mixes = any(
            not is_seeds(part.metric)
            for rule in table.rules
            if rule.about_seeds
            for part in conditions(rule.when)
        )
        """Whether a rule about seeds looks at values of the step as well."""
        self.silences = any(entry.rule.silences and entry.acts for entry in self.rules)
        framed = [
            condition
            for _, entry, _ in self.judged
            for condition in conditions(entry.rule.when)
        ]
        self.step_watch = watched(table, framed, of_seeds=False)
        self.seed_watch = watched(table, framed, of_seeds=True)
        compared = [
            condition for _, entry in self.ranks for condition in conditions(entry.rule.when)
        ]
        self.rank_watch = watched(table, compared, of_seeds=False)
        self.rank_keys = frozenset(
            key for part in compared for key in ("step", *_looked_at(part))
        )
        """What rules that compare ranks need of a step."""
        self.peer_keys = tuple(
            {part.metric: None for part in compared if part.operator in ON_PEERS}
        )
        """What they compare."""
        self.derived = needed(
            key for part in framed for key in (part.metric, part.baseline_of) if key
        )
        self.guard_plan = plan(table)
        self.updates = UpdateRules(table)
        """By which updates are checked before they are made."""
        self.update_plan = update_plan(table)


def _looked_at(part: Condition) -> tuple[str, ...]:
    """What a condition needs of a step."""
    if part.operator is Operator.NONFINITE:
        return (part.metric, "nonfinite")
    return (part.metric, part.baseline_of) if part.baseline_of else (part.metric,)


def watched(table: Table, framed: Iterable[Condition], *, of_seeds: bool) -> Watched:
    """The metrics of seeds, or of steps, whose past ``framed`` conditions need."""
    baselines: dict[Watch, None] = {}
    lasts: dict[str, None] = {}
    slopes: dict[str, None] = {}
    for part in framed:
        if part.operator in ON_BASELINES:
            if part.baseline in (BaselineKind.LOWEST, BaselineKind.HIGHEST):
                baselines[Watch(part.baseline_of, BaselineKind.ROLLING)] = None
            baselines[Watch(part.baseline_of, part.baseline)] = None
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
        window=table.baseline.window,
        warmup=table.baseline.warmup,
    )
