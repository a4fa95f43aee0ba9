"""Recordings: what a run sent, as steps with what was proposed at each.

A recording is a file or a folder of them (:mod:`~esper_tamiyo.replaying.otlp_files` says what
they may look like): one for each rank and signal, or a Collector's, rotated or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from heapq import heapify, heappop, heappush
from pathlib import Path

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.decisions import Proposal
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.otlp_file import RecordingError
from esper_tamiyo.receiving.otlp_frames import Harvest
from esper_tamiyo.replaying.assembly import Assembly
from esper_tamiyo.replaying.decompression import ZstdMissingError
from esper_tamiyo.replaying.otlp_files import Kind, requests
from esper_tamiyo.replaying.proposals import Proposals

METRICS, LOGS, TRACES = ".metrics.otlp", ".logs.otlp", ".traces.otlp"
"""Endings of our own files, which say what is in them."""


class Recording:
    """One recorded run, or several. ``problems`` are known once it was read to the end."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`OSError` when there is nothing at ``path``."""
        self.problems: list[str] = []
        self.points = Harvest([])
        self.runs: list[str] = []
        self.proposals = Proposals()
        self._files = _files(path)

    def steps(self, run: str = "") -> Iterator[tuple[StepFrame, Proposal | None]]:
        """Every step by its time, of one run or of all, with what was proposed at it.

        What cannot be read ends its file and becomes a line of ``problems``.
        """
        self._read_proposals()
        assembly = Assembly()
        self.points = assembly.tally
        for request in self._in_order():
            yield from self._with_proposals(assembly.take(request), run)
        yield from self._with_proposals(assembly.rest(), run)
        for operation in sorted(self.proposals.unknown):
            self.problems.append(f"a proposal was left out: unknown operation {operation!r}")

    def _with_proposals(
        self, frames: Iterator[StepFrame], run: str
    ) -> Iterator[tuple[StepFrame, Proposal | None]]:
        for frame in frames:
            if frame.run not in self.runs:
                self.runs.append(frame.run)
            if not run or frame.run == run:
                yield frame, self.proposals.at(frame)

    def _read_proposals(self) -> None:
        """First of all, as a proposal may be written after the step that it holds from."""
        for path in self._files:
            if path.name.endswith(METRICS):
                continue
            found = requests(path, ExportLogsServiceRequest)
            # What is wrong with any other file is told when its metrics are read.
            told = self._problems_of if path.name.endswith(LOGS) else _silently
            for request in told(found, path):
                self.proposals.take(request)

    def _in_order(self) -> Iterator[ExportMetricsServiceRequest]:
        """The requests of all files by their time; a file is open only while it has to be."""
        paths = [path for path in self._files if not path.name.endswith(LOGS)]
        waiting = [(_start(path), place) for place, path in enumerate(paths)]
        heapify(waiting)
        under_way: list[tuple[int, int, ExportMetricsServiceRequest]] = []
        files: dict[int, Iterator[ExportMetricsServiceRequest]] = {}
        while waiting or under_way:
            if waiting and (not under_way or waiting[0][0] <= under_way[0][0]):
                _, place = heappop(waiting)
                path = paths[place]
                found = requests(path, ExportMetricsServiceRequest)
                files[place] = self._problems_of(found, path)
            else:
                _, place, request = heappop(under_way)
                yield request
            following = next(files[place], None)
            if following is not None:
                heappush(under_way, (_time(following), place, following))

    def _problems_of(self, found: Iterator[Kind], path: Path) -> Iterator[Kind]:
        """What was found, and where that ends too early a line of ``problems``."""
        try:
            yield from found
        except RecordingError as error:
            self.problems.append(f"{error}; read up to there")
        except ZstdMissingError as error:
            self.problems.append(f"{path}: {error}")
        except OSError as error:
            self.problems.append(f"{path}: {error.strerror or error}")


def _silently(found: Iterator[Kind], path: Path) -> Iterator[Kind]:
    with suppress(RecordingError, ZstdMissingError, OSError):
        yield from found


def _start(path: Path) -> int:
    """The time of the first metrics in a file, 0 when there are none."""
    for request in _silently(requests(path, ExportMetricsServiceRequest), path):
        return _time(request)
    return 0


def _time(request: ExportMetricsServiceRequest) -> int:
    """The time of its first point, 0 when it has none."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.gauge.data_points or metric.sum.data_points:
                    return point.time_unix_nano
    return 0


def _files(path: Path) -> list[Path]:
    """The files that belong to a recording; raises :class:`OSError` when there is none."""
    if path.is_dir():
        return sorted(
            file
            for file in path.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith(TRACES)
        )
    path.stat()
    beside = path.with_name(path.name.removesuffix(METRICS) + LOGS)
    return [path, beside] if path.name.endswith(METRICS) and beside.exists() else [path]
