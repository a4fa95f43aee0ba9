"""Layouts: where the numbers lie in the bytes of one ``ScopeMetrics``.

Whoever writes a step's metrics writes them alike at every step, and protobuf lays times and
values out as eight fixed bytes each. So one ``ScopeMetrics`` is walked field by field, and all
that differ from it only in those bytes are read by numpy in one go: walking each of them, or
having the protobuf classes do so, costs some microseconds a point.
:mod:`esper_otel.stream.encoding` writes by the same idea.

Field numbers are those of ``opentelemetry/proto/metrics/v1/metrics.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper_otel.leyline.custom import EVALUATION, NAME, custom_key, is_custom
from esper_otel.leyline.metrics import BY_INSTRUMENT, CUSTOM, SEED_ID, Metric
from esper_otel.leyline.protobuf import FIXED64, LENGTH, VARINT, fields_of, varint_at

Numbers = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]
Rows = npt.NDArray[np.uint8]

_METRICS = 2
"""``ScopeMetrics.metrics``."""
_NAME, _GAUGE, _SUM, _POINTS = 1, 5, 7, 1
_START, _TIME, _DOUBLE, _INTEGER, _ATTRIBUTES = 2, 3, 4, 6, 7


_KNOWN = {**BY_INSTRUMENT, CUSTOM.instrument: CUSTOM}

_ALL_EQUAL = 0x0101010101010101
"""Eight bytes that are true."""


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: number, wire type, and from where to where its value lies.

    Raises :class:`~esper_otel.leyline.protobuf.FieldError`.
    """
    for key, _, body, stop in fields_of(data, start, end):
        yield key >> 3, key & 7, body, stop


class Column(NamedTuple):
    """One point of a layout: its metric's key, whose it is, and where its numbers lie.

    ``seed`` is None for the step's own. ``is_integer``: it is an ``as_int``.
    ``is_evaluation``: it was measured on other data than those trained on.
    """

    key: str
    seed: str | None
    time_at: int
    value_at: int
    is_integer: bool
    is_evaluation: bool = False


class Block(NamedTuple):
    """Values of one producer at some times: ``values`` has a row per time, a column per key.

    ``times`` are Unix nanoseconds; ``seed`` is None where the values are the steps' own.
    ``are_evaluations``: measured between steps, and told at the next one's time or later.
    """

    seed: str | None
    keys: tuple[str, ...]
    times: Times
    values: Numbers
    are_evaluations: bool = False


