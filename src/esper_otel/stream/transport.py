"""Transport: one serialised request to one receiver, and its outcome.

What may be tried again is decided here and nowhere else, as the OTLP specification says.
A request whose answer did not come in time may have been taken all the same; it counts as
not delivered and is sent again, so that a receiver can see a batch twice but never not at
all.

``grpc`` and the protobuf classes are imported where they are needed: together they cost
more than all the rest of the package.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol, runtime_checkable

from esper_otel._version import __version__
from esper_otel.stream.destination import Signal

USER_AGENT = f"esper-otel/{__version__}"

MAX_ANSWER = 1 << 16
"""Bytes of an answer that are read: a partial success and its message need fewer."""


class Verdict(Enum):
    """What became of a request."""

    DELIVERED = "delivered"
    RETRY = "retry"
    """Not now; the same request may be sent again."""

    UNREACHABLE = "unreachable"
    """As RETRY: nobody is there."""

    REFUSED = "refused"
    """Never, for this request."""

    UNSUPPORTED = "unsupported"
    """Never, for this signal: the receiver has no such endpoint."""


class SendResult(NamedTuple):
    """Verdict on one request, with what the receiver said about it.

    ``rejected`` is the number of points or spans that a receiver left out of a delivered
    request, ``retry_after_s`` the pause it asked for.
    """

    verdict: Verdict
    reason: str = ""
    rejected: int = 0
    retry_after_s: float | None = None


TAKEN = SendResult(Verdict.DELIVERED)
"""What becomes of nearly all requests: the receiver took all of it, and says nothing."""


class Transport(Protocol):
    """Sends requests of one signal, one at a time. Never raises for the network's faults."""

    def send(self, body: bytes, timeout_s: float) -> SendResult:
        """Send one serialised request and wait for its answer."""

    def close(self) -> None:
        """Let go of connections, and of a call in flight where that is possible."""


@runtime_checkable
class ImmediateTransport(Transport, Protocol):
    """A transport that can also send without waiting for anything.

    So a thread that must not wait can do what nearly always needs no waiting, and no other one
    has to wake for it. Whatever it meets is left for :meth:`finish_begun`, which a thread that
    may wait calls.
    """

    def send_at_once(self, body: bytes) -> bool:
        """Begin a request, as far as that needs no waiting; whether all of it was sent."""

    def answer_at_once(self) -> SendResult | None:
        """What became of a request that was sent so, once its answer is here: a delivery. None
        for all else, which :meth:`finish_begun` finds out."""

    def finish_begun(self, timeout_s: float) -> SendResult:
        """Send the rest of the request that was begun, and wait for its answer."""


class NoTransport:
    """In place of a transport that cannot be made."""

    def __init__(self, why: str) -> None:
        self._why = why

    def send(self, body: bytes, timeout_s: float) -> SendResult:
        """Nothing is sent, and may be later by somebody else."""
        return SendResult(Verdict.UNREACHABLE, self._why)

    def close(self) -> None:
        """Nothing is open."""


def delivered(signal: Signal, answer: bytes) -> SendResult:
    """A request that was taken, perhaps without some of its points or spans."""
    if not answer:
        return TAKEN
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

    try:
        if signal is Signal.METRICS:
            metrics = metrics_service_pb2.ExportMetricsServiceResponse.FromString(answer)
            rejected = metrics.partial_success.rejected_data_points
            reason = metrics.partial_success.error_message
        elif signal is Signal.LOGS:
            logs = logs_service_pb2.ExportLogsServiceResponse.FromString(answer)
            rejected = logs.partial_success.rejected_log_records
            reason = logs.partial_success.error_message
        else:
            traces = trace_service_pb2.ExportTraceServiceResponse.FromString(answer)
            rejected = traces.partial_success.rejected_spans
            reason = traces.partial_success.error_message
    except DecodeError:
        # 2xx was said; a body that is no protobuf does not take it back.
        return SendResult(Verdict.DELIVERED, "an answer that is not OTLP")
    return SendResult(Verdict.DELIVERED, one_line(reason), max(rejected, 0))


def plain(error: BaseException) -> str:
    """An error in one line."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """``text``, which may come from anybody, as a message can show it: short, and without signs
    that a terminal obeys."""
    line = " ".join(text.split())[:400]
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in line)
