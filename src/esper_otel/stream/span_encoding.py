"""Span encoding: spans to OTLP bytes, without an object of the SDK for each.

An object of the SDK's for each span, and then one of protobuf's, are dozens of containers that
Python's garbage collector follows. Held for a second they outlive its young generations, and
what outlives those starts full collections, which hold the interpreter for as long as it takes
to walk all that torch has loaded: 170 to 200 ms within a training step. Bytes are not followed.
The layout is that of ``opentelemetry/proto/trace/v1/trace.proto``; property tests hold it to
the SDK's own encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from struct import Struct
from typing import NamedTuple

from esper_otel.leyline.protobuf import as_varint

AttributeValue = str | bool | int | float

INTERNAL, CLIENT = 1, 3
"""``Span.SpanKind``."""

SPANS_PER_REQUEST = 512

# Tags: the number of a field, shifted by three bits, and how its value lies there.
_SPANS = b"\x12"  # ScopeSpans.spans, 2
_SCOPE = b"\x0a"  # ScopeSpans.scope, 1
_SCOPE_SPANS = b"\x12"  # ResourceSpans.scope_spans, 2
_RESOURCE = b"\x0a"  # ResourceSpans.resource, 1
_RESOURCE_SPANS = b"\x0a"  # ExportTraceServiceRequest.resource_spans, 1
_SCHEMA_URL = b"\x1a"  # ResourceSpans.schema_url and ScopeSpans.schema_url, 3
_PARENT = b"\x22\x08"  # Span.parent_span_id, 4: eight bytes
_NAME = b"\x2a"  # Span.name, 5
_ATTRIBUTES = b"\x4a"  # Span.attributes, 9
_EVENTS = b"\x5a"  # Span.events, 11
_STATUS = b"\x7a"  # Span.status, 15
_EVENT_NAME = b"\x12"  # Span.Event.name, 2
_EVENT_ATTRIBUTES = b"\x1a"  # Span.Event.attributes, 3
_KEY = b"\x0a"  # KeyValue.key, 1
_VALUE = b"\x12"  # KeyValue.value, 2
_STRING = b"\x0a"  # AnyValue.string_value, 1
_INT = b"\x18"  # AnyValue.int_value, 3
_MESSAGE = b"\x12"  # Status.message, 2

_IDS = Struct("<2s16s2s8s")
"""``Span.trace_id``, 1, and ``Span.span_id``, 2, each behind its tag and size."""
_TIMES = Struct("<cBcQcQ")
"""``Span.kind``, 6, ``start_time_unix_nano``, 7, and ``end_time_unix_nano``, 8."""
_EVENT_TIME = Struct("<cQ")
_DOUBLE = Struct("<cd")
_ERROR = b"\x18\x02"
"""``Status.code``, 3: ``STATUS_CODE_ERROR``."""
_FLAGS = b"\x85\x01\x00\x01\x00\x00"
"""``Span.flags``, 16, a fixed32: it is known whether the parent is remote, and it is not."""

_TRUE, _FALSE = b"\x10\x01", b"\x10\x00"  # AnyValue.bool_value, 2

_INT64 = range(-(1 << 63), 1 << 63)


class SpanEvent(NamedTuple):
    """Something that happened within a span, at Unix nanoseconds."""

    name: str
    attributes: Mapping[str, AttributeValue]
    time_unix_nano: int


class SpanContent(NamedTuple):
    """One span but for its ids: Unix nanoseconds; ``error`` is "" where all is well."""

    name: str
    start: int
    end: int
    attributes: Mapping[str, AttributeValue]
    events: Sequence[SpanEvent] = ()
    kind: int = INTERNAL
    error: str = ""


class SpanEncoder:
    """Encodes spans of one resource and scope, and keeps them until they are asked for.

    ``resource`` and ``scope`` are serialised messages of OTLP.
    """

    def __init__(self, resource: bytes, scope: bytes, schema_url: str = "") -> None:
        self._resource = _sized(_RESOURCE, resource)
        self._scope = _sized(_SCOPE, scope)
        self._schema_url = _sized(_SCHEMA_URL, schema_url.encode()) if schema_url else b""
        self._spans: list[bytes] = []

    @property
    def waiting(self) -> int:
        """Spans that are encoded and not taken yet."""
        return len(self._spans)

    def add(self, span: SpanContent, trace: int, span_id: int, parent: int) -> None:
        """Encode one span; ``parent`` is 0 where it has none."""
        name = span.name.encode("utf-8", "replace")
        status = b""
        if span.error:
            status = _ERROR + _sized(_MESSAGE, span.error.encode("utf-8", "replace"))
        self._spans.append(
            _sized(
                _SPANS,
                b"".join(
                    (
                        _IDS.pack(
                            b"\x0a\x10",
                            trace.to_bytes(16, "big"),
                            b"\x12\x08",
                            span_id.to_bytes(8, "big"),
                        ),
                        _PARENT + parent.to_bytes(8, "big") if parent else b"",
                        _sized(_NAME, name),
                        _TIMES.pack(b"\x30", span.kind, b"\x39", span.start, b"\x41", span.end),
                        _attributes(_ATTRIBUTES, span.attributes),
                        b"".join(map(_event, span.events)),
                        _sized(_STATUS, status),
                        _FLAGS,
                    )
                ),
            )
        )

    def take(self) -> Iterator[tuple[bytes, int]]:
        """Requests with all spans since the last time, and how many each has."""
        spans, self._spans = self._spans, []
        for start in range(0, len(spans), SPANS_PER_REQUEST):
            some = spans[start : start + SPANS_PER_REQUEST]
            scope_spans = _sized(_SCOPE_SPANS, b"".join((self._scope, *some)))
            body = b"".join((self._resource, scope_spans, self._schema_url))
            yield _sized(_RESOURCE_SPANS, body), len(some)


def _event(event: SpanEvent) -> bytes:
    body = (
        _EVENT_TIME.pack(b"\x09", event.time_unix_nano)
        + _sized(_EVENT_NAME, event.name.encode("utf-8", "replace"))
        + _attributes(_EVENT_ATTRIBUTES, event.attributes)
    )
    return _sized(_EVENTS, body)


def _attributes(tag: bytes, attributes: Mapping[str, AttributeValue]) -> bytes:
    """One ``KeyValue`` for each that OTLP has a value for."""
    parts = []
    for key, value in attributes.items():
        encoded = _value(value)
        if encoded:
            parts.append(_sized(tag, _key(key) + _sized(_VALUE, encoded)))
    return b"".join(parts)


@lru_cache(4096)
def _key(key: str) -> bytes:
    return _sized(_KEY, key.encode("utf-8", "replace"))


def _value(value: AttributeValue) -> bytes:
    """An ``AnyValue``; empty where a whole number is too large for one."""
    if isinstance(value, str):
        return _sized(_STRING, value.encode("utf-8", "replace"))
    if isinstance(value, bool):
        return _TRUE if value else _FALSE
    if isinstance(value, int):
        return _INT + as_varint(value & 0xFFFF_FFFF_FFFF_FFFF) if value in _INT64 else b""
    return _DOUBLE.pack(b"\x21", value)


def _sized(tag: bytes, body: bytes) -> bytes:
    """A field of that tag which holds ``body``: a message, text or bytes."""
    return tag + as_varint(len(body)) + body
