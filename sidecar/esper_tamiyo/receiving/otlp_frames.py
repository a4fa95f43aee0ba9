"""OTLP metrics in, step records out. Pure; the official protobuf classes parse all parts
without a known shape.

A producer's points of one step share a timestamp: within one resource they are gathered
by it, and ``tolaria.step`` at that time says which step it was. Walking points in Python
costs about 5 µs each, so metrics are told apart by name before a point is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as OtlpMetric
from opentelemetry.proto.metrics.v1.metrics_pb2 import NumberDataPoint, ResourceMetrics

from esper_otel.leyline.custom import NAME as CUSTOM_NAME
from esper_otel.leyline.custom import custom_key
from esper_otel.leyline.endings import run_end
from esper_otel.leyline.frames import (
    MAX_CUSTOM,
    MAX_CUSTOM_NAME,
    MAX_NAME,
    MAX_SEEDS_PER_FRAME,
    MAX_STEP,
    StepFrame,
)
from esper_otel.leyline.metrics import (
    BY_INSTRUMENT,
    CUSTOM,
    EXCEPTION_TYPE,
    HOW_ENDED,
    RUN_ENDED,
    SEED_ID,
)
from esper_otel.leyline.protobuf import FieldError
from esper_tamiyo.receiving.harvest import (
    AMOUNT,
    NAME,
    NO_STEP,
    SEEDS,
    TIME,
    Harvest,
    TooMuchError,
)
from esper_tamiyo.receiving.moments import Identity, Moment
from esper_tamiyo.receiving.pieces import (
    PAUSE,
    PIECE,
    metrics_of,
    outline_of,
    resources_of,
)
from esper_tamiyo.receiving.pipe import packed_identity
from esper_tamiyo.receiving.points import identity_of, number_points, text_of, value_of
from esper_tamiyo.receiving.shapes import KnownShapes, Read

MAX_RESOURCES = 4096
"""Most resources that a request may have."""

STEPS_AT_ONCE = 256
"""Steps that are made frames of between two pauses."""

MAX_HEADS, MAX_HEAD = 2048, 1024
"""Resources that are known again by their bytes, and most bytes of one."""


def _never(whose: Identity, time_unix_nano: int) -> bool:
    return False


def frames_of(
    request: ExportMetricsServiceRequest, is_old: Callable[[Identity, int], bool] = _never
) -> Harvest:
    """The step frames in ``request``, by resource and step, without those that are old."""
    harvest = Harvest([])
    for group in request.resource_metrics:
        for _ in _reap(identity_of(group), moments_of(group, harvest), harvest, is_old):
            pass
    return harvest


class Known:
    """What is known from requests before: shapes, and who sent them. Its memory is bounded."""

    def __init__(self) -> None:
        self.shapes = KnownShapes()
        self._senders: dict[bytes, tuple[Identity, bytes]] = {}

    def sender(self, head: bytes) -> tuple[Identity, bytes]:
        """Whose the points behind these bytes are, and how the pipe says so, which is empty for
        names that it takes none of; raises ``DecodeError``."""
        sender = self._senders.get(head)
        if sender is None:
            whose = identity_of(ResourceMetrics.FromString(head))
            packed = b""
            if not _is_nobody(whose):
                packed = packed_identity(whose.run, whose.instance, whose.rank)
            sender = whose, packed
            if len(head) <= MAX_HEAD:
                if len(self._senders) >= MAX_HEADS:
                    self._senders.clear()
                self._senders[head] = sender
        return sender


def gather(
    data: bytes,
    harvest: Harvest,
    is_old: Callable[[Identity, int], bool] = _never,
    known: Known | None = None,
) -> Iterator[None]:
    """As :func:`frames_of`, of a request that is not parsed yet, a piece at a time; what has a
    known shape is packed for the pipe at once.

    Yields between pieces, so that whoever calls can look after other things. Raises
    ``FieldError`` and ``DecodeError`` for what is no request, and :class:`TooMuchError`.
    ``known`` is what earlier requests have taught, and is taught by this one.
    """
    known = known or Known()
    known.shapes.begin_request()
    since = 0
    for count, (begin, end) in enumerate(resources_of(data), 1):
        if count > MAX_RESOURCES:
            raise TooMuchError(f"a request may have {MAX_RESOURCES} resources")
        if end - since > PIECE:
            since = begin
            yield
        moments: dict[int, Moment] = {}
        try:
            head, scopes = outline_of(data, begin, end)
        except FieldError:
            if end - begin > PIECE:
                raise
            # The official classes know fields that an outline does not.
            group = ResourceMetrics.FromString(data[begin:end])
            whose: Identity | None = identity_of(group)
            for scope in group.scope_metrics:
                _take(scope.metrics, moments, harvest)
        else:
            whose, packed = (None, b"") if head is None else known.sender(head)
            if whose and packed and end - begin <= PIECE:
                reads = known.shapes.read_all(data, scopes)
                if reads and harvest.take_whole(reads, whose, packed, is_old):
                    harvest.bound()
                    continue
            yield from _take_scopes(data, (begin, end), scopes, moments, harvest, known.shapes)
        yield from _reap(whose, moments, harvest, is_old)


def _take_scopes(
    data: bytes,
    within: tuple[int, int],
    scopes: Sequence[tuple[int, int, int]],
    moments: dict[int, Moment],
    harvest: Harvest,
    shapes: KnownShapes,
) -> Iterator[None]:
    """Take the parts of one resource in their order, those of a known shape without parsing."""
    since, end = within
    rest = scopes[0][0] if scopes else since
    for start, body, stop in scopes:
        read = shapes.read(data, body, stop)
        if read is not None:
            yield from _take_rest(data, rest, start, moments, harvest)
            rest = stop if _take_read(read, moments, harvest) else start
        if stop - since > PIECE:
            since = stop
            yield
    yield from _take_rest(data, rest, end, moments, harvest)


def _take_rest(
    data: bytes, begin: int, end: int, moments: dict[int, Moment], harvest: Harvest
) -> Iterator[None]:
    if begin == end:
        return
    for metrics in metrics_of(data, begin, end):
        if metrics is not PAUSE:
            _take(metrics, moments, harvest)
            harvest.bound()
        elif end - begin > PIECE:
            yield


def _take_read(read: Read, moments: dict[int, Moment], harvest: Harvest) -> bool:
    """Take the points of a part of a known shape; False, and none is taken, where each has to
    be looked at: a value is not finite, or a limit is reached."""
    (groups, metrics), time_unix_nano, values = read
    moment = moments.get(time_unix_nano)
    if not isfinite(sum(values)) or (moment is None and harvest.steps_left <= 0):
        return False
    seeds = moment.seeds if moment is not None else {}
    new = [of.seed_id for of in groups if of.seed_id and of.seed_id not in seeds]
    if new and (
        len(seeds) + len(new) > MAX_SEEDS_PER_FRAME
        or len(new) > harvest.seeds_left
        or max(map(len, new)) > MAX_NAME
    ):
        return False
    if moment is None:
        moment = moments[time_unix_nano] = Moment()
        harvest.steps_left -= 1
    harvest.seeds_left -= len(new)
    for seed_id, keys, pick, *_ in groups:
        into = moment.seeds.setdefault(seed_id, {}) if seed_id else moment.values
        into.update(zip(keys, values if pick is None else pick(values), strict=True))
    moment.points += len(values)
    harvest.walked += metrics + 1
    harvest.bound()
    return True


def _reap(
    whose: Identity | None,
    moments: dict[int, Moment],
    harvest: Harvest,
    is_old: Callable[[Identity, int], bool],
) -> Iterator[None]:
    """Make frames of the moments of one resource, some at a time; ``whose`` None: its names are
    too long."""
    if whose is None or _is_nobody(whose):
        for moment in moments.values():
            harvest.leave_out(NAME, moment.points)
        return
    frames: list[StepFrame] = []
    ends = []
    for count, (time_unix_nano, moment) in enumerate(moments.items(), 1):
        if count % STEPS_AT_ONCE == 0:
            yield
        frame = moment.step_frame(whose, time_unix_nano)
        end = moment.end_frame(whose, time_unix_nano)
        if end is not None:  # however late: nothing is decided about it
            ends.append(end)
        if frame is None and end is not None:
            harvest.used += moment.points
        elif frame is None:
            harvest.leave_out(TIME if "step" in moment.values else NO_STEP, moment.points)
        elif is_old(whose, time_unix_nano):
            harvest.old += moment.points
        else:
            harvest.used += moment.points
            frames.append(frame)
    frames.sort(key=_step)
    harvest.frames += frames + ends


def _is_nobody(whose: Identity) -> bool:
    """Whether its names are no names of a rank."""
    return max(len(whose.run), len(whose.instance)) > MAX_NAME or whose.rank < 0


def moments_of(group: ResourceMetrics, harvest: Harvest) -> dict[int, Moment]:
    """The points of one resource by their time; those that have no place are counted."""
    moments: dict[int, Moment] = {}
    for scope in group.scope_metrics:
        _take(scope.metrics, moments, harvest)
    return moments


def _take(metrics: Sequence[OtlpMetric], moments: dict[int, Moment], harvest: Harvest) -> None:
    harvest.walked += len(metrics) + 1
    for metric in metrics:
        known = BY_INSTRUMENT.get(metric.name)
        points = number_points(metric) if known else None
        if metric.name == RUN_ENDED.instrument and metric.HasField("gauge"):
            _take_ends(metric, moments, harvest)
        elif metric.name == CUSTOM.instrument and metric.HasField("gauge"):
            _take_custom(metric, moments, harvest)
        elif known is None or points is None:
            harvest.foreign += _point_count(metric)
        elif known.scope == "seed":
            _take_seed_points(known.key, points, moments, harvest)
        else:
            _take_step_points(known.key, points, moments, harvest)


def _take_step_points(
    key: str,
    points: Sequence[NumberDataPoint],
    moments: dict[int, Moment],
    harvest: Harvest,
) -> None:
    for point in points:
        value = value_of(point)
        if value is None:
            harvest.leave_out(NO_STEP)
            continue
        moment = moments.get(point.time_unix_nano) or _at(moments, point, harvest)
        if moment is None:
            continue
        moment.points += 1
        if isfinite(value):
            moment.values[key] = value
        else:
            moment.nonfinite += 1


def _take_seed_points(
    key: str,
    points: Sequence[NumberDataPoint],
    moments: dict[int, Moment],
    harvest: Harvest,
) -> None:
    for point in points:
        value = value_of(point)
        seed_id = text_of(point.attributes, SEED_ID)
        if value is None or not seed_id:
            harvest.leave_out(NO_STEP)
            continue
        moment = moments.get(point.time_unix_nano) or _at(moments, point, harvest)
        if moment is None:
            continue
        seed = moment.seeds.get(seed_id)
        if seed is None:
            seed = _seed_at(moment, seed_id, harvest)
            if seed is None:
                continue
        moment.points += 1
        if isfinite(value):
            seed[key] = value
        else:
            moment.nonfinite += 1


def _take_custom(metric: OtlpMetric, moments: dict[int, Moment], harvest: Harvest) -> None:
    for point in metric.gauge.data_points:
        value, name = value_of(point), text_of(point.attributes, CUSTOM_NAME)
        if value is None or not name:
            harvest.leave_out(NO_STEP)
            continue
        if len(name) > MAX_CUSTOM_NAME:
            harvest.leave_out(NAME)
            continue
        moment = moments.get(point.time_unix_nano) or _at(moments, point, harvest)
        if moment is None:
            continue
        if moment.custom >= MAX_CUSTOM:
            harvest.leave_out(AMOUNT)
            continue
        moment.custom += 1
        moment.points += 1
        if isfinite(value):
            moment.values[custom_key(name)] = value


def _take_ends(metric: OtlpMetric, moments: dict[int, Moment], harvest: Harvest) -> None:
    for point in metric.gauge.data_points:
        step, how = value_of(point), text_of(point.attributes, HOW_ENDED)
        end = run_end(how, text_of(point.attributes, EXCEPTION_TYPE))
        if end is None or step is None or not 0 <= step <= MAX_STEP or step != int(step):
            harvest.leave_out(NO_STEP)
            continue
        moment = moments.get(point.time_unix_nano) or _at(moments, point, harvest)
        if moment is None:
            continue
        moment.points += 1
        moment.end = int(step), end


def _at(moments: dict[int, Moment], point: NumberDataPoint, harvest: Harvest) -> Moment | None:
    """A new moment, at the time of ``point``; None if the request has too many."""
    if harvest.steps_left <= 0:
        harvest.leave_out(AMOUNT)
        return None
    harvest.steps_left -= 1
    moment = moments[point.time_unix_nano] = Moment()
    return moment


def _seed_at(moment: Moment, seed_id: str, harvest: Harvest) -> dict[str, float] | None:
    """A seed that is new at its moment; None if that is more than a step may report."""
    if len(seed_id) > MAX_NAME:
        harvest.leave_out(NAME)
    elif len(moment.seeds) >= MAX_SEEDS_PER_FRAME:
        harvest.leave_out(SEEDS)
    elif harvest.seeds_left <= 0:
        harvest.leave_out(AMOUNT)
    else:
        harvest.seeds_left -= 1
        seed = moment.seeds[seed_id] = {}
        return seed
    return None


def _point_count(metric: OtlpMetric) -> int:
    kind = metric.WhichOneof("data")
    return len(getattr(metric, kind).data_points) if kind else 0


def _step(frame: StepFrame) -> int:
    return frame.step
