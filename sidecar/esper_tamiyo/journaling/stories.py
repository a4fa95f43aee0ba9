"""Stories: a decision, or notice, in the journal with all related entries."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

from esper_otel.leyline.decisions import RANK_OF, Action
from esper_otel.leyline.frames import MAX_STEP
from esper_otel.leyline.terminal import printable
from esper_tamiyo.journaling.entries import (
    AnyEntry,
    Changed,
    Decided,
    Found,
    Reported,
    RuleText,
    TableInUse,
)
from esper_tamiyo.judging.observer import RuleState

LATEST = "latest"
OF_UPDATE = "/update"
"""End of the ids of decisions about updates."""
NEAR = 5
"""Ids offered in place of one that is not there."""

_DIGITS = len(str(MAX_STEP))


class UnknownDecisionError(Exception):
    """No such decision in the journal; the text says what there is."""


class Story(NamedTuple):
    """A decision and what belongs to it."""

    decision: Decided
    report: Reported | None
    rules: dict[str, RuleText]
    """The rules of the table that decided, as far as the journal has them."""
    ended: int | None
    """The step at which the rule that decided let go, None when it was not seen to."""
    table: TableInUse | None = None
    """The table that decided, where the journal has it."""

    @property
    def told(self) -> list[Found]:
        """The findings to explain: the one that decided, or all of a notice."""
        decision = self.decision
        if decision.action is Action.CONTINUE:
            return decision.findings
        return [each for each in decision.findings if each.rule == decision.reason][:1]


def find_decision(entries: Iterable[AnyEntry], wanted: str, run: str = "") -> Story:
    """The story of the decision with the id ``wanted``, or of the latest (of ``run``).

    Of several with one id (a step asked about twice, a restarted run) it is the last.
    Raises :class:`UnknownDecisionError`.
    """
    search = _Search(wanted, run)
    for entry in entries:
        search.see(entry)
    return search.story()


class _Search:
    """What of the entries seen so far belongs to the decision that is looked for."""

    def __init__(self, wanted: str, run: str) -> None:
        # Ids and runs are compared as they are shown, so that what was printed is found.
        wanted, run = printable(wanted), printable(run)
        self._wanted = wanted
        self._run = run
        self._decision: Decided | None = None
        self._report: Reported | None = None
        self._ended: int | None = None
        self._rank, step = _parts(wanted)
        self._step = -1 if wanted.endswith(OF_UPDATE) else _number(step)
        self._tables: dict[str, TableInUse] = {}
        self._run_of: dict[str, str] = {}
        """By id, of every decision."""

    def see(self, entry: AnyEntry) -> None:
        """The next entry of the journal."""
        if isinstance(entry, TableInUse):
            self._tables[entry.version] = entry
        elif isinstance(entry, Decided):
            self._run_of[printable(entry.id)] = printable(entry.run)
            if self._is_wanted(entry):
                self._decision, self._report, self._ended = entry, None, None
        elif self._is_over(entry):
            self._decision = None
        elif self._decision is not None:
            self._see_what_followed(entry, self._decision)

    def story(self) -> Story:
        """Raises :class:`UnknownDecisionError` when there was no such decision."""
        decision = self._decision
        if decision is None:
            raise UnknownDecisionError(_unknown(self._wanted, self._run, self._run_of))
        table = self._tables.get(decision.table_version)
        rules = {rule.id: rule for rule in table.rules} if table else {}
        return Story(decision, self._report, rules, self._ended, table)

    def _is_wanted(self, entry: Decided) -> bool:
        """Whether it is the decision, or until that comes a notice that may still go on at
        its step: a notice is written once for as long as it is repeated."""
        before = self._decision
        if self._wanted == LATEST:  # every run falls silent some day
            is_news = before is None or not _is_of_silence(entry)
            return self._run in ("", printable(entry.run)) and is_news
        shown = printable(entry.id)
        if shown == self._wanted:
            return not _is_beside(entry, before)
        if before is not None and printable(before.id) == self._wanted:
            return False
        is_of_rank = _parts(shown)[0] == self._rank
        return entry.action is Action.CONTINUE and is_of_rank and entry.step < self._step

    def _is_over(self, entry: AnyEntry) -> bool:
        """Whether a notice that came before the wanted step ended before it as well."""
        notice = self._decision
        return (
            isinstance(entry, Changed)
            and notice is not None
            and self._wanted not in (LATEST, printable(notice.id))
            and entry.step <= self._step
            and _lets_go(entry, notice)
        )

    def _see_what_followed(self, entry: AnyEntry, decision: Decided) -> None:
        if isinstance(entry, Reported):
            if entry.decision == decision.id:
                self._report = entry
        elif isinstance(entry, Changed) and self._ended is None and _lets_go(entry, decision):
            self._ended = entry.step


def _lets_go(entry: Changed, decision: Decided) -> bool:
    """Whether the rule that decided ends with it."""
    return (
        (entry.run, entry.rank, entry.rule, entry.seed_id)
        == (decision.run, decision.rank, *main_rule(decision))
        and entry.step > decision.step
        and entry.after is RuleState.INACTIVE
    )


def main_rule(decision: Decided) -> tuple[str, str | None]:
    """The rule that decided, or the most severe of a notice, and the seed it is about."""
    if decision.action is not Action.CONTINUE or not decision.findings:
        return decision.reason, decision.target_seed
    found = max(decision.findings, key=lambda each: RANK_OF[each.severity])
    return found.rule, found.seed_id


def _is_of_silence(entry: Decided) -> bool:
    """Whether it is the notice that nothing comes any more."""
    return any("silent(s)" in found.values for found in entry.findings)


def _is_beside(entry: Decided, before: Decided | None) -> bool:
    """Whether it is a notice behind a step, as of silence, that has a decision already."""
    return (
        before is not None
        and entry.action is Action.CONTINUE
        and before.action is not Action.CONTINUE
        and (entry.id, entry.instance) == (before.id, before.instance)
    )


def _unknown(wanted: str, run: str, ids: dict[str, str]) -> str:
    if not ids:
        return "the journal holds no decision other than CONTINUE yet, and no notice"
    if wanted == LATEST:
        runs = sorted(set(ids.values()))
        return f"the journal holds no decision about run {run}; it knows {_some(runs)}"
    return (
        f"{wanted}: the journal holds no such decision (a CONTINUE without a finding is not "
        f"recorded); similar ids are {_some(_near(wanted, list(ids)))}"
    )


def _near(wanted: str, ids: list[str]) -> list[str]:
    """The ids of the same rank with the nearest steps, else those spelt most like it."""
    run_and_rank, step = _parts(wanted)
    same = [one for one in ids if _parts(one)[0] == run_and_rank]
    if same and _number(step) >= 0:
        return sorted(same, key=lambda one: abs(_number(_parts(one)[1]) - _number(step)))[:NEAR]
    return get_close_matches(wanted, ids, NEAR, 0.0)


def _parts(decision: str) -> tuple[str, str]:
    """Run and rank, and the step, of an id."""
    run_and_rank, _, step = decision.removesuffix(OF_UPDATE).rpartition("/")
    return run_and_rank, step


def _number(step: str) -> int:
    """The step that a part of an id says, -1 where it says none."""
    return int(step) if step.isdecimal() and len(step) <= _DIGITS else -1


def _some(names: list[str]) -> str:
    rest = len(names) - NEAR
    return ", ".join(names[:NEAR]) + (f" and {rest} more" if rest > 0 else "")
