"""Recordings: a run's telemetry, as steps with their proposals.

A recording is a file or a folder of them (:mod:`~esper_otel.leyline.otlp_files` says what
they may look like): one for each rank and signal, or a Collector's, rotated or not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from heapq import heapify, heappop, heappush
from pathlib import Path

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.decisions import Proposal, SeedOperation
from esper_otel.leyline.decompression import ZstdMissingError
from esper_otel.leyline.events import NO_OPERATION, PROPOSED, SEED_ID_ATTRIBUTE
from esper_otel.leyline.frames import MAX_STEP, StepFrame
from esper_otel.leyline.otlp_file import RecordingError
from esper_otel.leyline.otlp_files import Kind, requests
from esper_otel.leyline.terminal import printable
from esper_tamiyo.receiving.harvest import Harvest
from esper_tamiyo.receiving.moments import Identity, Moment
from esper_tamiyo.receiving.otlp_frames import moments_of
from esper_tamiyo.receiving.points import identity_of, text_of

METRICS, LOGS, TRACES = ".metrics.otlp", ".logs.otlp", ".traces.otlp"
"""Endings of our own files, which say what is in them."""

OPERATION_ATTRIBUTE = "esper.operation"
STEP_ATTRIBUTE = "esper.step"

HORIZON_NS = 10_000_000_000
"""More than senders and Collectors wait before they send what they have."""

FOREVER = 1 << 64

_DIGITS = len(str(MAX_STEP))

MAX_HELD = 100_000
"""Steps held at most, whatever their times say."""


class RecordedRuns:
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
            yield from self._with_proposals(assembly.add_request(request), run)
        yield from self._with_proposals(assembly.rest(), run)
        for operation in sorted(self.proposals.unknown):
            self.problems.append(f"a proposal was skipped: unknown operation {operation!r}")

    def _with_proposals(
        self, frames: Iterator[StepFrame], run: str
    ) -> Iterator[tuple[StepFrame, Proposal | None]]:
        for frame in frames:
            if frame.run not in self.runs:
                self.runs.append(frame.run)
            if not run or printable(frame.run) == printable(run):
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
                self.proposals.add_records(request)

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


class Assembly:
    """Takes requests, gives frames in the order in which they happened.

    A Collector cuts requests where it likes, also inside a step, and writes one rank after
    the other. So steps are held until the recording is :data:`HORIZON_NS` past them: by then
    what belongs to a step has joined it, and the ranks can go in order of time, as they did
    when each of them asked. ``tally`` counts the points of all requests.
    """

    def __init__(self) -> None:
        self.tally = Harvest([])
        self._held: dict[Identity, dict[int, Moment]] = {}
        self._due: list[tuple[int, Identity]] = []
        self._past = 0

    def add_request(self, request: ExportMetricsServiceRequest) -> Iterator[StepFrame]:
        """The frames that are complete now, by their time."""
        times: list[int] = []
        for group in request.resource_metrics:
            whose = identity_of(group)
            held = self._held.setdefault(whose, {})
            for time_unix_nano, moment in moments_of(group, self.tally).items():
                times.append(time_unix_nano)
                known = held.get(time_unix_nano)
                if known is not None:
                    if not known.join(moment):
                        self.tally.old += moment.points
                    continue
                held[time_unix_nano] = moment
                heappush(self._due, (time_unix_nano, whose))
        if times:
            # The oldest and not the newest of them: a request may hold much of one rank.
            self._past = max(self._past, min(times) - HORIZON_NS)
        yield from self._until(self._past)

    def rest(self) -> Iterator[StepFrame]:
        """The frames that are left when no more requests come."""
        yield from self._until(FOREVER)

    def _until(self, time_unix_nano: int) -> Iterator[StepFrame]:
        due = self._due
        while due and (due[0][0] <= time_unix_nano or len(due) > MAX_HELD):
            time, whose = heappop(due)
            moment = self._held[whose].pop(time)
            frame, end = moment.step_frame(whose, time), moment.end_frame(whose, time)
            if frame is None and end is None:
                self.tally.unusable += moment.points
                continue
            self.tally.used += moment.points
            if frame is not None:
                yield frame
            if end is not None:
                yield end


class Proposals:
    """Seed operations that a garden proposed, as a run's log records tell them.

    A trainer tells when what it proposes changes: the event of step S holds from S on, the
    ask of S included, until the next such event of the same process. ``none`` withdraws.
    """

    def __init__(self) -> None:
        self.unknown: set[str] = set()
        """Operations that this version does not know; their steps count as unproposed."""
        self._told: dict[Identity, dict[int, Proposal | None]] = {}
        self._steps: dict[Identity, list[int]] = {}

    def add_records(self, request: ExportLogsServiceRequest) -> None:
        """Remember the proposals among the records of a request."""
        for group in request.resource_logs:
            for scope in group.scope_logs:
                for record in scope.log_records:
                    if record.event_name != PROPOSED:
                        continue
                    step = text_of(record.attributes, STEP_ATTRIBUTE)
                    if not (step.isascii() and step.isdecimal() and len(step) <= _DIGITS):
                        continue
                    operation = text_of(record.attributes, OPERATION_ATTRIBUTE)
                    seed_id = text_of(record.attributes, SEED_ID_ATTRIBUTE)
                    told = self._told.setdefault(identity_of(group), {})
                    told[int(step)] = self._proposal(operation, seed_id)
        self._steps.clear()

    def at(self, frame: StepFrame) -> Proposal | None:
        """What went with the ask about ``frame``."""
        whose = Identity(frame.run, frame.rank, frame.instance)
        told = self._told.get(whose)
        if told is None:
            return None
        steps = self._steps.get(whose)
        if steps is None:
            steps = self._steps[whose] = sorted(told)
        place = bisect_right(steps, frame.step)
        return told[steps[place - 1]] if place else None

    def _proposal(self, operation: str, seed_id: str) -> Proposal | None:
        if operation == NO_OPERATION:
            return None
        try:
            return Proposal(seed_id, SeedOperation(operation))
        except ValueError:
            self.unknown.add(operation)
            return None


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
