"""Makes docker/prometheus/rules and docs/alerts.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from esper_tamiyo.language.table_file import load
from ops.generate.alerts import health
from ops.generate.alerts.alert import RUNBOOK_URL, Alert
from ops.generate.alerts.from_table import Translation, translated
from ops.generate.alerts.page import page
from ops.generate.alerts.promql import JUDGED
from ops.generate.files import COMMAND

RULES = Path("docker/prometheus/rules")
PAGE = Path("docs/alerts.md")
HEAD = f"# Made by {COMMAND}; edits here are lost.\n"


def files(runbook_url: str = RUNBOOK_URL) -> dict[Path, str]:
    """What is written, by its place in the repository."""
    table = load("default")
    from_table = translated(table)
    return {
        RULES / "table.yaml": _text(table_groups(from_table, runbook_url)),
        RULES / "health.yaml": _text(health_groups(runbook_url)),
        PAGE: page(table, from_table, health.runs(), [*health.tamiyo(), *health.collector()]),
    }


def table_groups(made: Translation, runbook_url: str) -> list[dict[str, object]]:
    """What is recorded once a minute, and what alerts of it."""
    judged = {"record": JUDGED.record, "expr": JUDGED.expr}
    alerts = [judged, *_written(made.alerts, runbook_url)]
    recordings = [{"record": one.record, "expr": one.expr} for one in made.recordings]
    return [
        {"name": "esper-baselines", "interval": "1m", "rules": recordings},
        {"name": "esper-table", "rules": alerts},
    ]


def health_groups(runbook_url: str) -> list[dict[str, object]]:
    """The alerts about runs that end, and about those who watch."""
    groups = {"runs": health.runs(), "tamiyo": health.tamiyo(), "collector": health.collector()}
    return [
        {"name": f"esper-{name}", "rules": _written(alerts, runbook_url)}
        for name, alerts in groups.items()
    ]


def _written(alerts: Sequence[Alert], runbook_url: str) -> list[dict[str, object]]:
    return [alert.written(runbook_url) for alert in alerts]


class _Dumper(yaml.SafeDumper):
    """Expressions of several lines stay lines."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def _text(groups: Sequence[Mapping[str, object]]) -> str:
    return HEAD + yaml.dump({"groups": list(groups)}, Dumper=_Dumper, sort_keys=False, width=96)
