"""Shapes: parts of a request that differ from parts before them in times and values alone.

Every producer sends the same metrics, attributes and order with every step. So the bytes of a
``ScopeMetrics`` are walked through once; of the next one whose other bytes are all the same,
times and values are read where they lie. What is the same to the byte means the same, since
protobuf gives a time and a value eight bytes each, whatever they are: nothing is guessed.
``bench/reading.py`` measures it against parsing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from struct import Struct
from typing import NamedTuple

from google.protobuf.message import DecodeError
from opentelemetry.proto.metrics.v1.metrics_pb2 import ScopeMetrics

from esper_otel.leyline.metrics import BY_INSTRUMENT, RUN_ENDED, SEED_ID
from esper_otel.leyline.protobuf import FieldError, fields_of
from esper_tamiyo.receiving.pipe import PackedMap
from esper_tamiyo.receiving.points import number_points, text_of

MAX_BYTES = 8 << 20
"""Most bytes that all known shapes take, by estimate; beyond it all are forgotten."""

MAX_SHAPE = 32 * 1024
"""Longest part that is learned, in bytes: of four hundred metrics."""

MAX_LEARNED = 32
"""Shapes that are learned of one request: to learn one takes three times as long as to parse
it."""

_MAX_LAYOUTS = 4
"""Most places of holes that parts of one length may have."""

_MAX_FAILURES = 4
"""Parts of one length that could not be learned, after which none is tried any more."""

_MAX_LENGTHS = 4096

_METRICS = 2 << 3 | 2
_GAUGE, _SUM = 5 << 3 | 2, 7 << 3 | 2
_POINTS = 1 << 3 | 2
_TIME = 3 << 3 | 1
_DOUBLE, _INT = 4 << 3 | 1, 6 << 3 | 1
_CODES = {_TIME: "Q", _DOUBLE: "d", _INT: "q"}


class ValuesOf(NamedTuple):
    """Values of the step, for which ``seed_id`` is empty, or of one seed."""

    seed_id: str
    keys: tuple[str, ...]
    pick: Callable[[Sequence[float]], Sequence[float]] | None
    """Picks them out of all values; None: they are all values."""
    packed: PackedMap
    step_at: int
    """Place of the step's number among them, -1 where there is none."""


class Shape(NamedTuple):
    """What the values of a part are, when its times and values are left out."""

    groups: tuple[ValuesOf, ...]
    metrics: int


class Read(NamedTuple):
    """A part of a known shape; all its points have one time."""

    shape: Shape
    time_unix_nano: int
    values: Sequence[float]


class _KnownPart(NamedTuple):
    """A part that came before: where its holes lie, and its bytes around them."""

    length: int
    layout: _Holes
    fixed: tuple[bytes, ...]
    shape: Shape


class _Holes:
    """Where the holes of a part lie, and the parts that have them there."""

    __slots__ = ("fixed", "has_ints", "holes", "parts", "times", "values")

    def __init__(self, length: int, holes: list[tuple[int, str]]) -> None:
        holes_format, fixed_format, at = "<", "<", 0
        for place, code in holes:
            holes_format += f"{place - at}x{code}"
            fixed_format += f"{place - at}s8x"
            at = place + 8
        self.holes = Struct(holes_format)
        self.fixed = Struct(f"{fixed_format}{length - at}s")
        first = 0 if holes[0][1] == "Q" else 1
        self.times = slice(first, None, 2)
        self.values = slice(1 - first, None, 2)
        self.has_ints = any(code == "q" for _, code in holes)
        self.parts: dict[tuple[bytes, ...], _KnownPart] = {}


