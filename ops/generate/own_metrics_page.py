"""Makes the table of Tamiyo's own metrics within ``docs/decisions.md``."""

from __future__ import annotations

from pathlib import Path

from esper_tamiyo.journaling.own_metrics import OWN_METRICS
from ops.generate.files import ROOT, with_section

PAGE = Path("docs/decisions.md")
BEGIN, END = "<!-- own metrics: generated -->", "<!-- own metrics: end -->"


def files() -> dict[Path, str]:
    """The page that lies in the repository, with the table of today."""
    return {PAGE: renewed((ROOT / PAGE).read_text(encoding="utf-8"))}


def renewed(page: str) -> str:
    """``page`` with the table of today between its two marks."""
    return with_section(page, BEGIN, END, markdown())


def markdown() -> str:
    """The table for people."""
    lines = [
        "| metric | kind | unit | attributes | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in OWN_METRICS:
        names = ", ".join(f"`{name}`" for name in metric.attributes)
        cells = (f"`{metric.name}`", metric.kind, f"`{metric.unit}`", names, metric.meaning)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
