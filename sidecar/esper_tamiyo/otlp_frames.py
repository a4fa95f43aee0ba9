"""OTLP metrics in, step frames out. Pure; the official protobuf classes do the parsing.

A producer's points of one step share a timestamp: within one resource they are gathered
by it, and ``tolaria.step`` at that time says which step it was. Walking points in Python
costs about 5 µs each, so metrics are told apart by name before a point is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

import msgspec
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as OtlpMetric
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint, ResourceMetrics

from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import BY_INSTRUMENT, INSTANCE_ID, RANK, RUN_ID, SEED_ID

SERVICE_NAME = "service.name"
MAX_STEP = 1 << 53
"""From here on a double no longer tells one step from the next."""


class Harvest(msgspec.Struct):
    """Frames of one request, and what became of its data points.

    ``used`` points are in the frames. ``foreign`` ones belong to other metrics and are
    none of our business. ``unusable`` ones carry a name of ours but no step at their
    time, no ``seed_id`` or no number; the producer is told about them.
    """

    frames: list[StepFrame]
    used: int = 0
    foreign: int = 0
    unusable: int = 0


class _Moment:
    """Points of one resource that share a timestamp."""

    __slots__ = ("nonfinite", "points", "seeds", "values")

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.seeds: dict[str, dict[str, float]] = {}
        self.nonfinite = 0
        self.points = 0


def frames_of(request: ExportMetricsServiceRequest) -> Harvest:
    """The step frames in ``request``, by resource and step."""
    harvest = Harvest([])
    for resource in request.resource_metrics:
        _reap(resource, harvest)
    return harvest


def _reap(group: ResourceMetrics, harvest: Harvest) -> None:
    moments: dict[int, _Moment] = {}
    for scope in group.scope_metrics:
        for metric in scope.metrics:
            known = BY_INSTRUMENT.get(metric.name)
            points = _number_points(metric) if known else None
            if known is None or points is None:
                harvest.foreign += _point_count(metric)
            elif known.scope == "seed":
                _take_seed_points(known.key, points, moments, harvest)
            else:
                _take_step_points(known.key, points, moments, harvest)
    run, rank, instance = _identity(group.resource.attributes)
    frames = []
    for time_unix_nano, moment in moments.items():
        step = moment.values.get("step")
        if step is None or not 0 <= step < MAX_STEP or step != int(step):
            harvest.unusable += moment.points
            continue
        harvest.used += moment.points
        if moment.nonfinite:
            moment.values["nonfinite"] = moment.values.get("nonfinite", 0.0) + moment.nonfinite
        frames.append(
            StepFrame(
                run, instance, rank, int(step), time_unix_nano, moment.values, moment.seeds
            )
        )
    frames.sort(key=_step)
    harvest.frames += frames


def _take_step_points(
    key: str,
    points: Iterable[NumberDataPoint],
    moments: dict[int, _Moment],
    harvest: Harvest,
) -> None:
    for point in points:
        value = _value(point)
        if value is None:
            harvest.unusable += 1
            continue
        moment = _at(moments, point.time_unix_nano)
        moment.points += 1
        if isfinite(value):
            moment.values[key] = value
        else:
            moment.nonfinite += 1


def _take_seed_points(
    key: str,
    points: Iterable[NumberDataPoint],
    moments: dict[int, _Moment],
    harvest: Harvest,
) -> None:
    for point in points:
        value = _value(point)
        seed_id = _text_of(point.attributes, SEED_ID)
        if value is None or not seed_id:
            harvest.unusable += 1
            continue
        moment = _at(moments, point.time_unix_nano)
        moment.points += 1
        seed = moment.seeds.setdefault(seed_id, {})
        if isfinite(value):
            seed[key] = value
        else:
            moment.nonfinite += 1


def _at(moments: dict[int, _Moment], time_unix_nano: int) -> _Moment:
    moment = moments.get(time_unix_nano)
    if moment is None:
        moment = moments[time_unix_nano] = _Moment()
    return moment


def _number_points(metric: OtlpMetric) -> Sequence[NumberDataPoint] | None:
    kind = metric.WhichOneof("data")
    if kind == "gauge":
        return metric.gauge.data_points
    if kind == "sum":
        return metric.sum.data_points
    return None


def _point_count(metric: OtlpMetric) -> int:
    kind = metric.WhichOneof("data")
    return len(getattr(metric, kind).data_points) if kind else 0


def _value(point: NumberDataPoint) -> float | None:
    kind = point.WhichOneof("value")
    if kind == "as_double":
        return point.as_double
    return float(point.as_int) if kind == "as_int" else None


def _identity(attributes: Sequence[KeyValue]) -> tuple[str, int, str]:
    """Run, rank and instance; the service's name stands in for a missing run."""
    run = _text_of(attributes, RUN_ID) or _text_of(attributes, SERVICE_NAME)
    rank = _text_of(attributes, RANK)
    # isdecimal alone accepts the digits of every script
    number = int(rank) if rank.isascii() and rank.isdecimal() and len(rank) < 10 else 0
    return run, number, _text_of(attributes, INSTANCE_ID)


def _text_of(attributes: Iterable[KeyValue], key: str) -> str:
    for attribute in attributes:
        if attribute.key == key:
            return _text(attribute.value)
    return ""


def _text(value: AnyValue) -> str:
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return value.string_value
    return str(value.int_value) if kind == "int_value" else ""


def _step(frame: StepFrame) -> int:
    return frame.step
