"""The report: runs to look at, in one file that needs nothing else.

It is made from what a run left: a recording, a spool, a Collector's file, a journal.
:func:`write_report` reads them (:mod:`~esper_otel.report.sources`), puts runs together
(:mod:`~esper_otel.report.runs`) and writes the page (:mod:`~esper_otel.report.page`), whose
charts are drawn by uPlot, which lies in ``page/uplot`` with its licence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from esper_otel.report.page import page_of
from esper_otel.report.runs import runs_of
from esper_otel.report.sources import Archive, OnBytes, size_of

__all__ = ["MOST_TOLD", "ReportError", "page_from", "size_of", "write_report"]


MOST_TOLD = 5
"""Problems that are told, each of which may be one of a folder of thousands."""


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
