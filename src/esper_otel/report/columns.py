"""Columns: OTLP metric requests as blocks of numbers, by the trainer that sent them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from esper_otel.leyline.metrics import INSTANCE_ID, RANK, RUN_ID
from esper_otel.leyline.protobuf import FieldError, varint_at
from esper_otel.report.layouts import (
    Block,
    Layout,
    Rows,
    Times,
    attribute,
    fields,
)

Attributes = dict[str, str | int | float | bool]

_MOST_LAYOUTS = 4096
_MOST_ALIKE = 128
"""Layouts of one size that are kept: each message is held against all of them at worst."""
_WORTH_IT = 8
"""Messages in a row from which on they are read where they lie."""

_OURS = (b"tolaria.", b"kasmina.")
_ENDED = b"tolaria.run.ended"
"""Metric whose one point says how a run ended, by :data:`HOW` and :data:`EXCEPTION`."""

HOW, EXCEPTION = "esper.run.ended", "exception.type"

_TAG = 0x12
"""``ResourceMetrics.scope_metrics``: field 2, length-delimited."""


class Producer(NamedTuple):
    """Whose numbers they are: one process that trains."""

    run: str
    rank: int
    instance: str


class ColumnReader:
    """Reads requests; keeps the layouts it has seen, as the next request has them again."""

    def __init__(self) -> None:
        self._layouts: dict[int, list[Layout]] = {}
        self._tells: dict[int, Times] = {}
        self._count = 0
        self.attributes: dict[Producer, Attributes] = {}
        """What the resource of each source says, the last word of it."""
        self.ends: dict[Producer, str] = {}
        """How each ended, of those that said so."""

    def read(self, body: bytes) -> Iterator[tuple[Producer, Block]]:
        """The blocks of one serialised ``ExportMetricsServiceRequest``.

        Metrics that are not in the registry are passed over. Raises
        :class:`~esper_otel.leyline.protobuf.FieldError` for what is no such request.
        """
        if not any(word in body for word in _OURS):
            for _ in fields(body, 0, len(body)):
                pass
            return
        if _ENDED in body:
            self._read_ends(body)
        for number, kind, start, end in fields(body, 0, len(body)):
            if (number, kind) != (1, 2):
                raise FieldError(f"field {number} of a metrics request")
            yield from self._of_resource(body, start, end)

    def _of_resource(
        self, body: bytes, start: int, end: int
    ) -> Iterator[tuple[Producer, Block]]:
        source = Producer("", 0, "")
        single: dict[int, list[bytes]] = {}
        found: list[Block] = []
        for number, begin, stop in _records(body, start, end):
            if number == 1:
                source = self._source(body, begin, stop)
            elif number == 2:
                single.setdefault(stop - begin, []).append(body[begin:stop])
            elif number < 0:
                found += self._blocks(_run(body, begin, stop, -number))
        for size, messages in single.items():
            if size:
                rows = np.frombuffer(b"".join(messages), np.uint8)
                found += self._blocks(rows.reshape(len(messages), size))
        for block in found:
            yield source, block

    def _read_ends(self, body: bytes) -> None:
        """Rare, so that the protobuf classes may read it."""
        from google.protobuf.message import DecodeError
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
            ExportMetricsServiceRequest,
        )

        try:
            request = ExportMetricsServiceRequest.FromString(body)
        except DecodeError:
            raise FieldError("not an OTLP metrics request") from None
        for group in request.resource_metrics:
            resource = group.resource.SerializeToString()
            source = self._source(resource, 0, len(resource))
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    if metric.name.encode() == _ENDED:
                        for point in metric.gauge.data_points:
                            told = {a.key: a.value.string_value for a in point.attributes}
                            words = (told.get(HOW, ""), told.get(EXCEPTION, ""))
                            self.ends[source] = " ".join(filter(None, words))[:256]

    def _source(self, body: bytes, start: int, end: int) -> Producer:
        found: Attributes = {}
        for number, kind, begin, stop in fields(body, start, end):
            if (number, kind) == (1, 2):
                key, value = attribute(body, begin, stop)
                found[key] = value
        rank = found.get(RANK, 0)
        source = Producer(
            str(found.get(RUN_ID, "")),
            rank if isinstance(rank, int) else 0,
            str(found.get(INSTANCE_ID, "")),
        )
        self.attributes[source] = found
        return source

    def _blocks(self, rows: Rows) -> Iterator[Block]:
        """What messages of one size say, by the layouts they have."""
        size = rows.shape[1]
        tells = self._tells.get(size, _NOWHERE)
        for layout in tuple(self._layouts.get(size, ())):
            rows, found = self._by(layout, tells, rows)
            yield from found
            if not len(rows):
                return
        while len(rows):
            layout = Layout(rows[0].tobytes())
            self._keep(size, layout)
            rows, found = self._by(layout, _NOWHERE, rows)
            yield from found

    def _by(self, layout: Layout, tells: Times, rows: Rows) -> tuple[Rows, list[Block]]:
        """The rows that have another layout, and what those of this one say."""
        likely = layout.may_be_of(rows, tells)
        candidates = rows if likely.all() else rows[likely]
        same = layout.is_of(candidates)
        if not same.any():
            return rows, []
        if same.all():
            return rows[~likely], list(layout.blocks(candidates))
        likely[likely] = same
        return rows[~likely], list(layout.blocks(candidates[same]))

    def _keep(self, size: int, layout: Layout) -> None:
        self._count += 1
        if self._count > _MOST_LAYOUTS:
            self._layouts.clear()
            self._tells.clear()
            self._count = 1
        known = self._layouts.setdefault(size, [])
        known.append(layout)
        del known[:-_MOST_ALIKE]
        tells = {place for other in known[:-1] for place in layout.differences(other)}
        more = np.array(sorted(tells), np.int64)
        self._tells[size] = np.union1d(self._tells.get(size, _NOWHERE), more)


_NOWHERE: Times = np.empty(0, np.int64)


def _records(body: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a ``ResourceMetrics``: number, and where the value lies.

    Messages of one size that follow each other come as one, from the first to the end of the
    last; their number is then how far apart they begin, negative.
    """
    before = 0
    while start < end:
        if body[start] != _TAG:
            number, kind, begin, stop = next(fields(body, start, end))
            yield number if kind == 2 else 0, begin, stop
            start = stop
            continue
        size, begin = varint_at(body, start + 1, end)
        stride = begin - start + size
        if begin + size > end:
            raise FieldError("a field is longer than its message")
        count = _alike(body, start, begin, stride, end) if stride == before and size else 1
        if count >= _WORTH_IT:
            yield -stride, begin, start + count * stride
            start += count * stride
        else:
            yield 2, begin, begin + size
            start += stride
        before = stride


def _alike(body: bytes, start: int, begin: int, stride: int, end: int) -> int:
    """How many messages of the same size there are in a row."""
    most = (end - start) // stride
    head = begin - start
    heads = as_strided(
        np.frombuffer(body, np.uint8, offset=start), (most, head), (stride, 1), writeable=False
    )
    other = np.flatnonzero((heads != heads[0]).any(axis=1))
    return int(other[0]) if len(other) else most


def _run(body: bytes, begin: int, stop: int, stride: int) -> Rows:
    """Messages in a row as they lie in ``body``."""
    count = -(-(stop - begin) // stride)
    size = stop - begin - (count - 1) * stride
    flat = np.frombuffer(body, np.uint8, offset=begin)
    return as_strided(flat, (count, size), (stride, 1), writeable=False)
