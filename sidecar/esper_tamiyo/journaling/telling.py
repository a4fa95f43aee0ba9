"""Entries of the journal as people read them, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

from esper_otel.leyline.decisions import SKIP_STEP
from esper_tamiyo.journaling.entries import (
    AnyEntry,
    Changed,
    Closed,
    Decided,
    Gap,
    Opened,
    Reported,
    TableInUse,
)
from esper_tamiyo.journaling.explain import told_values
from esper_tamiyo.journaling.journal import in_words


def line(entry: AnyEntry) -> str:
    """When, and what."""
    return f"{in_words(entry.time_unix_nano)}  {_told(entry)}"


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
    if SKIP_STEP in entry.parameters:
        asked = "to be left out"
    else:
        with_ = " and ".join(f"{name} {value:g}" for name, value in entry.parameters.items())
        asked = f"to be made with {with_}"
    what = f"update of step {entry.step} {asked}"
    return f"{what}: {entry.reason} ({entry.action}, {entry.severity})"


@_told.register
def _(entry: Changed) -> str:
    seed = f" of seed {entry.seed_id}" if entry.seed_id else ""
    silenced = f", silenced by {entry.silenced_by}" if entry.silenced_by else ""
    seen = ", ".join(told_values(entry.values))
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
