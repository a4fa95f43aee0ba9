"""Bytes that an OTLP receiver answers with besides plain success.

``google.rpc.Status`` and ``RetryInfo`` are three small messages, written out here by
hand because their generated classes would be one more dependency.
"""

from __future__ import annotations

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

INVALID_ARGUMENT = 3
UNAVAILABLE = 14
UNAUTHENTICATED = 16

RETRY_AFTER_S = 1
_RETRY_INFO = "type.googleapis.com/google.rpc.RetryInfo"


def success(unusable: int) -> bytes:
    """An ``ExportMetricsServiceResponse`` that tells of points we could not use."""
    if not unusable:
        return b""
    partial = ExportMetricsPartialSuccess(
        rejected_data_points=unusable,
        error_message=(
            f"{unusable} points of Tolaria or Kasmina without a number, a seed_id, "
            "or a tolaria.step of the same resource and time"
        ),
    )
    return ExportMetricsServiceResponse(partial_success=partial).SerializeToString()


def status(code: int, message: str, retry: bool = False) -> bytes:
    """A ``google.rpc.Status``; with ``retry`` it says when to come again."""
    out = b"\x08" + _varint(code) + _field(2, message.encode())
    if retry:
        duration = b"\x08" + _varint(RETRY_AFTER_S)
        info = _field(1, duration)
        out += _field(3, _field(1, _RETRY_INFO.encode()) + _field(2, info))
    return out


def _field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
