"""From the rules of a threshold table to alerts, and to the list of those that are none."""

from __future__ import annotations

import msgspec

from esper_otel.leyline.decisions import Severity as Grade
from esper_tamiyo.language.table import Rule, Table
from ops.generate.alerts.alert import Alert, Severity
from ops.generate.alerts.promql import (
    RECENT,
    SEED_KEYS,
    Recording,
    Translator,
    UntranslatableError,
    guarded,
    is_lasting,
)

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
    untranslated: dict[str, str]


def translated(table: Table) -> Translation:
    """Every rule of ``table``, in its order."""
    translator = Translator(table.baseline)
    alerts: list[Alert] = []
    untranslated: dict[str, str] = {}
    for rule in table.rules:
        try:
            expression = translator.translate(rule)
        except UntranslatableError as error:
            untranslated[rule.id] = str(error)
            continue
        alerts.append(_alert(rule, guarded(expression), expression.of_seeds))
    used = " ".join(text for text in (*(alert.expr for alert in alerts), *_exprs(translator)))
    recordings = [one for name, one in translator.recordings.items() if name in used]
    return Translation(recordings, alerts, untranslated)


def _exprs(translator: Translator) -> list[str]:
    return [one.expr for one in translator.recordings.values()]


def _alert(rule: Rule, expr: str, of_seeds: bool) -> Alert:
    run, rank = (f"{{{{ $labels.{key} }}}}" for key in SEED_KEYS[:2])
    whose = f"Run {run}, rank {rank}"
    if of_seeds:
        whose += f", seed {{{{ $labels.{SEED_KEYS[-1]} }}}}"
    at_once = not is_lasting(rule)
    return Alert(
        name="Esper" + "".join(word.capitalize() for word in rule.id.split("_")),
        expr=expr,
        # What lasted one step stays for as long as it is looked for.
        for_="0s" if at_once else RECENT,
        severity=_SEVERITIES[rule.severity],
        anchor=rule.id,
        labels={"rule": rule.id, "action": rule.action.value},
        summary=rule.text,
        description=f"{whose}: {rule.when}. Seen: {{{{ $value | humanize }}}}",
    )
