"""Rulings: decisions about a run, and its other events, from any source.

Spans tell what the trainer was answered, a journal what the sidecar decided and what came of
it. Both use one id, so what one of them knows joins what the other does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice

import msgspec

MOST = 20_000
"""Rulings of a run that are kept with all their values; more are counted."""

MOST_CONFIG = 512
"""Hyper-parameters of a run that are kept."""

WORDS = 400_000
"""Letters of different texts that are kept, of all rulings and happenings together."""

CONTINUE = "CONTINUE"


class Ground(msgspec.Struct, frozen=True):
    """A rule that fired, and the values it saw."""

    rule: str
    action: str = ""
    severity: str = ""
    text: str = ""
    values: dict[str, float] = {}
    seed_id: str | None = None


class Aftermath(msgspec.Struct, frozen=True):
    """What a run did after a ruling: an outcome, sentences, and (before, at, after) by key.

    ``applied``: something was done to the run; None where nobody knows.
    """

    outcome: str
    applied: bool | None = None
    sentences: list[str] = []
    values: dict[str, list[float | None]] = {}


class Ruling(msgspec.Struct, kw_only=True):
    """One decision, or notice: a CONTINUE with findings.

    ``of_update``: it is about the update of the step, before it was made. ``applied`` is None
    where nobody says.
    """

    id: str
    run: str
    rank: int
    step: int
    time_unix_nano: int
    action: str
    severity: str
    reason: str
    of_update: bool = False
    mode: str = ""
    applied: bool | None = None
    conservative: bool = False
    target_seed: str | None = None
    seed_operation: str | None = None
    table_version: str = ""
    parameters: dict[str, float] = {}
    findings: list[Ground] = []
    aftermath: Aftermath | None = None


class Happening(msgspec.Struct, frozen=True):
    """An event of a run: of a seed, or of its weights."""

    run: str
    rank: int
    step: int
    time_unix_nano: int
    name: str
    severity: str
    text: str
    seed_id: str = ""


class RuleSpell(msgspec.Struct, frozen=True):
    """A rule that was in one state from a step to another; ``end`` None: to the last."""

    rank: int
    rule: str
    seed_id: str
    state: str
    start: int
    end: int | None


class Ledger:
    """All rulings, happenings and states of rules that were read."""

    def __init__(self) -> None:
        self.rulings: dict[str, Ruling] = {}
        self.happenings: list[Happening] = []
        self.aftermaths: dict[str, Aftermath] = {}
        self.changes: dict[tuple[str, int, str, str], list[tuple[int, str]]] = defaultdict(list)
        """(run, rank, rule, seed) → (step, state from then on), as a journal tells it."""
        self.rules: dict[str, tuple[str, str]] = {}
        """Rule → its condition in words, and its text."""
        self.configs: dict[str, dict[str, str | int | float | bool]] = {}
        """Run → its hyper-parameters, by the attributes that tell them."""
        self.more: dict[str, int] = {}
        """Run → rulings, happenings and changes of rules that were too many to keep."""
        self._kept: dict[str, int] = {}
        self._changed = 0
        self._told: set[tuple[str, int, int, str, str]] = set()
        self._texts: set[str] = set()
        self._words = 0

    def add(self, ruling: Ruling) -> None:
        """Take in what one source knows; a ruling in which nothing was found is none."""
        if ruling.action == CONTINUE and not ruling.findings:
            return
        known = self.rulings.get(ruling.id)
        if known is None:
            kept = self._kept.get(ruling.run, 0)
            if kept >= MOST or not self._has_room(ruling.reason, *_texts_of(ruling)):
                self.more[ruling.run] = self.more.get(ruling.run, 0) + 1
                return
            self._kept[ruling.run] = kept + 1
        else:
            ruling.applied = known.applied if ruling.applied is None else ruling.applied
            ruling.mode = ruling.mode or known.mode
            ruling.findings = ruling.findings or known.findings
        self.rulings[ruling.id] = ruling

    def tell(self, happening: Happening) -> None:
        """Take in an event, which may come by spans as well as by logs."""
        what = (
            happening.run,
            happening.rank,
            happening.step,
            happening.name,
            happening.seed_id,
        )
        if what in self._told:
            return
        texts = (happening.name, happening.text, happening.seed_id)
        if len(self._told) >= MOST or not self._has_room(*texts):
            self.more[happening.run] = self.more.get(happening.run, 0) + 1
            return
        self._told.add(what)
        self.happenings.append(happening)

    def configure(self, run: str, values: Mapping[str, str | int | float | bool]) -> None:
        """Take in hyper-parameters of a run; of one name the newest value counts."""
        known = self.configs.setdefault(run, {})
        for name, value in values.items():
            room = len(known) < MOST_CONFIG or name in known
            if room and self._has_room(name, value if isinstance(value, str) else ""):
                known[name] = value

    def change(self, whose: tuple[str, int, str, str], step: int, state: str) -> None:
        """Take in that a rule, of (run, rank, rule, seed), is in a state from a step on."""
        if self._changed >= MOST or not self._has_room(*whose[2:]):
            self.more[whose[0]] = self.more.get(whose[0], 0) + 1
            return
        self._changed += 1
        self.changes[whose].append((step, state))

    def _has_room(self, *texts: str) -> bool:
        """Whether there is room for ``texts``, which are then kept."""
        fresh = {text for text in texts if text not in self._texts}
        words = sum(map(len, fresh))
        if self._words + words > WORDS:
            return False
        self._words += words
        self._texts |= fresh
        return True

    def forget_old(self, most: int) -> int:
        """Keep the ``most`` newest rulings and happenings; returns how many rulings went."""
        gone = max(len(self.rulings) - most, 0)
        if not gone and len(self.happenings) <= most and not self.more:
            return 0
        self.rulings = dict(islice(self.rulings.items(), gone, None))
        happenings, self.happenings = self.happenings[-most:], []
        for kept in (self._told, self._texts, self.aftermaths, self.changes, self.more):
            kept.clear()
        self._changed = self._words = 0
        self._kept = Counter(ruling.run for ruling in self.rulings.values())
        for ruling in self.rulings.values():
            self._has_room(ruling.reason, *_texts_of(ruling))
        for happening in happenings:
            self.tell(happening)
        return gone

    def settle(self) -> None:
        """Give each ruling what came of it."""
        for name, aftermath in self.aftermaths.items():
            ruling = self.rulings.get(name)
            if ruling is not None:
                ruling.aftermath = aftermath
                if ruling.applied is None:
                    ruling.applied = aftermath.applied

    def runs(self) -> set[str]:
        """The runs that anything is known of."""
        return {ruling.run for ruling in self.rulings.values()} | {
            happening.run for happening in self.happenings
        }

    def states(self, run: str) -> list[RuleSpell]:
        """When each rule of ``run`` was in a state other than inactive.

        Of ranks that no journal tells of: when it was found to fire, by rulings.
        """
        found: list[RuleSpell] = []
        told = set()
        for (whose, rank, rule, seed), changes in self.changes.items():
            if whose != run:
                continue
            told.add(rank)
            changes.sort(key=lambda change: change[0])
            ends = [*(step for step, _ in changes[1:]), None]
            for (start, state), end in zip(changes, ends, strict=True):
                if state != "inactive":
                    found.append(RuleSpell(rank, rule, seed, state, start, end))
        return [*found, *self._firing(run, told)]

    def _firing(self, run: str, told: set[int]) -> list[RuleSpell]:
        steps: dict[tuple[int, str, str], set[int]] = defaultdict(set)
        for ruling in self.rulings.values():
            if ruling.run == run and ruling.rank not in told:
                for ground in ruling.findings:
                    whose = (ruling.rank, ground.rule, ground.seed_id or "")
                    steps[whose].add(ruling.step)
        found = []
        for (rank, rule, seed), firing in steps.items():
            ordered = sorted(firing)
            start = before = ordered[0]
            for step in [*ordered[1:], None]:
                if step is not None and step <= before + 1:
                    before = step
                    continue
                found.append(RuleSpell(rank, rule, seed, "firing", start, before + 1))
                if step is not None:
                    start = before = step
        return found


def _texts_of(ruling: Ruling) -> Iterator[str]:
    yield ruling.target_seed or ""
    yield from ruling.parameters
    for ground in ruling.findings:
        yield from (ground.rule, ground.text, ground.seed_id or "", *ground.values)