class Layout:
    """The bytes of one ``ScopeMetrics``, and which of them are times and values."""

    def __init__(self, message: bytes) -> None:
        """Raises :class:`~esper_otel.leyline.protobuf.FieldError`."""
        holes: list[int] = []
        self.columns = list(_columns(message, holes))
        blank = np.frombuffer(message, np.uint8).copy()
        for hole in holes:
            blank[hole : hole + 8] = 0
        self._blank = blank
        self._constant = np.ones(len(message), np.bool_)
        for hole in holes:
            self._constant[hole : hole + 8] = False
        self._holes = sorted(set(holes))
        places = [at for column in self.columns for at in (column.time_at, column.value_at)]
        formats = [
            kind
            for column in self.columns
            for kind in ("<i8", "<i8" if column.is_integer else "<f8")
        ]
        self._numbers = np.dtype(
            {
                "names": [f"n{place}" for place in range(len(places))],
                "formats": formats,
                "offsets": places,
                "itemsize": len(message),
            }
        )
        self._whole = np.dtype(
            {
                "names": [f"h{hole}" for hole in self._holes],
                "formats": ["<i8"] * len(self._holes),
                "offsets": self._holes,
                "itemsize": len(message),
            }
        )

    def may_be_of(self, rows: Rows, places: Times) -> npt.NDArray[np.bool_]:
        """Which of ``rows`` agree with this layout in the bytes at ``places``."""
        places = places[self._constant[places]]
        if not len(places):
            return np.ones(len(rows), np.bool_)
        likely: npt.NDArray[np.bool_] = rows[:, places[0]] == self._blank[places[0]]
        for place in places[1:]:
            likely &= rows[:, place] == self._blank[place]
        return likely

    def differences(self, other: Layout) -> list[int]:
        """Places of at most two bytes in which the two, equally long, always differ."""
        both = self._constant & other._constant
        places: list[int] = np.flatnonzero(both & (self._blank != other._blank))[:2].tolist()
        return places

    def is_of(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of ``rows``, each as long as this one, have this layout."""
        equal = rows == self._blank
        if self._holes:
            holes = equal.view(np.uint8).view(self._whole)[:, 0]
            for hole in self._holes:
                holes[f"h{hole}"] = _ALL_EQUAL
        found: npt.NDArray[np.bool_] = equal.all(axis=1)
        return found

    def blocks(self, rows: Rows) -> Iterator[Block]:
        """What ``rows`` say, all of which have this layout.

        One block for each seed and one for the steps, where all points of a row share a time;
        points with times of their own make blocks of their own.
        """
        if not self.columns:
            return
        numbers = rows.view(self._numbers)[:, 0]
        times = np.empty((len(self.columns), len(rows)), np.int64)
        for place in range(len(self.columns)):
            times[place] = numbers[f"n{2 * place}"]
        together: dict[tuple[str | None, bool], list[tuple[int, str]]] = {}
        firsts: dict[tuple[str | None, bool], int] = {}
        differ = bool((times != times[0]).any())
        for place, column in enumerate(self.columns):
            whose = column.seed, column.is_evaluation
            first = firsts.setdefault(whose, place)
            if differ and not np.array_equal(times[place], times[first]):
                own = _values(numbers, [place])
                yield Block(whose[0], (column.key,), times[place], own, whose[1])
            else:
                together.setdefault(whose, []).append((place, column.key))
        for whose, chosen in together.items():
            keys = tuple(key for _, key in chosen)
            values = _values(numbers, [place for place, _ in chosen])
            yield Block(whose[0], keys, times[firsts[whose]], values, whose[1])


def _values(numbers: npt.NDArray[np.void], places: list[int]) -> Numbers:
    values = np.empty((len(numbers), len(places)), np.float64)
    for index, place in enumerate(places):
        values[:, index] = numbers[f"n{2 * place + 1}"]
    return values


def _columns(message: bytes, holes: list[int]) -> Iterator[Column]:
    for number, kind, start, end in fields(message, 0, len(message)):
        if number == _METRICS and kind == LENGTH:
            yield from _of_metric(message, start, end, holes)


def _of_metric(message: bytes, start: int, end: int, holes: list[int]) -> Iterator[Column]:
    metric: Metric | None = None
    data: list[tuple[int, int]] = []
    for number, kind, begin, stop in fields(message, start, end):
        if kind != LENGTH:
            continue
        if number == _NAME:
            metric = _KNOWN.get(message[begin:stop].decode(errors="replace"))
        elif number in (_GAUGE, _SUM):
            data.append((begin, stop))
    for begin, stop in data:
        for number, kind, first, last in fields(message, begin, stop):
            if number == _POINTS and kind == LENGTH:
                column = _point(message, first, last, holes, metric)
                if column is not None:
                    yield column


def _point(
    message: bytes, start: int, end: int, holes: list[int], metric: Metric | None
) -> Column | None:
    time_at = value_at = -1
    is_integer = is_evaluation = False
    seed: str | None = None
    name = ""
    for number, kind, begin, stop in fields(message, start, end):
        if kind == FIXED64 and number in (_START, _TIME, _DOUBLE, _INTEGER):
            holes.append(begin)
            if number == _TIME:
                time_at = begin
            elif number != _START:
                value_at, is_integer = begin, number == _INTEGER
        elif number == _ATTRIBUTES and kind == LENGTH:
            key, value = attribute(message, begin, stop)
            if key == SEED_ID and isinstance(value, str):
                seed = value
            elif key == NAME and isinstance(value, str):
                name = value
            elif key == EVALUATION:
                is_evaluation = value is True
    if metric is None or time_at < 0 or value_at < 0:
        return None
    if metric is CUSTOM:
        key = custom_key(name)
        where = (time_at, value_at, is_integer, is_evaluation)
        return Column(key, None, *where) if is_custom(key) else None
    if metric.scope != ("step" if seed is None else "seed"):
        return None
    return Column(metric.key, seed, time_at, value_at, is_integer)


def attribute(message: bytes, start: int, end: int) -> tuple[str, str | int | float | bool]:
    """Key and value of a ``KeyValue``; "" for values that are lists or maps."""
    key, value = "", b""
    for number, kind, begin, stop in fields(message, start, end):
        if kind == LENGTH and number == 1:
            key = message[begin:stop].decode(errors="replace")
        elif kind == LENGTH and number == 2:
            value = message[begin:stop]
    for number, kind, begin, stop in fields(value, 0, len(value)):
        if number == 1 and kind == LENGTH:
            return key, value[begin:stop].decode(errors="replace")
        if number in (2, 3) and kind == VARINT:
            whole = varint_at(value, begin, stop)[0]
            return key, bool(whole) if number == 2 else whole - ((whole >> 63) << 64)
        if number == 4 and kind == FIXED64:
            return key, float(np.frombuffer(value, "<f8", 1, begin)[0])
    return key, ""