class KnownShapes:
    """Shapes of parts that came before; their memory is bounded."""

    def __init__(self) -> None:
        self._layouts: dict[int, list[_Holes]] = {}
        self._missed: dict[int, int] = {}
        """By length: parts that are not known yet."""
        self._failed: dict[int, int] = {}
        self._bytes = 0
        self._learned = 0
        self._before: _KnownPart | None = None
        """The part that was read before this one."""
        self._next: dict[int, _KnownPart] = {}
        """By the identity of a part: the one that came behind it the last time. To compare
        with one takes a quarter of what looking for it does."""

    def begin_request(self) -> None:
        """Another request comes, of which shapes may be learned."""
        self._learned = 0

    def read(self, data: bytes, begin: int, end: int) -> Read | None:
        """The ``ScopeMetrics`` from ``begin`` to ``end``, None if it has to be parsed.

        One that comes for the second time, by its length, is learned for the next.
        """
        reads = self.read_all(data, ((begin, begin, end),))
        if reads is None:
            self._miss(data, begin, end)
        return reads[0] if reads else None

    def read_all(self, data: bytes, parts: Iterable[tuple[int, int, int]]) -> list[Read] | None:
        """Parts of a request, each with where its body begins and ends; None if one is not
        known, and no parts if one has to be parsed although it is."""
        reads = []
        following, before = self._next, self._before
        for _, begin, end in parts:
            part = following.get(id(before))
            if (
                part is None
                or part.length != end - begin
                or part.layout.fixed.unpack_from(data, begin) != part.fixed
            ):
                part = self._found(data, begin, end)
                if part is None:
                    return None
                following[id(before)] = part
            self._before = before = part
            layout = part.layout
            found = layout.holes.unpack_from(data, begin)
            times = found[layout.times]
            if times.count(times[0]) != len(times):
                return []
            values: Sequence[float] = found[layout.values]
            if layout.has_ints:
                values = [*map(float, values)]
            reads.append(Read(part.shape, times[0], values))
        return reads

    def _found(self, data: bytes, begin: int, end: int) -> _KnownPart | None:
        for layout in self._layouts.get(end - begin, ()):
            part = layout.parts.get(layout.fixed.unpack_from(data, begin))
            if part is not None:
                return part
        return None

    def _miss(self, data: bytes, begin: int, end: int) -> None:
        length = end - begin
        missed = self._missed.get(length, 0)
        if missed == 0:
            if len(self._missed) >= _MAX_LENGTHS:
                self._missed.clear()
                self._failed.clear()
            self._missed[length] = 1
        elif (
            length <= MAX_SHAPE
            and self._learned < MAX_LEARNED
            and self._failed.get(length, 0) < _MAX_FAILURES
        ):
            self._learned += 1
            if not self._learn(data[begin:end]):
                self._failed[length] = self._failed.get(length, 0) + 1

    def _learn(self, part: bytes) -> bool:
        try:
            holes = _holes_of(part)
            shape = shape_of(part)
        except (FieldError, DecodeError):
            return False
        if not holes or shape is None:
            return False
        size = 3 * len(part) + 150 * len(holes)
        if self._bytes + size > MAX_BYTES:
            self._layouts.clear()
            self._next.clear()
            self._before = None
            self._bytes = 0
        layouts = self._layouts.setdefault(len(part), [])
        layout = _Holes(len(part), holes)
        for other in layouts:
            if other.holes.format == layout.holes.format:
                layout = other
                break
        else:
            if len(layouts) >= _MAX_LAYOUTS:
                return False
            layouts.append(layout)
        fixed = layout.fixed.unpack(part)
        layout.parts[fixed] = _KnownPart(len(part), layout, fixed, shape)
        self._bytes += size
        return True


def shape_of(part: bytes) -> Shape | None:
    """What the points of a ``ScopeMetrics`` are; None if it has any that are not numbers of a
    step or a seed, each metric once. Raises ``DecodeError``."""
    metrics = ScopeMetrics.FromString(part).metrics
    columns: dict[str, dict[str, int]] = {}
    count = 0
    for metric in metrics:
        known = BY_INSTRUMENT.get(metric.name)
        points = number_points(metric)
        if known is None or points is None or metric.name == RUN_ENDED.instrument:
            return None
        for point in points:
            is_of_seed = known.scope == "seed"
            seed_id = text_of(point.attributes, SEED_ID) if is_of_seed else ""
            group = columns.setdefault(seed_id, {})
            if known.key in group or (is_of_seed and not seed_id):
                return None
            group[known.key] = count
            count += 1
    groups = tuple(
        ValuesOf(
            seed_id,
            tuple(group),
            None if len(columns) == 1 else _picker(group.values()),
            PackedMap.of([*group], seed_id),
            [*group].index("step") if "step" in group else -1,
        )
        for seed_id, group in columns.items()
    )
    return Shape(groups, len(metrics)) if count else None


def _picker(columns: Iterable[int]) -> Callable[[Sequence[float]], Sequence[float]]:
    places = [*columns]
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places)


def _holes_of(part: bytes) -> list[tuple[int, str]]:
    """Where times and values lie, in order, each with its code of :mod:`struct`; empty where
    some point has not one of each, or they do not alternate. Raises ``FieldError``."""
    holes: list[tuple[int, str]] = []
    for key, _, metric, metric_end in fields_of(part, 0, len(part)):
        if key != _METRICS:
            continue
        kinds = [
            field
            for field in fields_of(part, metric, metric_end)
            if field[0] & 7 == 2 and field[0] >> 3 not in (1, 2, 3, 12)
        ]
        if len(kinds) != 1 or kinds[0][0] not in (_GAUGE, _SUM):
            return []
        for point, point_end in _points_in(part, *kinds[0][2:]):
            of_point = [
                (place, _CODES[key])
                for key, _, place, _ in fields_of(part, point, point_end)
                if key in _CODES
            ]
            if len(of_point) != 2 or (of_point[0][1] == "Q") is (of_point[1][1] == "Q"):
                return []
            holes += of_point
    is_time = [code == "Q" for _, code in holes]
    return holes if len({*is_time[::2]}) == 1 else []


def _points_in(part: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    for key, _, point, point_end in fields_of(part, begin, end):
        if key == _POINTS:
            yield point, point_end
