"""The final report: the page that a run writes of itself when it is over."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
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
        self._kept: Path | None = None

    def recorded(self, settings: EsperSettings) -> EsperSettings:
        """``settings``, with a recording where the report needs one."""
        if self._to is None or settings.recording_dir or settings.record:
            return settings
        try:
            self._kept = Path(tempfile.mkdtemp(prefix="esper-report-"))
        except OSError as error:
            log.warning("no report can be made: %s", error)
            self._to = None
            return settings
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

    def without_kept(self, stream: StreamReport) -> StreamReport:
        """Remove what was recorded for it alone; ``stream`` without those files."""
        if self._kept is None:
            return stream
        shutil.rmtree(self._kept, ignore_errors=True)
        return msgspec.structs.replace(stream, recordings=())


def _files(settings: EsperSettings, run: str, stream: StreamReport) -> Iterator[Path]:
    """What this process recorded, and what other ranks did in the same folder."""
    yield from stream.recordings
    first = stream.recordings[0]
    attempt = first.name.removeprefix(stem(run, settings.rank)).partition(".")[0]
    for rank in range(1, settings.world_size):
        for signal in Signal:
            path = first.with_name(f"{stem(run, rank)}{attempt}.{signal}.otlp")
            if path.exists():
                yield path
