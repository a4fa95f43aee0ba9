"""OTLP over gRPC. Bodies are bytes already, so the serialisers are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from esper_otel.stream.destination import Destination, Signal
from esper_otel.stream.proxies import needs_no_proxy
from esper_otel.stream.transport import (
    USER_AGENT,
    SendResult,
    Verdict,
    delivered,
    one_line,
    plain,
)

_EXPORT = {
    Signal.METRICS: "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    Signal.TRACES: "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    Signal.LOGS: "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}

_CHANNEL_OPTIONS = (
    ("grpc.primary_user_agent", USER_AGENT),
    # A channel doubles its own reconnection pause up to two minutes; a receiver that
    # comes back should be noticed within seconds.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Whatever its name says, the time an attempt has to connect: TLS included, to a receiver
    # that is far away or has no processor, and shorter than a request's 10 s.
    ("grpc.min_reconnect_backoff_ms", 5000),
)

_GRPC_RETRYABLE = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)


class GrpcTransport:
    """Exports one signal over one channel, which connects at the first call."""

    def __init__(self, destination: Destination) -> None:
        self._signal = destination.signal
        self._headers = destination.headers
        compression = grpc.Compression.Gzip if destination.gzip else None
        if destination.secure:
            self._channel = grpc.secure_channel(
                destination.endpoint,
                _credentials(destination),
                _options(destination),
                compression,
            )
        else:
            self._channel = grpc.insecure_channel(
                destination.endpoint, _options(destination), compression
            )
        self._export = self._channel.unary_unary(
            _EXPORT[destination.signal],
            request_serializer=None,
            response_deserializer=None,
        )

    def send(self, body: bytes, timeout_s: float) -> SendResult:
        """One Export call."""
        try:
            answer = self._export(body, timeout=timeout_s, metadata=self._headers)
        except grpc.RpcError as error:
            return _judge_call(error)
        except ValueError as error:
            # The channel was closed under the call: the run is over.
            return SendResult(Verdict.UNREACHABLE, plain(error))
        return delivered(self._signal, answer)

    def close(self) -> None:
        """Close the channel, which cancels a call in flight."""
        self._channel.close()


def _options(destination: Destination) -> tuple[tuple[str, str | int], ...]:
    """Options of the channel; gRPC itself reads ``http_proxy``, and knows of no networks."""
    try:
        host = urlsplit(f"//{destination.endpoint}").hostname or ""
    except ValueError:
        host = ""
    return (*_CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if needs_no_proxy(host) else 1))


def _judge_call(error: grpc.RpcError) -> SendResult:
    code = error.code().name
    reason = one_line(f"{code}: {error.details()}")
    after = _retry_info(error.trailing_metadata() or ())
    if code == "UNIMPLEMENTED":
        return SendResult(Verdict.UNSUPPORTED, reason)
    if code == "UNAVAILABLE" and after is None:
        return SendResult(Verdict.UNREACHABLE, reason)
    # A receiver that is exhausted for good says so by not saying when.
    if code in _GRPC_RETRYABLE or (code == "RESOURCE_EXHAUSTED" and after is not None):
        return SendResult(Verdict.RETRY, reason, retry_after_s=after)
    return SendResult(Verdict.REFUSED, reason)


def _retry_info(metadata: Any) -> float | None:
    """Seconds of a ``google.rpc.RetryInfo`` in the details of a gRPC status."""
    info = RetryInfo()
    for key, value in metadata:
        if key != "grpc-status-details-bin":
            continue
        try:
            for detail in Status.FromString(value).details:
                if detail.Unpack(info):
                    return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
        except DecodeError:
            continue
    return None


def _credentials(destination: Destination) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        _contents(destination.certificate),
        _contents(destination.client_key),
        _contents(destination.client_certificate),
    )


def _contents(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
