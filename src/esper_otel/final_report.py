"""The final report: the page that a run writes of itself when it is over."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from esper_otel.settings import EsperSettings
from esper_otel.stream import StreamReport
from esper_otel.stream.destination import Signal
from esper_otel.stream.recording import stem

log = logging.getLogger("esper_otel")


class FinalReport:
    """Keeps what a report is made from, where nobody records it anyway, and makes it.

    Nothing here raises: what goes wrong is logged, and the run ends as it would have.
    """

    def __init__(self, settings: EsperSettings) -> None:
        self._to = Path(settings.report) if settings.report and not settings.rank else None
        self._is_asked_later = is_notebook() and not settings.rank
        """Whether somebody may ask for it when the run is over."""
        self._kept: Path | None = None

    def recorded(self, settings: EsperSettings) -> EsperSettings:
        """``settings``, with a recording where the report needs one."""
        is_recorded = settings.recording_dir or settings.record
        if is_recorded or not (self._to or self._is_asked_later):
            return settings
        try:
            self._kept = Path(tempfile.mkdtemp(prefix="esper-report-"))
        except OSError as error:
            log.warning("no report can be made: %s", error)
            self._to = None
            return settings
        weakref.finalize(self, _remove, self._kept, os.getpid())
        return msgspec.structs.replace(settings, recording_dir=str(self._kept))

    def write_at_end(
        self, settings: EsperSettings, run: str, stream: StreamReport
    ) -> tuple[str, StreamReport]:
        """:meth:`make` it; its path, and ``stream`` without what was recorded for it alone."""
        page = self.make(settings, run, stream)
        return page, self.without_kept(stream)

    def make(self, settings: EsperSettings, run: str, stream: StreamReport) -> str:
        """Write it, from what has been recorded of all ranks; its path, "" without one.

        Without a step there is none: a process that asks for one may be a worker of another.
        """
        if self._to is None or not stream.recordings:
            return ""
        from esper_otel.report import write_report

        try:
            problems = write_report(list(_files(settings, run, stream)), self._to)
            for problem in problems:
                log.warning("report: %s", problem)
        except Exception as error:
            log.warning("no report was made: %s", error)
            return ""
        return str(self._to)

    def page_now(self, settings: EsperSettings, run: str, stream: StreamReport) -> str:
        """The page of what has been recorded so far. Raises :class:`RuntimeError`."""
        from esper_otel.report import ReportError, page_from

        some = _files(settings, run, stream) if stream.recordings else ()
        paths = [path for path in some if path.exists()]
        if not paths:
            raise RuntimeError(
                "this run has no recording for a report: expected a run with a step in "
                "a notebook, or one that began with recording_dir=... or report=..."
            )
        try:
            return page_from(paths)[0]
        except ReportError as error:
            raise RuntimeError(f"no report can be made yet: {error}") from None

    def without_kept(self, stream: StreamReport) -> StreamReport:
        """Remove what was recorded for it alone; ``stream`` without those files.

        In a notebook it stays for as long as the run and the process do.
        """
        if self._kept is None:
            return stream
        if not self._is_asked_later:
            _remove(self._kept, os.getpid())
        return msgspec.structs.replace(stream, recordings=())


def write_beside(page: Path, summary: str) -> None:
    """Write a summary, a line of JSON, beside a report: ``run.summary.json`` for ``run.html``.

    Where that cannot be, a warning says so.
    """
    from esper_otel.report.sources import SUMMARY

    to = page.with_name(f"{page.stem}{SUMMARY}")
    beside = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        beside.write_text(f"{summary}\n", "utf-8")
        beside.replace(to)
    except OSError as error:
        log.warning("no summary was written beside the report: %s", error)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def _remove(folder: Path, pid: int) -> None:
    """Remove what a process kept; a forked child leaves it to its parent."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _files(settings: EsperSettings, run: str, stream: StreamReport) -> Iterator[Path]:
    """What this process recorded, and what other ranks did in the same folder."""
    yield from stream.recordings
    if not stream.recordings:
        return
    first = stream.recordings[0]
    attempt = first.name.removeprefix(stem(run, settings.rank)).partition(".")[0]
    for rank in range(1, settings.world_size):
        for signal in Signal:
            path = first.with_name(f"{stem(run, rank)}{attempt}.{signal}.otlp")
            if path.exists():
                yield path
