"""Custom encoding: custom values to OTLP, a ``ScopeMetrics`` for those of a step.

By the idea of :mod:`esper_otel.stream.encoding`: what steps with the same names differ in are
the eight bytes of each time and value, whose places are found once. Few steps have any, so
there is no batch to be filled at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as OtlpMetric
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics

from esper_otel._version import __version__
from esper_otel.leyline.custom import EVALUATION, NAME, is_evaluation
from esper_otel.leyline.metrics import CUSTOM
from esper_otel.stream.ring import Frames

SCOPE = "esper_otel"

_MAX_TEMPLATES = 256

_TIME = struct.Struct("<q")
_VALUE = struct.Struct("<d")
_TIME_MARK, _VALUE_MARK = b"\x11" * 8, b"\x13" * 8
"""Stand for time and value in a template, where nothing else has such bytes: not the fields
before them, and no name, as these are not printable."""


class CustomEncoder:
    """Keeps the templates of the sets of names that it has seen."""

    def __init__(self) -> None:
        self._templates: dict[tuple[str, ...], tuple[bytes, list[int], list[int]]] = {}

    def records(self, frames: Frames) -> dict[int, bytes]:
        """A serialised ``ScopeMetrics`` by the place of its step in ``frames``."""
        times = frames.steps.times
        return {
            place: self._record(int(times[place]), values) for place, values in frames.customs
        }

    def _record(self, time_unix_nano: int, values: Mapping[str, float]) -> bytes:
        names = tuple(values)
        if names not in self._templates:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            self._templates[names] = _template(names)
        template, times, places = self._templates[names]
        record = bytearray(template)
        for place in times:
            _TIME.pack_into(record, place, time_unix_nano)
        for place, value in zip(places, values.values(), strict=True):
            _VALUE.pack_into(record, place, value)
        return bytes(record)


def custom_metric(names: Sequence[str]) -> OtlpMetric:
    """The metric with a point for each of ``names``, without times and values."""
    metric = OtlpMetric(name=CUSTOM.instrument, unit=CUSTOM.unit)
    for name in names:
        point = metric.gauge.data_points.add()
        point.attributes.add(key=NAME).value.string_value = name
        if is_evaluation(name):
            point.attributes.add(key=EVALUATION).value.bool_value = True
    return metric


def _template(names: Sequence[str]) -> tuple[bytes, list[int], list[int]]:
    """The bytes for values of these names, and where times and values lie in them."""
    resource_metrics = ResourceMetrics()
    scope = resource_metrics.scope_metrics.add()
    scope.scope.name, scope.scope.version = SCOPE, __version__
    metric = custom_metric(names)
    for point in metric.gauge.data_points:
        (point.time_unix_nano,) = _TIME.unpack(_TIME_MARK)
        (point.as_double,) = _VALUE.unpack(_VALUE_MARK)
    scope.metrics.append(metric)
    data = resource_metrics.SerializeToString()
    return data, list(_places(data, _TIME_MARK)), list(_places(data, _VALUE_MARK))


def _places(data: bytes, mark: bytes) -> Iterator[int]:
    place = data.find(mark)
    while place >= 0:
        yield place
        place = data.find(mark, place + len(mark))
