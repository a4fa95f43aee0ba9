"""Encoding: step records to OTLP metric requests by patching templates.

A frame becomes ordinary OTLP: one ``ScopeMetrics`` for the step and one for each seed,
with one gauge point per metric that is present. All frames with the same metrics present
differ only in times and values, which protobuf lays out as eight fixed bytes each. So one
frame is serialised by the official classes, the places of those bytes are found once, and
every further frame is a copy with new bytes in them, written by numpy for a whole batch.
``bench/encoding.py`` measures it against the SDK's encoder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, compress
from math import isfinite
from struct import Struct
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics

from esper_otel._version import __version__
from esper_otel.leyline.custom import PREFIX
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import (
    EXCEPTION_TYPE,
    HOW_ENDED,
    RUN_ENDED,
    SEED_ID,
    SEED_METRICS,
    STEP_METRICS,
    Metric,
)
from esper_otel.leyline.protobuf import as_varint
from esper_otel.stream.custom_encoding import CustomEncoder, custom_metric
from esper_otel.stream.ring import STEP_RECORD, Frames, Rows, chosen, part, points

SCOPE = "esper_otel"

MAX_REQUEST = 2 << 20
"""Bytes of one request: half of what gRPC receivers accept by default."""

MAX_FRAMES = 256
"""Frames encoded at a time: their bytes stay in the processor's cache and in memory that
is used again. 1,000 at once took half as long again for each, in page faults."""

_MAX_TEMPLATES = 4096
_STEP = -1
"""In place of a seed's number: the frame is the step's."""

_RESOURCE_METRICS = b"\x0a"
"""Tag of ``ExportMetricsServiceRequest.resource_metrics``: field 1, length-delimited."""
_RESOURCE = b"\x0a"
"""Tag of ``ResourceMetrics.resource``: field 1, length-delimited."""

# Bytes that stand for times and values while a template is made. Each pair differs in
# every byte, and each eight of them are a valid fixed64 and a finite double.
_TIME_MARKS = (0x1111111111111111, 0x6666666666666666)
_VALUE_MARKS = (b"\x22" * 8, b"\x55" * 8)


class Encoded(msgspec.Struct, frozen=True, gc=False):
    """One serialised request and what is in it."""

    body: bytes
    points: int
    frames: int


class Template:
    """The bytes of one frame's ``ScopeMetrics`` with holes for its times and values."""

    __slots__ = (
        "_bytes",
        "_columns",
        "_constants",
        "_holes",
        "_pack",
        "_time_fields",
        "_value_fields",
        "points",
    )

    def __init__(self, metrics: Sequence[Metric], present: Sequence[int], seed_id: str) -> None:
        scope, other = (
            _serialised([metrics[column] for column in present], seed_id, mark)
            for mark in (0, 1)
        )
        times, values = _places(scope, other)
        if not len(times) == len(values) == len(present):
            raise AssertionError(f"{len(present)} points, but {len(times)} and {len(values)}")
        self._constants, self._pack = _packing(scope, times, values)
        self._bytes = np.frombuffer(scope, np.uint8)
        self._columns = np.array(present, np.intp)
        self.points = len(present)
        """Data points of one frame."""
        self._time_fields = [f"time{hole}" for hole in range(len(times))]
        self._value_fields = [f"value{hole}" for hole in range(len(values))]
        # A structured view of the bytes: one strided copy per field, which for batches
        # of 1,000 was half the time of slices and a quarter of an index array.
        self._holes = np.dtype(
            {
                "names": self._time_fields + self._value_fields,
                "formats": ["<i8"] * len(times) + ["<f8"] * len(values),
                "offsets": times + values,
                "itemsize": len(scope),
            }
        )

    def fill_one(self, time_unix_nano: int, values: Sequence[float]) -> bytes:
        """The bytes of one frame; ``values`` are those that are present, in order."""
        parts = self._constants.copy()
        parts[1::4] = [time_unix_nano] * len(values)
        parts[3::4] = values
        return self._pack(*parts)

    def fill(
        self, times: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
    ) -> list[memoryview]:
        """The bytes of one frame for each of ``times``, in order."""
        block = np.empty((len(times), len(self._bytes)), np.uint8)
        block[:] = self._bytes
        holes = block.view(self._holes)[:, 0]
        for field in self._time_fields:
            holes[field] = times
        for field, column in zip(self._value_fields, self._columns, strict=True):
            holes[field] = values[:, column]
        flat, size = block.reshape(-1).data, len(self._bytes)
        return [flat[start : start + size] for start in range(0, len(flat), size)]


