"""Recording: OTLP in files, one for each signal, and what can be read from them again.

:mod:`esper_otel.leyline.otlp_file` has their format.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.limits import MAX_STEP
from esper_otel.leyline.metrics import BY_INSTRUMENT, INSTANCE_ID, RANK, RUN_ID, SEED_ID
from esper_otel.leyline.otlp_file import RecordingError, framed
from esper_otel.leyline.otlp_file import bodies as bodies_in
from esper_otel.stream.destination import Signal

if TYPE_CHECKING:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics, ScopeMetrics
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource

log = logging.getLogger("esper_otel")


LONGEST_RUN = 120
"""Characters of a run's name in the names of its files, which may have 255 in all."""


def stem(run_id: str, rank: int, pid: int | None = None) -> str:
    """Name of a run's files without folder and ending.

    What no file name has becomes _. A name that changes by this, or is cut, ends in a hash of
    the whole one, so that no two runs share their files.
    """
    name = re.sub(r"[^\w.-]", "_", run_id, flags=re.ASCII).lstrip(".")
    if name != run_id or not 0 < len(name) <= LONGEST_RUN:
        digest = hashlib.sha256(run_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name[: LONGEST_RUN - len(digest) - 1]}-{digest}"
    return f"{name}-rank{rank}" + ("" if pid is None else f"-{pid}")


def signal_of(path: Path) -> Signal | None:
    """The signal that the name of a recording tells, None when it tells none."""
    for signal in Signal:
        if path.name.endswith(f".{signal}.otlp"):
            return signal
    return None


def read_recording(path: Path) -> Iterator[bytes]:
    """The requests in ``path``, in order.

    Raises :class:`~esper_otel.leyline.otlp_file.RecordingError` at the first byte from
    which on there is none, after everything before it was yielded, and :class:`OSError`
    when it cannot be read.
    """
    with path.open("rb") as file:
        for _, body in bodies_in(file, path):
            yield body


class Recording:
    """Everything a run produces, appended to one file per signal as it comes.

    A disk that fails ends the recording with one warning; the run goes on.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder = folder
        self._stem = stem
        self._files: dict[Signal, int] = {}
        self._paths: dict[Signal, Path] = {}
        self._failed = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files written so far."""
        return tuple(self._paths.values())

    def append(self, signal: Signal, body: bytes) -> None:
        """Write one request. Never raises."""
        if self._failed:
            return
        try:
            write_whole(self._file(signal), framed(body))
        except Exception as error:
            self._failed = True
            log.warning("recording to %s stopped: %s", self._folder, error)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, signal: Signal) -> int:
        if signal not in self._files:
            path = self._folder / f"{self._stem}.{signal}.otlp"
            self._files[signal] = open_to_append(path)
            self._paths[signal] = path
        return self._files[signal]


def open_to_append(path: Path) -> int:
    """A descriptor that appends to ``path``, which is made with its folder.

    Unbuffered: a forked child has nothing to flush twice. Raises :class:`OSError`.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def write_whole(file: int, data: bytes) -> None:
    """All of ``data``, or none of it and :class:`OSError`."""
    before = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, before)
        raise


_Values = dict[str, float]


def read_frames(path: Path) -> Iterator[StepFrame]:
    """The step frames of a metrics recording, in order of writing.

    Metrics that are not in the registry are passed over, and so are values that are no numbers
    and steps without a number that a step may have. Raises
    :class:`~esper_otel.leyline.otlp_file.RecordingError` where the file turns bad.
    """
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )

    offset = 0
    for body in read_recording(path):
        try:
            request = ExportMetricsServiceRequest.FromString(body)
        except DecodeError:
            raise RecordingError(path, offset, "not an OTLP metrics request") from None
        for resource_metrics in request.resource_metrics:
            yield from _frames(resource_metrics)
        offset += 4 + len(body)


def _frames(resource_metrics: ResourceMetrics) -> Iterator[StepFrame]:
    """Frames of one resource: a step's ``ScopeMetrics``, and its seeds' by their time."""
    run, instance, rank = _identity(resource_metrics.resource)
    steps: list[tuple[int, _Values]] = []
    seeds: dict[int, dict[str, _Values]] = {}
    for scope_metrics in resource_metrics.scope_metrics:
        time_unix_nano, seed_id, values = _values(scope_metrics)
        if seed_id is not None:
            seeds.setdefault(time_unix_nano, {})[seed_id] = values
        elif 0 <= values.get("step", -1.0) <= MAX_STEP:
            steps.append((time_unix_nano, values))
    for time_unix_nano, values in steps:
        yield StepFrame(
            run=run,
            instance=instance,
            rank=rank,
            step=int(values["step"]),
            time_unix_nano=time_unix_nano,
            values=values,
            seeds=seeds.get(time_unix_nano, {}),
        )


def _values(scope_metrics: ScopeMetrics) -> tuple[int, str | None, _Values]:
    """(time, seed id, values) of one ``ScopeMetrics`` as the stream writes it."""
    values: _Values = {}
    time_unix_nano, seed_id = 0, None
    for metric in scope_metrics.metrics:
        registered = BY_INSTRUMENT.get(metric.name)
        if registered is None:
            continue
        for point in metric.gauge.data_points:
            time_unix_nano = point.time_unix_nano
            if isfinite(point.as_double):
                values[registered.key] = point.as_double
            for attribute in point.attributes:
                if attribute.key == SEED_ID:
                    seed_id = attribute.value.string_value
    return time_unix_nano, seed_id, values


def _identity(resource: Resource) -> tuple[str, str, int]:
    """(run, instance, rank), empty and 0 where the resource does not say."""
    attributes = {attribute.key: attribute.value for attribute in resource.attributes}
    run, instance = (
        attributes[key].string_value if key in attributes else ""
        for key in (RUN_ID, INSTANCE_ID)
    )
    return run, instance, attributes[RANK].int_value if RANK in attributes else 0
