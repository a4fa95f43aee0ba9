"""Sources: the files of a report, and reading them in any format.

A recording, a spool, what a Collector's file exporter wrote, or a journal: what a file is
shows in its bytes, and in the endings of our own names. What cannot be read ends its file and
becomes a problem, in one line; what came before is shown.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

from esper_otel.leyline.decompression import DamagedError, ZstdMissingError, opened
from esper_otel.leyline.otlp_file import MAX_MESSAGE, RecordingError
from esper_otel.leyline.otlp_files import payloads, request_in
from esper_otel.leyline.protobuf import FieldError
from esper_otel.report.columns import ColumnReader, Producer
from esper_otel.report.rulings import Ledger
from esper_otel.report.telling import take_journal_line, take_logs, take_traces
from esper_otel.report.trainers import TrainerCurves

METRICS, LOGS, TRACES = ".metrics.otlp", ".logs.otlp", ".traces.otlp"
_ENDINGS = (METRICS, LOGS, TRACES)

SUMMARY = ".summary.json"
"""Ending of the summary that a run writes beside its report."""

_NONE = frozenset({".html", ".part"})
"""Endings of reports, and of files that a spool is still writing."""

_CARD = re.compile(r"run(?:-attempt\d+)?\.json")
"""What the card of a run at home is called."""

_JOURNAL_FILE = re.compile(r"journal-\d+\.jsonl")
_JOURNAL_LINE = re.compile(rb'\{(?:"at":"[^"]*",)?"kind":"')

HELD_OF_ALL = 1 << 24
"""Points of all curves that are held while files are read, 16 bytes each; with very many curves
each still holds :data:`FEWEST`."""
FEWEST = 1024

_LOOK_EVERY = 64 << 20
"""Bytes of a file after which it is looked at how many curves there are."""

OnBytes = Callable[[int], None]
"""Told how many bytes of all files have been read, now and then."""


class Archive:
    """All that was read. ``problems`` are for people, one line each.

    ``whole``: every point is held (16 bytes each), and none is thinned out.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._held = sys.maxsize if whole else None
        self.trainers: dict[Producer, TrainerCurves] = {}
        self.ledger = Ledger()
        self.problems: list[str] = []
        self._reader = ColumnReader()

    def read(self, paths: Sequence[Path], on_bytes: OnBytes = lambda _: None) -> None:
        """Read files and folders. Never raises for what is in them, or not there."""
        before = 0
        for path in self._files(paths):
            try:
                looked = 0
                for offset in self._read_file(path):
                    on_bytes(before + offset)
                    if offset - looked > _LOOK_EVERY:
                        looked = offset
                        self._bound_curves()
            except RecordingError as error:
                self.problems.append(f"{error}{'; read up to there' if error.offset else ''}")
            except (ZstdMissingError, DamagedError) as error:
                self.problems.append(f"{path}: {error}")
            except OSError as error:
                self.problems.append(f"{path}: {error.strerror or error}")
            self._bound_curves()
            before += _size(path)
        self._settle()

    def _bound_curves(self) -> None:
        """Have all curves together hold no more points than fit."""
        if self._held is not None:
            return
        curves = [c for trainer in self.trainers.values() for c in trainer.curves.values()]
        for curve in curves:
            curve.hold_at_most(max(HELD_OF_ALL // len(curves), FEWEST))

    def _settle(self) -> None:
        self.ledger.settle()
        for source, trainer in self.trainers.items():
            trainer.assemble_rest()
            trainer.attributes = self._reader.attributes.get(source, {})
            trainer.ended = self._reader.ends.get(source, "")
            if trainer.lost:
                self.problems.append(
                    f"run {source.run}, rank {source.rank}: {trainer.lost:,} values omitted, "
                    "because no step was recorded at their time"
                )
        for run, more in self.ledger.more.items():
            self.problems.append(
                f"run {run}: {more:,} more decisions, events and changes of rules are omitted"
            )
        self.trainers = {s: t for s, t in self.trainers.items() if t.steps()[0]}

    def _files(self, paths: Sequence[Path]) -> list[Path]:
        """The files to read, each once."""
        found: dict[Path, None] = {}
        for path in paths:
            try:
                some = list(files_of(path))
            except OSError as error:
                self.problems.append(f"{path}: {error.strerror or error}")
                continue
            if not some:
                self.problems.append(f"{path}: a folder without files")
            found.update(dict.fromkeys(some))
        return list(found)

    def _read_file(self, path: Path) -> Iterator[int]:
        before = sum(trainer.rows for trainer in self.trainers.values())
        if is_journal(path):
            yield from self._read_journal(path)
            return
        whole = path.name.endswith(METRICS)
        is_ours = False
        for offset, data in payloads(path):
            if whole and data[:1] != b"{":
                self._take_metrics(data, path, offset)
            else:
                is_ours |= self._take_any(data, path, offset)
            yield offset
        after = sum(trainer.rows for trainer in self.trainers.values())
        if after == before and not is_ours:
            self.problems.append(f"{path}: it has no data of esper-otel")

    def _take_metrics(self, data: bytes, path: Path, offset: int) -> None:
        try:
            for source, block in self._reader.read(data):
                trainer = self.trainers.get(source)
                if trainer is None:
                    trainer = self.trainers[source] = TrainerCurves(source, self._held)
                trainer.take_in(block)
        except FieldError:
            raise RecordingError(path, offset, "not an OTLP metrics request") from None

    def _take_any(self, data: bytes, path: Path, offset: int) -> bool:
        """Take a request of whatever signal; whether anything in it was of a run of ours."""
        ledger = self.ledger
        before = (len(ledger.rulings), len(ledger.happenings))
        request = request_in(data, ExportMetricsServiceRequest, path, offset)
        if isinstance(request, ExportMetricsServiceRequest):
            # JSON becomes bytes, so that one reader reads both.
            body = request.SerializeToString() if data[:1] == b"{" else data
            self._take_metrics(body, path, offset)
            return False
        if request is None:
            request = request_in(data, ExportTraceServiceRequest, path, offset)
        if request is None:
            request = request_in(data, ExportLogsServiceRequest, path, offset)
        if isinstance(request, ExportTraceServiceRequest):
            take_traces(request, ledger)
        elif isinstance(request, ExportLogsServiceRequest):
            take_logs(request, ledger)
        # The spans of a calm run say nothing that a report shows, and are ours all the same.
        quiet = path.name.endswith(_ENDINGS) or b"esper." in data
        return quiet or before != (len(ledger.rulings), len(ledger.happenings))

    def _read_journal(self, path: Path) -> Iterator[int]:
        offset = unread = 0
        with opened(path) as file:
            while line := file.readline(MAX_MESSAGE):
                if not line.isspace() and not take_journal_line(line, self.ledger):
                    unread += 1
                offset += len(line)
                yield offset
        if unread:
            self.problems.append(f"{path}: {unread:,} lines are not journal entries")


def files_of(path: Path) -> Iterator[Path]:
    """The files that belong to a recording; raises :class:`OSError` when there is none.

    Of a folder all that lie in it and in journals in it; of a file of ours also the other
    signals beside it.
    """
    if path.is_dir():
        for each in sorted(path.iterdir()):
            if each.is_dir() and each.name.endswith(("journal", ".journal")):
                yield from files_of(each)
            elif each.is_file() and not _is_none(each) and not _CARD.fullmatch(each.name):
                yield each
        return
    path.stat()
    yield path
    if path.name.endswith(METRICS):
        for ending in (LOGS, TRACES):
            beside = path.with_name(path.name.removesuffix(METRICS) + ending)
            if beside.exists():
                yield beside


def _is_none(path: Path) -> bool:
    """Whether its name says that no telemetry is in it."""
    return path.name.startswith(".") or path.suffix in _NONE or path.name.endswith(SUMMARY)


def size_of(paths: Sequence[Path]) -> int:
    """Bytes of all files that would be read, as far as they are there."""
    total = 0
    for path in paths:
        try:
            total += sum(_size(file) for file in files_of(path))
        except OSError:
            continue
    return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_journal(path: Path) -> bool:
    """Whether a file is one of a journal; raises :class:`OSError` when it cannot be read."""
    if _JOURNAL_FILE.fullmatch(path.name):
        return True
    if path.name.endswith(_ENDINGS):
        return False
    with path.open("rb") as file:
        return bool(_JOURNAL_LINE.match(file.read(200)))
