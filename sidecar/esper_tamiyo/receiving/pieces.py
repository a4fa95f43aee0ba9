"""Pieces: a request cut at the borders of its fields, so that little of it is parsed at once.

A message that is parsed takes far more memory than its bytes: an empty data point has two on
the wire and about a hundred in memory, so that 4 MiB of them took hundreds of megabytes. Of a
request only the outline is read here, its fields and their lengths, and what is parsed at once
has at most :data:`PIECE` bytes. Fields of one kind may be parsed apart from each other because
that is how protobuf joins them: the bytes of two messages, one behind the other, are the bytes
of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, ResourceMetrics, ScopeMetrics

from esper_otel.leyline.protobuf import LENGTH, as_varint, fields_of
from esper_tamiyo.receiving.harvest import MAX_WALKED, TooMuchError

PIECE = 64 * 1024
"""Most bytes that are parsed at once."""

MAX_SCOPES = 16_384
"""Parts of one resource that are told apart: as many as steps are taken of a request."""

LONGEST_NAME = 1024
"""Bytes of a metric's name beyond which it is none of ours: the name is parsed once for each
part of its metric."""

_FIRST = 1 << 3 | LENGTH
"""Key of ``resource_metrics``, ``resource``, ``Metric.name`` and ``data_points``, each in its
own message."""
_SECOND = 2 << 3 | LENGTH
"""Key of ``scope_metrics`` and ``metrics``, each in its own message."""
_DATA = frozenset(number << 3 | LENGTH for number in (5, 7, 9, 10, 11))
"""Keys of what a metric may hold: gauge, sum and the kinds of histograms."""

PAUSE: Sequence[Metric] = ()
"""Stands between the metrics of two pieces: so far went some milliseconds."""

_EMPTY_POINT = b"\x0a\x00"
"""What stands for a data point that is too large to be looked at: one without a value."""


def resources_of(data: bytes) -> Iterator[tuple[int, int]]:
    """Where each ``ResourceMetrics`` of a request begins and ends; raises
    :class:`FieldError` and :class:`TooMuchError`."""
    for key, _, body, stop in _few_fields(data, 0, len(data)):
        if key == _FIRST:
            yield body, stop


def outline_of(
    data: bytes, begin: int, end: int
) -> tuple[bytes | None, list[tuple[int, int, int]]]:
    """What a ``ResourceMetrics`` from ``begin`` to ``end`` is made of.

    The bytes that say whose it is, None if these are more than :data:`PIECE`; and of each
    ``ScopeMetrics`` where it begins, where its body does, and where it ends, but of none where
    there are more than :data:`MAX_SCOPES`. Raises :class:`FieldError` and
    :class:`TooMuchError`.
    """
    head: bytes | None = b""
    scopes = []
    count = 0
    for key, start, body, stop in _few_fields(data, begin, end):
        if key == _SECOND:
            count += 1
            if count <= MAX_SCOPES:
                scopes.append((start, body, stop))
        elif key == _FIRST and head is not None:
            head = head + data[start:stop] if len(head) + stop - start <= PIECE else None
    return head, scopes if count <= MAX_SCOPES else []


def metrics_of(data: bytes, begin: int, end: int) -> Iterator[Sequence[Metric]]:
    """The metrics of the ``ResourceMetrics`` from ``begin`` to ``end``, some at a time, with
    :data:`PAUSE` after each piece.

    Raises :class:`FieldError`, ``DecodeError`` and :class:`TooMuchError`.
    """
    for start, body, stop in _runs(data, begin, end, _SECOND):
        if stop - start <= PIECE:
            for scope in ResourceMetrics.FromString(data[start:stop]).scope_metrics:
                yield scope.metrics
            yield PAUSE
        else:
            yield from _metrics_of_scope(data, body, stop)


def _metrics_of_scope(data: bytes, begin: int, end: int) -> Iterator[Sequence[Metric]]:
    """Of one ``ScopeMetrics`` that is large."""
    for start, body, stop in _runs(data, begin, end, _SECOND):
        if stop - start <= PIECE:
            yield ScopeMetrics.FromString(data[start:stop]).metrics
            yield PAUSE
        else:
            for metric in _parts_of_metric(data, body, stop):
                yield (metric,)
                yield PAUSE


def _parts_of_metric(data: bytes, begin: int, end: int) -> Iterator[Metric]:
    """One ``Metric`` that is large as several of that name, each with some of its points."""
    name = b""
    for key, start, _, stop in _few_fields(data, begin, end):
        if key == _FIRST:
            name = data[start:stop] if stop - start <= LONGEST_NAME else b""
    for key, _, body, stop in _few_fields(data, begin, end):
        if key not in _DATA:
            continue
        for first, _, last in _runs(data, body, stop, _FIRST):
            points = data[first:last] if last - first <= PIECE else _EMPTY_POINT
            yield Metric.FromString(name + bytes((key,)) + as_varint(len(points)) + points)


def _few_fields(data: bytes, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """As :func:`fields_of`, of a message that nobody gives so many: going past them without a
    pause must not take long."""
    for count, field in enumerate(fields_of(data, begin, end)):
        if count == MAX_WALKED:
            raise TooMuchError(f"a part of a request may have {MAX_WALKED} fields")
        yield field


def _runs(data: bytes, begin: int, end: int, large: int) -> Iterator[tuple[int, int, int]]:
    """The fields from ``begin`` to ``end`` in runs of at most :data:`PIECE` bytes.

    A larger field is a run of its own if its key is ``large``, and left out otherwise. Yields
    (start, where the body of its last field begins, stop).
    """
    if end - begin <= PIECE:
        yield begin, begin, end
        return
    start = begin
    for key, at, body, stop in fields_of(data, begin, end):
        if stop - start <= PIECE:
            continue
        if at > start:
            yield start, start, at
        start = at
        if stop - at > PIECE:
            if key == large:
                yield at, body, stop
            start = stop
    if end > start:
        yield start, start, end
