"""An alert, and how Prometheus wants it written."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["info", "warning", "high", "critical"]

RUNBOOK = "docs/runbook.md"
"""Its place in the repository."""

RUNBOOK_URL = "{{ $externalURL }}/user/runbook.html"
"""Where links of alerts lead unless the generator is told otherwise: to the copy that
Prometheus serves itself (``--web.user-assets``), by its ``--web.external-url``."""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One alerting rule; ``anchor`` is its place in the runbook."""

    name: str
    expr: str
    for_: str
    severity: Severity
    anchor: str
    summary: str
    description: str
    labels: dict[str, str] = {}

    def written(self, runbook_url: str = RUNBOOK_URL) -> dict[str, object]:
        """As in a file of rules; ``runbook_url`` is the address of the whole runbook."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.for_,
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbook_url}#{self.anchor}",
            },
        }