class FrameEncoder:
    """Turns frames into requests of at most ``max_request`` bytes.

    ``resource`` is a serialised OTLP ``Resource``. A frame is never divided: one that is
    larger than the bound makes a request of its own.
    """

    def __init__(self, resource: bytes, max_request: int = MAX_REQUEST) -> None:
        self._resource = _RESOURCE + as_varint(len(resource)) + resource
        self._max_request = max_request - len(self._resource) - 16
        self._head, self._headed = b"", -1
        """What the newest request began with, and the size of the scopes behind it."""
        self._templates: dict[tuple[bytes, str | None], Template | None] = {}
        self._of_few: dict[bytes, Template] = {}
        """Templates of steps by which of their values are present, a byte each."""
        self._customs = CustomEncoder()

    def encode(self, frames: Frames) -> Iterator[Encoded]:
        """Requests that hold ``frames`` in order, seeds and custom values behind the steps of
        their request."""
        for start in range(0, len(frames.steps.times), MAX_FRAMES):
            yield from self._encode(part(frames, start, start + MAX_FRAMES))

    def encode_few(self, records: bytes) -> list[Encoded]:
        """As :meth:`encode`, for the :data:`STEP_RECORD` of steps with neither seeds nor
        custom values."""
        requests: list[Encoded] = []
        scopes: list[bytes] = []
        frames = size = count = 0
        templates = self._of_few
        for time_unix_nano, _, *values in STEP_RECORD.iter_unpack(records):
            present = bytes(map(isfinite, values))
            template = templates.get(present) or self._template_of_few(present)
            scope = b""
            if template is not None:
                scope = template.fill_one(time_unix_nano, list(compress(values, present)))
            if frames and size + len(scope) > self._max_request:
                requests.append(self._request(scopes, size, count, frames))
                scopes, frames, size, count = [], 0, 0, 0
            scopes.append(scope)
            size += len(scope)
            frames += 1
            count += 0 if template is None else template.points
        if frames:
            requests.append(self._request(scopes, size, count, frames))
        return requests

    def _template_of_few(self, present: bytes) -> Template | None:
        if len(self._of_few) >= _MAX_TEMPLATES:
            self._of_few.clear()
        flags = np.frombuffer(present, np.bool_)
        template = self._template(np.packbits(flags).tobytes(), None, flags)
        if template is not None:
            self._of_few[present] = template
        return template

    def _request(
        self, scopes: Sequence[bytes | memoryview], size: int, points: int, frames: int
    ) -> Encoded:
        """One request of ``scopes``, which have ``size`` bytes together."""
        if size != self._headed:  # as many steps as the one before it, nearly always
            length = as_varint(len(self._resource) + size)
            self._head, self._headed = _RESOURCE_METRICS + length + self._resource, size
        return Encoded(b"".join((self._head, *scopes)), points, frames)

    def _encode(self, frames: Frames) -> Iterator[Encoded]:
        steps = self._records(frames.steps, None)
        seeds = self._records(frames.seeds, frames.seed_ids) if len(frames.seeds.tags) else []
        customs = self._customs.records(frames) if frames.customs else {}
        for place, record in customs.items():
            # Behind its step, and counted as part of it.
            steps[place] = b"".join((steps[place], record))
        ends = frames.steps.tags.tolist()
        seed_sizes = [0, *accumulate(map(len, seeds))]
        # Bytes up to and including each frame, its seeds counted in.
        sizes = [
            size + seed_sizes[end]
            for size, end in zip(accumulate(map(len, steps)), ends, strict=True)
        ]
        start = seed_start = before = 0
        while start < len(steps):
            end = max(bisect_right(sizes, before + self._max_request), start + 1)
            seed_end = ends[end - 1]
            scopes = [*steps[start:end], *seeds[seed_start:seed_end]]
            size = sizes[end - 1] - before
            yield self._request(scopes, size, points(part(frames, start, end)), end - start)
            start, seed_start, before = end, seed_end, sizes[end - 1]

    def _records(self, rows: Rows, seed_ids: Sequence[str] | None) -> list[bytes | memoryview]:
        """One serialised ``ScopeMetrics`` per row, in order."""
        finite = np.isfinite(rows.values)
        records: list[bytes | memoryview] = [b""] * len(finite)
        groups = _alike(rows, finite, seed_ids is None)
        for (number, mask), indices in groups.items():
            seed_id = None if seed_ids is None else seed_ids[number]
            template = self._template(mask, seed_id, finite[indices[0]])
            if template is None:
                continue
            some = rows if len(groups) == 1 else chosen(rows, indices)
            filled = template.fill(some.times, some.values)
            for index, record in zip(indices, filled, strict=True):
                records[index] = record
        return records

    def _template(
        self, mask: bytes, seed_id: str | None, present: npt.NDArray[np.bool_]
    ) -> Template | None:
        """The template for frames with these metrics; None where there are none."""
        if (mask, seed_id) not in self._templates:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            metrics = STEP_METRICS if seed_id is None else SEED_METRICS
            columns = np.flatnonzero(present).tolist()
            self._templates[mask, seed_id] = (
                Template(metrics, columns, seed_id or "") if columns else None
            )
        return self._templates[mask, seed_id]


