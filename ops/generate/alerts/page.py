"""``docs/alerts.md``: which alerts there are, and which rules are none and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper_otel.leyline.metrics import RUN_ENDED
from esper_tamiyo.language.table import Table
from ops.generate.alerts.alert import RUNBOOK, Alert
from ops.generate.alerts.from_table import Translation
from ops.generate.alerts.promql import JUDGED, PAST_S, YOUNG
from ops.generate.files import COMMAND
from ops.generate.prometheus_names import prometheus_name


def page(
    table: Table,
    made: Translation,
    about_runs: Sequence[Alert],
    about_health: Sequence[Alert],
) -> str:
    """The whole page, as Markdown."""
    texts = {rule.id: rule.text for rule in table.rules}
    untranslated = [
        f"| {_link(rule)} | {texts[rule]} | {why} |" for rule, why in made.untranslated.items()
    ]
    return _TEMPLATE.format(
        command=COMMAND,
        version=table.version.partition("+")[0],
        longest_s=f"{PAST_S / table.baseline.warmup:g}",
        ended=prometheus_name(RUN_ENDED),
        judged=JUDGED.record,
        young={"5m": "five minutes"}[YOUNG],
        said=_table(made.alerts),
        untranslated="\n".join(
            ["| rule | says | why not |", "| --- | --- | --- |", *untranslated]
        ),
        runs=_table(about_runs),
        health=_table(about_health),
        runbook=Path(RUNBOOK).name,
    )


def _table(alerts: Sequence[Alert]) -> str:
    rows = ["| alert | severity | for | summary |", "| --- | --- | --- | --- |"]
    rows += [
        f"| [{alert.name}]({Path(RUNBOOK).name}#{alert.anchor}) | {alert.severity} | "
        f"{alert.for_} | {alert.summary.replace('{{ $labels.', '`').replace(' }}', '`')} |"
        for alert in alerts
    ]
    return "\n".join(rows)


def _link(rule: str) -> str:
    return f"[{rule}]({Path(RUNBOOK).name}#{rule})"


_TEMPLATE = """\
<!-- Made by {command} from Tamiyo's default table; edits here are lost. -->

# Alerts

Tamiyo evaluates every step and answers within the step. Prometheus evaluates received metrics
four times a minute; its alerts notify people, and they work where no Tamiyo runs. The alert
rules are in [`docker/prometheus/rules`](../docker/prometheus/rules), made from the default
table by `{command}`. [The runbook]({runbook}) says how to respond to each.

The `runbook_url` of an alert is absolute: it points to the copy of the runbook that Prometheus
itself serves, from `docker/prometheus/assets` (`--web.user-assets`), under its
`--web.external-url`. `{command} --runbook-url https://…/runbook` writes the rules with another
address.

## How a table's rule becomes PromQL

A table counts observations; PromQL counts time. The two agree about lasting trouble, and may
differ about a single step:

- A rule that needs one observation (`for: 1`) uses the most extreme value of the last five
  minutes, so it misses nothing between two evaluations.
- A rule that needs several uses the median of the last minute, for a minute.
- Parts of `all` about different values are compared at the same steps: at the newest step of
  each second of the last five minutes, or, where the rule needs several observations, of each
  five seconds of the last minute, more than half of which must agree. Of several steps within
  a second, this comparison uses only the last. Where a part looks at a range itself
  (`rises_by`, `unchanged_for`, …), all must be true within the same minutes.
- Alerts ignore a rank that began less than {young} ago, and one whose run ended well
  (`{ended}` is done or interrupted) and has made no step since. `{judged}` has the remaining
  ranks.
- A rolling baseline is the median of the last ten minutes and counts after as many
  observations as the table's warm-up. A rule that needs one therefore ignores a run whose
  steps take longer than {longest_s} s. The lowest or highest ever are those of the last day.
- A record of excursions is the farthest of ten minutes, five minutes ago, and a value exceeds
  it when it is out by more than twice as much. `rising` has no counterpart, and a level that
  stays for five minutes becomes the ordinary one.
- An alert that must last for a minute needs a value each minute: for longer steps at most the
  rules with `0s` in the table below fire.
- The peers of a rank are all ranks of its run, including the rank itself.
- `unchanged_for` is an hour without a change and with so many observations: never wrong, and
  late for fast steps.
- A rank is missing when it has sent nothing for a minute and others of its run are so many
  steps ahead of it and continue; it may return as another process. A rank that reported its
  end is not missing. For a run of one rank without such a report, nothing distinguishes an end
  from an outage.
- `release` and `cooldown` have no counterpart; Tamiyo's do.

## Rules that alert

{said}

## Rules without an alert

Their findings are in `tamiyo_decisions_total` when Tamiyo decides, and `TamiyoDecided` alerts
on the severe ones.

{untranslated}

## Run alerts

A trainer reports how its run ended. A run that is done, or was interrupted, raises no alert.

{runs}

## Health alerts

{health}
"""
