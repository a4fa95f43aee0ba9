"""Entries: the contents of the journal, one JSON object a line.

Field names are stable: ``docs/decisions.md`` lists them, readers ignore fields they do
not know, and a field is never given another meaning.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

import msgspec

from esper_otel.leyline.decisions import Action, SeedOperation, Severity
from esper_tamiyo.judging.observer import RuleState
from esper_tamiyo.language.table import Condition, Group, Table, conditions

MAX_CONDITIONS = 400
"""Conditions of a table, about 140 bytes each, that its entry can have."""

_LAST_SECOND = 253_402_300_799
"""The end of the year 9999."""


class Proposed(msgspec.Struct, frozen=True):
    """The seed operation that came with an ask."""

    seed_id: str
    operation: SeedOperation


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A rule that fired, as a finding of the decision has it, and since which step.

    ``pending_since`` is when its condition began to hold, ``firing_since`` when it had
    held for long enough; None where the sidecar did not see it begin.
    """

    rule: str
    action: Action
    severity: Severity
    text: str
    values: dict[str, float]
    seed_id: str | None = None
    pending_since: int | None = None
    firing_since: int | None = None


class Silenced(msgspec.Struct, frozen=True):
    """A rule that would have been heard, had not ``by`` inhibited it."""

    rule: str
    by: str
    seed_id: str | None = None


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What all lines have: ``kind``, and when the step ended that they are about.

    For lines that are about no step, ``time_unix_nano`` is when they were written.
    """

    time_unix_nano: int


class Decided(Entry, frozen=True, kw_only=True, tag="decision"):
    """A decision other than CONTINUE, or a notice: a CONTINUE with findings.

    ``findings`` are in the order of the table; the one whose rule is ``reason`` won.
    ``mode`` is what the trainer does with decisions: ``enforce``, ``advise`` or, where
    none has said so, "". ``asked`` is False when the step came in the stream only.
    ``decided_unix_nano`` is by the sidecar's clock, ``took_ms`` since it saw the step.
    ``update``: it is about the update of the step, which was not made yet; ``parameters`` say
    what was decided, and the outcome report what became of it.
    """

    id: str
    run: str
    rank: int
    instance: str
    step: int
    observed_step: int
    action: Action
    severity: Severity
    reason: str
    target_seed: str | None
    seed_operation: SeedOperation | None
    parameters: dict[str, float]
    conservative: bool
    table_version: str
    mode: str
    asked: bool
    decided_unix_nano: int
    took_ms: float
    proposal: Proposed | None
    findings: list[Found]
    silenced: list[Silenced]
    update: bool = False


class Changed(Entry, frozen=True, kw_only=True, tag="rule"):
    """A rule went from one state to another; see ``RuleChange`` for the fields."""

    run: str
    rank: int
    step: int
    rule: str
    severity: Severity
    seed_id: str | None
    before: RuleState
    after: RuleState
    since_step: int
    values: dict[str, float]
    silenced_by: str


class Reported(Entry, frozen=True, kw_only=True, tag="field_report"):
    """What a run did after a decision; see :mod:`esper_tamiyo.journaling.outcomes`.

    ``before`` and ``after`` are medians over at most ``window`` steps, ``during`` the
    values of the step itself; a metric nobody sent is left out. ``observed`` is how many steps
    after the decision were seen.

    ``lr_scale`` and ``skipped`` are of the update of the step itself, as the trainer made it:
    the factor of its rates, and whether it was left out. ``scaled_from`` is the first step
    after it whose update had another factor, None where none had; ``lr_scale_after`` is the
    factor from there on. None is also what the trainer did not say. ``skipped_after`` counts
    the updates left out among ``observed``.

    ``applied``: something was done to the run within the window, None where nobody knows.
    ``comparison`` says in words what such excursions of the run did when ``left_alone``, of
    which so many ``came_back``. ``rule`` is the one that decided, ``saw`` what it saw.
    """

    decision: str
    run: str
    rank: int
    step: int
    action: Action
    reason: str
    mode: str
    outcome: str
    because: str
    window: int
    observed: int
    before: dict[str, float]
    during: dict[str, float]
    after: dict[str, float]
    update: bool = False
    lr_scale: float | None = None
    skipped: bool | None = None
    scaled_from: int | None = None
    lr_scale_after: float | None = None
    skipped_after: int = 0
    applied: bool | None = None
    left_alone: int = 0
    came_back: int = 0
    comparison: str = ""
    rule: str = ""
    saw: dict[str, float] = {}


class RuleSilence(Entry, frozen=True, kw_only=True, tag="silence"):
    """A rule was silenced for a run, or is heard again (``undone``).

    ``after_step`` is the newest step of the run then, ``until_step`` the last one for which
    it is silenced: None until the run ends. ``uid`` is the user who asked for it.
    """

    run: str
    rule: str
    after_step: int
    until_step: int | None
    undone: bool
    uid: int


class Ended(Entry, frozen=True, kw_only=True, tag="ended"):
    """A rank said that its run has ended, ``how`` (``done``, ``exception``, ``interrupted``).

    ``exception`` is the name of the type that ended it, "" if none did. ``step`` is the last
    that it made; ``steps`` is how many the sidecar has seen of that process, ``decisions`` how
    many of its decisions about them were not CONTINUE.
    """

    run: str
    rank: int
    instance: str
    step: int
    how: str
    exception: str
    steps: int
    decisions: int


class RuleText(msgspec.Struct, frozen=True):
    """One rule of a table, as far as people need it to understand a decision.

    ``when`` says its ``condition`` in words. That is None in a journal of before there was
    this field, and where a table has too many for one entry.
    """

    id: str
    action: Action
    severity: Severity
    when: str
    text: str
    condition: Condition | Group | None = None


class TableInUse(Entry, frozen=True, kw_only=True, tag="table"):
    """The table that is decided by from here on; repeated at the top of each file.

    ``source`` is the name or file that the sidecar was started with, "" where that is not
    known; ``window`` what its baselines span, 0 likewise.
    """

    version: str
    rules: list[RuleText]
    source: str = ""
    window: int = 0


class Opened(Entry, frozen=True, kw_only=True, tag="opened"):
    """A sidecar began to write here."""

    pid: int
    release: str


class Closed(Entry, frozen=True, kw_only=True, tag="closed"):
    """It ended in good order; a journal without this line ended with a kill."""

    pid: int


class Gap(Entry, frozen=True, kw_only=True, tag="gap"):
    """``lost`` entries before this line could not be written, and why."""

    lost: int
    because: str


class StateRestored(Entry, frozen=True, kw_only=True, tag="restored"):
    """A sidecar began with what the one before it knew, kept in ``folder``.

    ``ranks`` were put back, ``steps`` judged again on the way; ``too_old`` ranks and ``unfit``
    ones, which could not be read, began anew. ``age_s`` is how long before the start a step
    was judged last, ``table`` the version of the table then. ``problem`` says why nothing was
    put back, ``table_error`` why the table's file could not be used and the last good one
    stayed.
    """

    folder: str
    ranks: int
    steps: int
    too_old: int
    unfit: int
    age_s: float | None
    table: str
    problem: str
    table_error: str


AnyEntry = (
    Decided
    | Changed
    | Reported
    | RuleSilence
    | Ended
    | TableInUse
    | Opened
    | Closed
    | Gap
    | StateRestored
)


def rfc3339(time_unix_nano: int) -> str:
    """RFC 3339, in UTC; the nearest time there is a name for, whatever a producer sent."""
    seconds = min(max(time_unix_nano, 0), _LAST_SECOND * 1_000_000_000) / 1e9
    at = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    return at.replace("+00:00", "Z")


def table_entry(table: Table, source: str) -> TableInUse:
    """The entry that says which table is decided by, and by which name or file it was got.

    Without the conditions where there are too many for one message to the journal writer.
    """
    count = sum(1 for rule in table.rules for _ in conditions(rule.when))
    is_small = count <= MAX_CONDITIONS
    return TableInUse(
        time_unix_nano=time.time_ns(),
        version=table.version,
        rules=[
            RuleText(
                id=rule.id,
                action=rule.action,
                severity=rule.severity,
                when=str(rule.when),
                text=rule.text,
                condition=rule.when if is_small else None,
            )
            for rule in table.rules
        ],
        source=source,
        window=table.baseline.window,
    )
