"""Playback: recorded requests as frames again, for tools and people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import BY_INSTRUMENT, INSTANCE_ID, RANK, RUN_ID, SEED_ID
from esper_otel.leyline.otlp_file import RecordingError
from esper_otel.stream.recording import read_recording

if TYPE_CHECKING:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics, ScopeMetrics
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource

_Values = dict[str, float]


def read_frames(path: Path) -> Iterator[StepFrame]:
    """The step frames of a metrics recording, in order of writing.

    Metrics that are not in the registry are passed over. Raises
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
        elif "step" in values:
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
