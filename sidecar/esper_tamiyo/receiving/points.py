"""Reading the official OTLP classes: the source of points, and their contents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import ResourceLogs
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint, ResourceMetrics

from esper_otel.leyline.frames import MAX_RANK
from esper_otel.leyline.metrics import INSTANCE_ID, RANK, RUN_ID
from esper_tamiyo.receiving.moments import Identity

SERVICE_NAME = "service.name"


def number_points(metric: Metric) -> Sequence[NumberDataPoint] | None:
    """The points of a gauge or a sum, None of any other kind."""
    kind = metric.WhichOneof("data")
    if kind == "gauge":
        return metric.gauge.data_points
    if kind == "sum":
        return metric.sum.data_points
    return None


def value_of(point: NumberDataPoint) -> float | None:
    """The number of a point, None where it has none."""
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
    return Identity(run, _rank(text_of(attributes, RANK)), text_of(attributes, INSTANCE_ID))


def _rank(text: str) -> int:
    """The rank that a resource says, 0 when it says none, below 0 for a number beyond any."""
    # isdecimal() alone knows every script's digits.
    if not (text.isascii() and text.isdecimal()):
        return 0
    return rank if len(text) <= 10 and (rank := int(text)) <= MAX_RANK else -1


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
