"""OTLP metrics in, step frames out. Pure; the official protobuf classes do the parsing.

A producer's points of one step share a timestamp: within one resource they are gathered
by it, and ``tolaria.step`` at that time says which step it was. Walking points in Python
costs about 5 µs each, so metrics are told apart by name before a point is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import NamedTuple

import msgspec
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import ResourceLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as OtlpMetric
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint, ResourceMetrics

from esper_otel.leyline.endings import RunEnd, run_end
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import (
    BY_INSTRUMENT,
    EXCEPTION_TYPE,
    HOW_ENDED,
    INSTANCE_ID,
    RANK,
    RUN_ENDED,
    RUN_ID,
    SEED_ID,
)

SERVICE_NAME = "service.name"
MAX_STEP = 1 << 53
"""From here on a double no longer tells one step from the next."""


class Harvest(msgspec.Struct):
    """Frames of one request, and what became of its data points.

    ``used`` points are in the frames. ``foreign`` ones belong to other metrics and are
    none of our business. ``unusable`` ones carry a name of ours but no step at their
    time, no ``seed_id`` or no number; the producer is told about them. ``old`` ones are
    of steps that came too late to be decided on.
    """

    frames: list[StepFrame]
    used: int = 0
    foreign: int = 0
    unusable: int = 0
    old: int = 0


class Identity(NamedTuple):
    """Whose points a resource holds."""

    run: str
    rank: int
    instance: str


class Moment:
    """Points of one trainer that share a timestamp."""

    __slots__ = ("end", "nonfinite", "points", "seeds", "values")

    def __init__(self) -> None:
        self.end: tuple[int, RunEnd] | None = None
        """The last step of a run that ended then, and how it ended."""
        self.values: dict[str, float] = {}
        self.seeds: dict[str, dict[str, float]] = {}
        self.points = 0
        self.nonfinite = 0

    def join(self, other: Moment) -> None:
        """Take in what came in another request, unless that is a second copy of the step."""
        if "step" in self.values and "step" in other.values:
            return
        self.values.update(other.values)
        for seed_id, values in other.seeds.items():
            self.seeds.setdefault(seed_id, {}).update(values)
        self.end = self.end or other.end
        self.points += other.points
        self.nonfinite += other.nonfinite

    def step_frame(self, whose: Identity, time_unix_nano: int) -> StepFrame | None:
        """The step it was, None when no point says which."""
        step = self.values.get("step")
        if step is None or not 0 <= step < MAX_STEP or step != int(step):
            return None
        if self.nonfinite:
            self.values["nonfinite"] = self.values.get("nonfinite", 0.0) + self.nonfinite
            self.nonfinite = 0
        return StepFrame(
            whose.run,
            whose.instance,
            whose.rank,
            int(step),
            time_unix_nano,
            self.values,
            self.seeds,
        )

    def end_frame(self, whose: Identity, time_unix_nano: int) -> StepFrame | None:
        """The end of a run that it was, None when it was none."""
        if self.end is None:
            return None
        run, rank, instance = whose
        step, ended = self.end
        return StepFrame(run, instance, rank, step, time_unix_nano, {}, ended=ended)


def _never(whose: Identity, time_unix_nano: int) -> bool:
    return False


def frames_of(
    request: ExportMetricsServiceRequest, is_old: Callable[[Identity, int], bool] = _never
) -> Harvest:
    """The step frames in ``request``, by resource and step, without those that are old."""
    harvest = Harvest([])
    for group in request.resource_metrics:
        whose = identity_of(group)
        frames, ends = [], []
        for time_unix_nano, moment in moments_of(group, harvest).items():
            frame = moment.step_frame(whose, time_unix_nano)
            end = moment.end_frame(whose, time_unix_nano)
            if end is not None:  # however late: nothing is decided about it
                ends.append(end)
            if frame is None:
                if end is not None:
                    harvest.used += moment.points
                    continue
                harvest.unusable += moment.points
                continue
            if is_old(whose, time_unix_nano):
                harvest.old += moment.points
                continue
            harvest.used += moment.points
            frames.append(frame)
        frames.sort(key=_step)
        harvest.frames += frames + ends
    return harvest


def moments_of(group: ResourceMetrics, harvest: Harvest) -> dict[int, Moment]:
    """The points of one resource by their time; those that have no place are counted."""
    moments: dict[int, Moment] = {}
    for scope in group.scope_metrics:
        for metric in scope.metrics:
            known = BY_INSTRUMENT.get(metric.name)
            points = _number_points(metric) if known else None
            if known is None and metric.name == RUN_ENDED.instrument:
                _take_ends(metric, moments, harvest)
            elif known is None or points is None:
                harvest.foreign += _point_count(metric)
            elif known.scope == "seed":
                _take_seed_points(known.key, points, moments, harvest)
            else:
                _take_step_points(known.key, points, moments, harvest)
    return moments


def _take_step_points(
    key: str,
    points: Iterable[NumberDataPoint],
    moments: dict[int, Moment],
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
    moments: dict[int, Moment],
    harvest: Harvest,
) -> None:
    for point in points:
        value = _value(point)
        seed_id = text_of(point.attributes, SEED_ID)
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


def _take_ends(metric: OtlpMetric, moments: dict[int, Moment], harvest: Harvest) -> None:
    for point in metric.gauge.data_points:
        step, how = _value(point), text_of(point.attributes, HOW_ENDED)
        end = run_end(how, text_of(point.attributes, EXCEPTION_TYPE))
        if end is None or step is None or not 0 <= step < MAX_STEP or step != int(step):
            harvest.unusable += 1
            continue
        moment = _at(moments, point.time_unix_nano)
        moment.points += 1
        moment.end = int(step), end


def _at(moments: dict[int, Moment], time_unix_nano: int) -> Moment:
    moment = moments.get(time_unix_nano)
    if moment is None:
        moment = moments[time_unix_nano] = Moment()
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
    # What is not zero has been set; asking which of the two it is costs four times as much.
    if number := point.as_double:
        return number
    kind = point.WhichOneof("value")
    if kind == "as_double":
        return point.as_double
    return float(point.as_int) if kind == "as_int" else None


def identity_of(group: ResourceMetrics | ResourceLogs) -> Identity:
    """Whose it is; the service's name stands in for a missing run."""
    attributes = group.resource.attributes
    run = text_of(attributes, RUN_ID) or text_of(attributes, SERVICE_NAME)
    rank = text_of(attributes, RANK)
    # isdecimal alone accepts the digits of every script
    number = int(rank) if rank.isascii() and rank.isdecimal() and len(rank) < 10 else 0
    return Identity(run, number, text_of(attributes, INSTANCE_ID))


def text_of(attributes: Iterable[KeyValue], key: str) -> str:
    """The attribute as text, empty when it is missing or neither text nor a whole number."""
    for attribute in attributes:
        if attribute.key == key:
            return _text(attribute.value)
    return ""


def _text(value: AnyValue) -> str:
    if text := value.string_value:
        return text
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return value.string_value
    return str(value.int_value) if kind == "int_value" else ""


def _step(frame: StepFrame) -> int:
    return frame.step
