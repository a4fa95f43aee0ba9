"""From the rules of a threshold table to alerts, and to the list of those that are none."""

from __future__ import annotations

import msgspec

from alerts.alert import Alert, Severity
from alerts.promql import RECENT, SEED_KEYS, Recording, Speaker, UnsayableError
from esper_otel.leyline.decisions import Severity as Grade
from esper_tamiyo.language.table import Rule, Table

_SEVERITIES: dict[Grade, Severity] = {
    Grade.NORMAL: "info",
    Grade.WARNING: "warning",
    Grade.HIGH: "high",
    Grade.CRITICAL: "critical",
}


class Translation(msgspec.Struct, frozen=True):
    """A table in PromQL: what is recorded, what alerts, and why the rest does not."""

    recordings: list[Recording]
    alerts: list[Alert]
    unsaid: dict[str, str]


def translated(table: Table) -> Translation:
    """Every rule of ``table``, in its order."""
    speaker = Speaker(table.baseline)
    alerts: list[Alert] = []
    unsaid: dict[str, str] = {}
    for rule in table.rules:
        try:
            said = speaker.say(rule)
        except UnsayableError as error:
            unsaid[rule.id] = str(error)
            continue
        alerts.append(_alert(rule, said.text, said.of_seeds))
    used = " ".join(text for text in (*(alert.expr for alert in alerts), *_exprs(speaker)))
    recordings = [one for name, one in speaker.recordings.items() if name in used]
    return Translation(recordings, alerts, unsaid)


def _exprs(speaker: Speaker) -> list[str]:
    return [one.expr for one in speaker.recordings.values()]


def _alert(rule: Rule, expr: str, of_seeds: bool) -> Alert:
    run, rank = (f"{{{{ $labels.{key} }}}}" for key in SEED_KEYS[:2])
    whose = f"Run {run}, rank {rank}"
    if of_seeds:
        whose += f", seed {{{{ $labels.{SEED_KEYS[-1]} }}}}"
    at_once = rule.persistence == 1
    return Alert(
        name="Esper" + "".join(word.capitalize() for word in rule.id.split("_")),
        expr=expr,
        for_="0s" if at_once else RECENT,
        # What lasted one step is out of the last minute before somebody has read it.
        keep_firing_for="5m" if at_once else "",
        severity=_SEVERITIES[rule.severity],
        anchor=rule.id,
        labels={"rule": rule.id, "action": rule.action.value},
        summary=rule.text,
        description=f"{whose}: {rule.when}. Seen: {{{{ $value | humanize }}}}",
    )
