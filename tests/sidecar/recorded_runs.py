"""Recordings for tests, in every shape in which a run or a Collector leaves them."""

from __future__ import annotations

import gzip
import json

import zstandard
from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.metrics import INSTANCE_ID, RANK, RUN_ID, SEED_ID
from esper_otel.leyline.otlp_file import framed
from sidecar.frames_made import add_point, put


def as_json(request):
    """A request as the Collector writes it: enums as numbers, on one line."""
    return json.dumps(
        json_format.MessageToDict(request, use_integers_for_enums=True), separators=(",", ":")
    ).encode()


def _zstd(data):
    return zstandard.ZstdCompressor().compress(data)


def _proto(requests):
    return b"".join(framed(request.SerializeToString()) for request in requests)


def _lines(requests):
    return b"".join(as_json(request) + b"\n" for request in requests)


FORMATS = {
    "proto": _proto,
    "json": _lines,
    "proto, each zstd": lambda rs: b"".join(framed(_zstd(r.SerializeToString())) for r in rs),
    "json, each zstd": lambda rs: b"".join(framed(_zstd(as_json(r))) for r in rs),
    "proto, one zstd frame": lambda rs: _zstd(_proto(rs)),
    "proto, several zstd frames": lambda rs: b"".join(_zstd(_proto([r])) for r in rs),
    "json, several zstd frames": lambda rs: b"".join(_zstd(_lines([r])) for r in rs),
    "proto, gzip": lambda rs: gzip.compress(_proto(rs)),
    "json, gzip": lambda rs: gzip.compress(_lines(rs)),
}
"""What the Collector writes with each of its settings, and what people make of it."""


def cut(frames, sizes):
    """Requests with the points of ``frames`` in order, so many in each as ``sizes`` say.

    As a Collector does that bounds its batches: inside a step, if need be.
    """
    points = [
        (frame, seed_id, key, value)
        for frame in frames
        for seed_id, values in [(None, frame.values), *frame.seeds.items()]
        for key, value in values.items()
    ]
    while points:
        size = next(sizes)
        yield _request(points[:size])
        points = points[size:]


def _request(points):
    request = ExportMetricsServiceRequest()
    groups = {}
    for frame, seed_id, key, value in points:
        whose = (frame.run, frame.rank, frame.instance)
        if whose not in groups:
            groups[whose] = trainer(request.resource_metrics.add(), *whose).scope_metrics.add()
        point = add_point(groups[whose], key, frame.time_unix_nano, value)
        if seed_id is not None:
            put(point.attributes, SEED_ID, seed_id)
    return request


def trainer(group, run="run", rank=0, instance="one"):
    """Makes ``group`` one of that trainer's."""
    put(group.resource.attributes, RUN_ID, run)
    put(group.resource.attributes, INSTANCE_ID, instance)
    group.resource.attributes.add(key=RANK).value.int_value = rank
    return group


def proposed(*told, **whose):
    """Log records that say (step, operation, seed id) was proposed."""
    request = ExportLogsServiceRequest()
    scope = trainer(request.resource_logs.add(), **whose).scope_logs.add()
    for step, operation, seed_id in told:
        record = scope.log_records.add(
            event_name="esper.seed.proposed", time_unix_nano=1 + step
        )
        record.attributes.add(key="esper.step").value.int_value = step
        put(record.attributes, "esper.operation", operation)
        put(record.attributes, "esper.seed.id", seed_id)
    return request
