"""Entries of the journal as people read them, one line each."""

from __future__ import annotations

from functools import singledispatch

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
    tail = f" ({', '.join(extras)})" if extras else ""
    return f"{entry.id}  {entry.action} {entry.severity}: {entry.reason}{tail}"


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
    return f"{entry.decision}  afterwards, {entry.observed} steps: {entry.outcome}{why}"


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
