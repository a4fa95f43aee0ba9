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

Tamiyo judges every step and answers within the step. Prometheus judges four times a minute
what it was sent; its alerts are for people, and they work where no Tamiyo runs. They are in
[`docker/prometheus/rules`](../docker/prometheus/rules), made from the default table by
`{command}`; what to do about each stands in [the runbook]({runbook}).

The `runbook_url` of an alert is absolute: the copy of the runbook that Prometheus itself
serves, from `docker/prometheus/assets` (`--web.user-assets`), by its `--web.external-url`.
`{command} --runbook-url https://…/runbook` writes the rules with another address.

## How a table's rule is said in PromQL

A table counts observations, PromQL knows times. So the two agree about trouble that lasts,
and may differ about a single step:

- a rule that one observation is enough for (`for: 1`) looks at the most extreme value of the
  last five minutes, so nothing is missed between two evaluations;
- a rule that wants several looks at the median of the last minute, for a minute;
- parts of `all` that are about different values are compared at the same steps: at the newest
  step of each second of the last five minutes, or, where the rule wants several observations,
  of each five seconds of the last minute, more than half of which must agree. Of several steps
  within a second only the last is looked at so. Where a part looks at a range itself
  (`rises_by`, `unchanged_for`, …) all must be true within the same minutes;
- nothing is said of a rank that began less than {young} ago, nor of one whose run has ended
  well (`{ended}` says done or interrupted) and has made no step since: `{judged}`
  has those that are left;
- a rolling baseline is the median of the last ten minutes and counts after as many
  observations as the table's warm-up, so a rule that wants one says nothing of a run whose
  steps take longer than {longest_s} s; the lowest or highest ever are those of the last day;
- a record of excursions is the farthest of ten minutes, five minutes ago, and a value is beyond
  it when it is out by more than twice as much; `rising` has no counterpart, and a level that
  stays for five minutes is the ordinary one;
- what is to last for a minute must be told each minute: of longer steps at most those rules
  speak that have `0s` in the table below;
- the peers of a rank are all ranks of its run, itself included;
- `unchanged_for` is an hour without a change and with so many observations: never wrong, and
  late for fast steps;
- a rank is missing when it has told nothing for a minute and others of its run are so many
  steps ahead of it, while these go on; it may come back as another process. One that has said
  how its run ended is not missing. Whether a run of one rank that has said nothing ended or
  fell silent nobody can see from outside;
- `release` and `cooldown` have no counterpart; Tamiyo's do.

## Rules that alert

{said}

## Rules that do not

What they find is in `tamiyo_decisions_total` when it decides, and `TamiyoDecided` tells of
the grave ones.

{untranslated}

## About runs that end

A trainer says how its run ended; of one that is done, or was interrupted, nobody is told.

{runs}

## About those who watch

{health}
"""
