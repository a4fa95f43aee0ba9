"""OTLP metrics with everything that a field may hold, and how many points there are in them."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

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

TEXTS = st.sampled_from(
    [
        "",
        "a",
        "b",
        "done",
        "exception",
        "-1",
        "3",
        "²",
        "x" * 256,
        "x" * 257,
        "é" * 300,
        "\n\x1b[31m",
        "😀" * 256,
        "\x00",
        "9" * 5000,
        "x" * 70000,
    ]
)
TIMES = st.sampled_from([0, 1, 2, 3, 10**9, 2**62 - 1, 2**62, 2**64 - 1])
INTS = st.sampled_from([0, 1, -1, 5, 2**31, 2**53, 2**63 - 1, -(2**63)])
FLOATS = st.sampled_from([0.0, -0.0, 1.0, 2.5, 5e-324, 1e308, -1e308, 2.0**53]) | st.floats()
STEPS = st.sampled_from([0.0, 1.0, 2.0, 3.0, 1e6, -1.0, 0.5, 2.0**53, 1e300]) | FLOATS
NAMES = st.sampled_from(
    [
        "tolaria.step",
        "tolaria.step",
        "tolaria.loss",
        RUN_ENDED.instrument,
        "",
        "else",
        "x" * 9000,
    ]
) | st.sampled_from(sorted(BY_INSTRUMENT))
WHOSE = st.lists(
    st.tuples(
        st.sampled_from([RUN_ID, INSTANCE_ID, RANK, "service.name", "", "k"]), TEXTS | INTS
    ),
    max_size=4,
)
ABOUT = st.lists(
    st.tuples(st.sampled_from([SEED_ID, HOW_ENDED, EXCEPTION_TYPE, ""]), TEXTS | INTS),
    max_size=3,
)
POINTS = st.lists(st.tuples(TIMES, STEPS | INTS | st.none(), ABOUT, st.booleans()), max_size=4)
KINDS = ("gauge", "gauge", "gauge", "sum", "histogram", "exponential_histogram", "summary", "")
METRICS = st.lists(st.tuples(NAMES, st.sampled_from(KINDS), POINTS), max_size=5)
SCOPES = st.lists(METRICS, max_size=3)
RESOURCES = st.lists(st.tuples(WHOSE, SCOPES), max_size=3)


def _attribute(pair) -> KeyValue:
    key, value = pair
    told = AnyValue()
    if isinstance(value, str):
        told.string_value = value
    elif value % 5 == 0:
        told.array_value.values.add(int_value=value)
    else:
        told.int_value = value
    return KeyValue(key=key, value=told)


def _metric(made) -> Metric:
    name, kind, points = made
    metric = Metric(name=name, unit="1", description="d")
    if not kind:
        return metric
    getattr(metric, kind).SetInParent()
    for time, value, about, has_exemplar in points:
        point = getattr(metric, kind).data_points.add(time_unix_nano=time)
        point.attributes.extend(map(_attribute, about))
        if kind in ("gauge", "sum"):
            if isinstance(value, float):
                point.as_double = value
            elif value is not None:
                point.as_int = value
            if has_exemplar:
                point.exemplars.add(as_double=1.0, span_id=b"12345678")
        elif kind == "histogram":
            point.bucket_counts.extend([1, 2**64 - 1])
            point.explicit_bounds.extend([float("nan")])
    return metric


def built(resources) -> ExportMetricsServiceRequest:
    """A request of what was drawn."""
    request = ExportMetricsServiceRequest()
    for whose, scopes in resources:
        group = request.resource_metrics.add()
        group.resource.attributes.extend(map(_attribute, whose))
        for metrics in scopes:
            group.scope_metrics.add().metrics.extend(map(_metric, metrics))
    return request


def _field(number: int, body: bytes) -> bytes:
    size, head = len(body), bytearray()
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes((number << 3 | 2,)) + bytes(head) + bytes((size,)) + body


TAILS = st.sampled_from(
    [
        b"",
        b"",
        b"",
        _field(15, b"?"),
        b"\xf8\x01\x05",
        _field(1, b"z\x01?"),
        b"\x08\x05",
        _field(1, _field(2, b"\x10\x05")),
        _field(1, b""),
        b"\x0b\x0c",
        b"y" + bytes(8),
    ]
)
"""Fields that nobody knows, known ones of another type, a group."""

REQUESTS = st.builds(
    lambda resources, tail: built(resources).SerializeToString() + tail, RESOURCES, TAILS
)


def point_count(data: bytes) -> int | None:
    """How many points there are in a request, None when it is none."""
    try:
        request = ExportMetricsServiceRequest.FromString(data)
    except DecodeError:
        return None
    return sum(
        len(getattr(metric, kind).data_points)
        for group in request.resource_metrics
        for scope in group.scope_metrics
        for metric in scope.metrics
        if (kind := metric.WhichOneof("data"))
    )
