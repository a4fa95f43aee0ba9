"""The report: runs to look at, in one file that needs nothing else.

It is made from what a run left: a recording, a spool, a Collector's file, a journal.
:func:`write_report` reads them (:mod:`~esper_otel.report.sources`), puts runs together
(:mod:`~esper_otel.report.runs`) and writes the page, whose charts are drawn by uPlot, which
lies in ``page/uplot`` with its licence.

The file may be opened from a mail: a content security policy in it forbids every address,
and every script and style but the five that are written here, by their hashes. What was
recorded is data in it, never markup: compressed, in base64, and put into the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from string import Template

from esper_otel.leyline.terminal import printable
from esper_otel.report.packing import BYTES, Rules, packed
from esper_otel.report.runs import ShownRun, runs_of
from esper_otel.report.sources import Archive, OnBytes, size_of

__all__ = [
    "MOST_TOLD",
    "ReportError",
    "live_page",
    "page_from",
    "page_of",
    "size_of",
    "write_report",
]

MOST_TOLD = 5
"""Problems that are told, each of which may be one of a folder of thousands."""

SCRIPTS = ("uplot/uPlot.iife.min.js", "elements.js", "report.js")
STYLES = ("uplot/uPlot.min.css", "report.css")

_MOST_NAMED = 3
_LONGEST_NAME = 200


class ReportError(Exception):
    """Nothing of what was given can be shown."""


def write_report(
    paths: Sequence[Path], to: Path, on_bytes: OnBytes = lambda _: None
) -> list[str]:
    """Write the report about what lies at ``paths``; returns what could not be shown.

    Raises :class:`ReportError` when nothing can be, and :class:`OSError` when ``to`` cannot be
    written. The file is there whole, or as it was before.
    """
    page, problems = page_from(paths, on_bytes)
    beside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        beside.write_text(page, "utf-8")
        beside.replace(to)
    finally:
        beside.unlink(missing_ok=True)
    return problems


def page_from(
    paths: Sequence[Path], on_bytes: OnBytes = lambda _: None
) -> tuple[str, list[str]]:
    """The report about what lies at ``paths``, and what could not be shown.

    Raises :class:`ReportError` when nothing can be.
    """
    archive = Archive()
    archive.read(paths, on_bytes)
    runs = runs_of(archive)
    if not runs:
        raise ReportError(_in_one_line(archive.problems))
    return page_of(runs, archive.ledger.rules, archive.problems), archive.problems


def _in_one_line(problems: Sequence[str]) -> str:
    if not problems:
        return "no run in it: expected a recording or a journal"
    more = len(problems) - MOST_TOLD
    return "; ".join(problems[:MOST_TOLD]) + (f"; and {more:,} more" if more > 0 else "")


def page_of(
    runs: Sequence[ShownRun], rules: Rules, problems: Sequence[str], most: int = BYTES
) -> str:
    """The page of ``runs``, with ``problems`` above them; about ``most`` bytes of data."""
    data = base64.b64encode(packed(runs, rules, problems, most)).decode()
    return _page(_title(runs), data)


@lru_cache(64)
def live_page(source: str) -> str:
    """The page without data, which gets them, and what is new, from below the path ``source``.

    For whoever serves it; it may ask nobody else.
    """
    return _page("esper-otel", "", source)


def _page(title: str, data: str, source: str = "") -> str:
    scripts, styles = ([_part(name) for name in names] for names in (SCRIPTS, STYLES))
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    ) + ("; connect-src 'self'" if source else "")
    return Template(_part("page.html")).substitute(
        title=html.escape(title),
        live=f' data-live="{html.escape(source, quote=True)}"' if source else "",
        policy=html.escape(policy, quote=True),
        styles="\n".join(f"<style>{style}</style>" for style in styles),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
        data=data,
    )


def _title(runs: Sequence[ShownRun]) -> str:
    names = [printable(run.title)[:_LONGEST_NAME] or "(no name)" for run in runs[:_MOST_NAMED]]
    more = f" and {len(runs) - _MOST_NAMED} more" if len(runs) > _MOST_NAMED else ""
    return f"{', '.join(names)}{more} · esper-otel report"


def _part(name: str) -> str:
    return files("esper_otel.report").joinpath("page", name).read_text("utf-8")


def _hashes(parts: Sequence[str]) -> str:
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
        for part in parts
    )
