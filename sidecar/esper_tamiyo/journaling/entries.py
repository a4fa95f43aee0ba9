"""Entries: what the journal holds, one JSON object a line, and how each reads on one line.

Field names are stable: ``docs/decisions.md`` lists them, readers ignore fields they do
not know, and a field is never given another meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import singledispatch

import msgspec

from esper_otel.leyline.decisions import RESTORE, SKIP_STEP, Action, SeedOperation, Severity
from esper_tamiyo.judging.observer import RuleState

_LAST_SECOND = 253_402_300_799.0
"""The end of the year 9999."""

AGAINST = {
    "baseline": "baseline",
    "frozen": "frozen baseline",
    "lowest": "lowest baseline",
    "highest": "highest baseline",
    "peers": "other ranks",
    "previous": "before",
    "missing": "missing for",
    "left": "left",
}
"""What a value was held against: as findings name it, and as it is told."""

RATIOS = frozenset({"baseline", "frozen", "lowest", "highest", "peers"})

_OF = re.compile(rf"({'|'.join(AGAINST)})\((.+)\)")


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
    """A decision other than CONTINUE.

    ``findings`` are in the order of the table; the one whose rule is ``reason`` won.
    ``mode`` is what the trainer does with decisions: ``enforce``, ``advise`` or, where
    none has said so, "". ``asked`` is False when the step came in the stream only.
    ``decided_unix_nano`` is by the sidecar's clock, ``took_ms`` since it saw the step.
    ``update``: it is about the update of the step, which was not made yet; ``parameters`` say
    what was decided, and the field report what became of it.
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
    """What a run did after a decision; see :mod:`esper_tamiyo.journaling.field_reports`.

    ``before`` and ``after`` are medians over at most ``window`` steps, ``during`` the
    values of the step itself; a metric nobody sent is left out. ``observed`` is how many steps
    after the decision were seen.

    ``lr_scale`` and ``skipped`` are of the update of the step itself, as the trainer made it:
    the factor of its rates, and whether it was left out. ``scaled_from`` is the first step
    after it whose update had another factor, None where none had; ``lr_scale_after`` is the
    factor from there on. None is also what the trainer did not say. ``skipped_after`` counts
    the updates left out among ``observed``.
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


class RuleText(msgspec.Struct, frozen=True):
    """One rule of a table, as far as people need it to understand a decision."""

    id: str
    action: Action
    severity: Severity
    when: str
    text: str


class TableInUse(Entry, frozen=True, kw_only=True, tag="table"):
    """The table that is decided by from here on; repeated at the top of each file."""

    version: str
    rules: list[RuleText]


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


AnyEntry = Decided | Changed | Reported | TableInUse | Opened | Closed | Gap


# Each as people read it.


def format_entry(entry: AnyEntry) -> str:
    """One line for people: when, and what."""
    return f"{rfc3339(entry.time_unix_nano)}  {_told(entry)}"


@singledispatch
def _told(entry: object) -> str:
    raise TypeError(f"{type(entry).__name__} is no entry of the journal")


@_told.register
def _(entry: Decided) -> str:
    extras = [f"{name} {value:g}" for name, value in entry.parameters.items()]
    if entry.seed_operation is not None:
        extras.append(f"{entry.seed_operation} of seed {entry.target_seed}")
    if entry.conservative:
        extras.append("conservative")
    if entry.update:
        return f"{entry.id}  {_of_update(entry)}"
    tail = f" ({', '.join(extras)})" if extras else ""
    return f"{entry.id}  {entry.action} {entry.severity}: {entry.reason}{tail}"


def _of_update(entry: Decided) -> str:
    """What was decided of an update; what became of it is for the field report to say."""
    if RESTORE in entry.parameters:
        asked = "to be left out for a snapshot that is put back"
    elif SKIP_STEP in entry.parameters:
        asked = "to be left out"
    else:
        with_ = " and ".join(f"{name} {value:g}" for name, value in entry.parameters.items())
        asked = f"to be made with {with_}"
    what = f"update of step {entry.step} {asked}"
    return f"{what}: {entry.reason} ({entry.action}, {entry.severity})"


@_told.register
def _(entry: Changed) -> str:
    seed = f" of seed {entry.seed_id}" if entry.seed_id else ""
    silenced = f", inhibited by {entry.silenced_by}" if entry.silenced_by else ""
    seen = ", ".join(format_values(entry.values))
    return (
        f"{entry.run}/{entry.rank}/{entry.step}  {entry.rule}{seed}: "
        f"{entry.before} → {entry.after}{silenced}" + (f"  [{seen}]" if seen else "")
    )


@_told.register
def _(entry: Reported) -> str:
    why = f" ({entry.because})" if entry.because else ""
    made = "".join(f"; {words}" for words in _made(entry))
    return f"{entry.decision}  afterwards, {entry.observed} steps: {entry.outcome}{why}{made}"


def _made(entry: Reported) -> Iterator[str]:
    """What is out of the ordinary in how updates were made."""
    if entry.skipped:
        yield f"update of step {entry.step} left out"
    elif entry.update and entry.lr_scale is not None and entry.lr_scale != 1.0:
        yield f"update of step {entry.step} made at {entry.lr_scale:g} times the script's rate"
    if entry.scaled_from is not None:
        yield (
            f"updates made at {entry.lr_scale_after:g} times the script's rate from step "
            f"{entry.scaled_from} on"
        )
    if entry.skipped_after:
        yield f"{entry.skipped_after} later updates left out"


@_told.register
def _(entry: TableInUse) -> str:
    return f"decides by table {entry.version}, {len(entry.rules)} rules"


@_told.register
def _(entry: Opened) -> str:
    return f"the journal is opened by process {entry.pid}, release {entry.release}"


@_told.register
def _(entry: Closed) -> str:
    return f"the journal is closed by process {entry.pid}"


@_told.register
def _(entry: Gap) -> str:
    return f"{entry.lost} entries are missing here: {entry.because}"


def format_values(values: dict[str, float]) -> Iterator[str]:
    """Values, each with what it was held against."""
    against: dict[str, list[str]] = {}
    shown = []
    for key, value in values.items():
        match = _OF.fullmatch(key)
        if match is None:
            shown.append(key)
            continue
        what, metric = match[1], match[2]
        text = f"{AGAINST[what]} {value:.4g}"
        if what in RATIOS and value > 0 and metric in values:
            text += f", {values[metric] / value:.3g} times that"
        against.setdefault(metric, []).append(text)
    for key in shown:
        told = against.pop(key, None)
        yield f"{key} {values[key]:.4g}" + (f" ({'; '.join(told)})" if told else "")
    for metric, told in against.items():
        yield f"{'; '.join(told)} (of {metric})"


def rfc3339(time_unix_nano: int) -> str:
    """RFC 3339, in UTC; the nearest time there is a name for, whatever a producer sent."""
    seconds = min(max(time_unix_nano, 0) / 1e9, _LAST_SECOND)
    at = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    return at.replace("+00:00", "Z")