def encode_end(frame: StepFrame, resource: bytes) -> bytes:
    """One export request that says how a run ended; ``resource`` is serialised already."""
    request = ExportMetricsServiceRequest()
    of_us = request.resource_metrics.add()
    of_us.resource.ParseFromString(resource)
    scope = of_us.scope_metrics.add()
    scope.scope.name, scope.scope.version = SCOPE, __version__
    metric = scope.metrics.add(name=RUN_ENDED.instrument, unit=RUN_ENDED.unit)
    point = metric.gauge.data_points.add(
        time_unix_nano=frame.time_unix_nano, as_double=float(frame.step)
    )
    if frame.values:  # custom ones, behind the last step
        names = [key.removeprefix(PREFIX) for key in frame.values]
        own = custom_metric(names)
        for each, value in zip(own.gauge.data_points, frame.values.values(), strict=True):
            each.time_unix_nano, each.as_double = frame.time_unix_nano, value
        scope.metrics.append(own)
    if frame.ended is not None:
        point.attributes.add(key=HOW_ENDED).value.string_value = frame.ended.how.value
        if frame.ended.exception:
            point.attributes.add(key=EXCEPTION_TYPE).value.string_value = frame.ended.exception
    return request.SerializeToString()


def _alike(
    rows: Rows, finite: npt.NDArray[np.bool_], are_steps: bool
) -> Mapping[tuple[int, bytes], Sequence[int]]:
    """Indices of the rows by (number of the seed, mask of the metrics present)."""
    if are_steps and (finite == finite[0]).all():
        # Nearly always, and a third of the work of encoding when it was not looked for.
        return {(_STEP, np.packbits(finite[0]).tobytes()): range(len(finite))}
    masks = [mask.tobytes() for mask in np.packbits(finite, axis=1)]
    numbers = [_STEP] * len(masks) if are_steps else rows.tags.tolist()
    groups: dict[tuple[int, bytes], list[int]] = {}
    for index, key in enumerate(zip(numbers, masks, strict=True)):
        groups.setdefault(key, []).append(index)
    return groups


def _serialised(metrics: Sequence[Metric], seed_id: str, mark: int) -> bytes:
    """One ``ScopeMetrics`` field of a ``ResourceMetrics``, marks for times and values."""
    (value,) = np.frombuffer(_VALUE_MARKS[mark], "<f8").tolist()
    resource_metrics = ResourceMetrics()
    scope_metrics = resource_metrics.scope_metrics.add()
    scope_metrics.scope.name = SCOPE
    scope_metrics.scope.version = __version__
    for metric in metrics:
        # No description: it would be sent again with every step.
        message = scope_metrics.metrics.add(name=metric.instrument, unit=metric.unit)
        point = message.gauge.data_points.add(time_unix_nano=_TIME_MARKS[mark], as_double=value)
        if metric.scope == "seed":
            point.attributes.add(key=SEED_ID).value.string_value = seed_id
    return resource_metrics.SerializeToString()


def _places(first: bytes, second: bytes) -> tuple[list[int], list[int]]:
    """Where times and where values lie: the runs of bytes in which the two differ."""
    differs = np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)
    starts = np.flatnonzero(differs & ~np.roll(differs, 1)).tolist()
    time_mark = _TIME_MARKS[0].to_bytes(8, "little")
    times = [start for start in starts if first[start : start + 8] == time_mark]
    values = [start for start in starts if first[start : start + 8] == _VALUE_MARKS[0]]
    return times, values


def _packing(
    scope: bytes, times: Sequence[int], values: Sequence[int]
) -> tuple[list[Any], Callable[..., bytes]]:
    """What lies before each time and value in ``scope``, None where these are to go, and what
    makes bytes of it all."""
    parts: list[Any] = []
    form, end = "<", 0
    for time, value in zip(times, values, strict=True):
        before, between = scope[end:time], scope[time + 8 : value]
        parts += (before, None, between, None)
        form += f"{len(before)}sq{len(between)}sd"
        end = value + 8
    return [*parts, scope[end:]], Struct(f"{form}{len(scope) - end}s").pack
