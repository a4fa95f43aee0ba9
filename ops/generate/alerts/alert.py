"""An alert, and how Prometheus wants it written."""

from __future__ import annotations

from typing import Literal

import msgspec

Severity = Literal["info", "warning", "high", "critical"]

RUNBOOK = "docs/runbook.md"
"""Relative to the repository: put your own copy's address before it."""


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
    keep_firing_for: str = ""

    def written(self) -> dict[str, object]:
        """As in a file of rules."""
        kept = {"keep_firing_for": self.keep_firing_for} if self.keep_firing_for else {}
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.for_,
            **kept,
            "labels": {"severity": self.severity, **self.labels},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{RUNBOOK}#{self.anchor}",
            },
        }
