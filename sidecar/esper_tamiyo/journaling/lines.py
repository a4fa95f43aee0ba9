"""Lines: how each entry of the journal, and the values in it, read on one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import singledispatch

from esper_otel.leyline.decisions import RESTORE, SKIP_STEP, Action
from esper_tamiyo.journaling.entries import (
    AnyEntry,
    Changed,
    Closed,
    Decided,
    Ended,
    Gap,
    Opened,
    Reported,
    RuleSilence,
    StateRestored,
    TableInUse,
    rfc3339,
)
from esper_tamiyo.judging.silences import SILENCED, SilenceOrder

QUANTITIES = {
    "level": "level",
    "scatter": "scatter",
    "expected": "limit of its record",
    "excursions": "excursions so far",
    "farthest": "farthest of them in scatters",
}
"""What a rule knows of the past of a metric, beside baselines: as findings name it, and as it
is told."""

AGAINST = {
    **QUANTITIES,
    "baseline": "baseline",
    "frozen": "frozen baseline",
    "lowest": "lowest baseline",
    "highest": "highest baseline",
    "upper": "upper end before",
    "lower": "lower end before",
    "peers": "other ranks",
    "previous": "before",
    "missing": "missing for",
    "left": "left",
}
"""What a value was held against: as findings name it, and as it is told."""

OUTCOMES = {
    "came_back": "came back by itself",
    "got_better": "got better by itself",
    "stayed": "stayed, nothing was done",
    "got_worse": "got worse, nothing was done",
}
"""Outcomes of reports that are told in other words: those where nothing was done."""

RATIOS = frozenset({"baseline", "frozen", "lowest", "highest", "peers"})

_OF = re.compile(rf"({'|'.join(AGAINST)})\((.+)\)")


def format_entry(entry: AnyEntry) -> str:
    """One line for people: when, and what."""
    return f"{rfc3339(entry.time_unix_nano)}  {_told(entry)}"


@singledispatch
def _told(entry: object) -> str:
    raise TypeError(f"{type(entry).__name__} is no entry of the journal")


@_told.register
def _(entry: Decided) -> str:
    if entry.action is Action.CONTINUE:
        rules = ", ".join(f"{found.rule} ({found.severity})" for found in entry.findings)
        return f"{entry.id}  notice: {rules}"
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
    """What was decided of an update; what became of it is for the outcome report to say."""
    if RESTORE in entry.parameters:
        asked = "to be skipped for a restored snapshot"
    elif SKIP_STEP in entry.parameters:
        asked = "to be skipped"
    else:
        with_ = " and ".join(f"{name} {value:g}" for name, value in entry.parameters.items())
        asked = f"to be made with {with_}"
    what = f"update of step {entry.step} {asked}"
    return f"{what}: {entry.reason} ({entry.action}, {entry.severity})"


@_told.register
def _(entry: Changed) -> str:
    seed = f" of seed {entry.seed_id}" if entry.seed_id else ""
    silenced = f", {why_unheard(entry.silenced_by)}" if entry.silenced_by else ""
    seen = ", ".join(format_values(entry.values))
    return (
        f"{entry.run}/{entry.rank}/{entry.step}  {entry.rule}{seed}: "
        f"{entry.before} → {entry.after}{silenced}" + (f"  [{seen}]" if seen else "")
    )


@_told.register
def _(entry: Reported) -> str:
    why = f" ({entry.because})" if entry.because else ""
    made = "".join(f"; {words}" for words in _made(entry))
    outcome = OUTCOMES.get(entry.outcome, entry.outcome)
    return f"{entry.decision}  afterwards, {entry.observed} steps: {outcome}{why}{made}"


def _made(entry: Reported) -> Iterator[str]:
    """What there is to compare the outcome with, what is out of the ordinary in how updates
    were made, and what the rule held normal."""
    if entry.comparison:
        yield entry.comparison
    if entry.skipped:
        yield f"update of step {entry.step} skipped"
    elif entry.update and entry.lr_scale is not None and entry.lr_scale != 1.0:
        yield f"update of step {entry.step} made at {entry.lr_scale:g} times the script's rate"
    if entry.scaled_from is not None and entry.lr_scale_after is not None:
        yield (
            f"updates made at {entry.lr_scale_after:g} times the script's rate from step "
            f"{entry.scaled_from} on"
        )
    if entry.skipped_after:
        yield f"{entry.skipped_after} later updates skipped"
    if entry.saw:
        yield f"{entry.rule} saw {', '.join(format_values(entry.saw))}"


@_told.register
def _(entry: RuleSilence) -> str:
    order = SilenceOrder(
        entry.run, entry.rule, entry.after_step, entry.until_step, entry.undone
    )
    return f"{entry.run}  {entry.rule} {order.told}, by user {entry.uid}"


@_told.register
def _(entry: Ended) -> str:
    how = f"{entry.how} {entry.exception}".strip()
    return (
        f"{entry.run}/{entry.rank}/{entry.step}  run ended: {how}; "
        f"{entry.steps} steps seen, {entry.decisions} decisions"
    )


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
def _(entry: StateRestored) -> str:
    kept = f"the table in use stays, its file cannot be used: {entry.table_error}"
    told = [kept] if entry.table_error else []
    if entry.problem:
        told.append(f"all ranks start afresh, state could not be restored: {entry.problem}")
    elif entry.age_s is not None:
        told.append(
            f"{entry.ranks} ranks continue from a step {entry.age_s:.1f} s before the start, "
            f"{entry.too_old + entry.unfit} start afresh"
        )
    return "; ".join(told)


@_told.register
def _(entry: Gap) -> str:
    return f"{entry.lost} entries are missing here: {entry.because}"


def why_unheard(by: str) -> str:
    """Why a rule is not heard: because of another rule, or of somebody."""
    return "silenced for the run" if by == SILENCED else f"inhibited by {by}"


def seen_beside(metric: str, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """What a rule saw beside the value of ``metric`` that is no baseline of it: each word
    and its value, words that are not known here included."""
    for key, value in values.items():
        word, _, rest = key.partition("(")
        if rest == f"{metric})" and (word in QUANTITIES or word not in AGAINST):
            yield word, value


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
