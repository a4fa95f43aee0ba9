"""Recordings: tapes in files, exact to the last bit and small enough to keep in a repository.

A file holds records, each behind its size as four bytes: an xz stream of MessagePack. Most
columns of a frame follow from others (a weighted mean from the losses before) or from few
digits (times are whole nanoseconds, losses single precision). So each column is kept as a
forecast's few digits and as what has to be XORed to the forecast, which is nearly always
nothing. A forecast that is wrong costs space and never a bit; a digest over all values says
so if ever a formula here is not the one that was recorded with.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from math import nan
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from bench.scenarios.suite import Scenario, path
from esper_otel.leyline.decisions import Proposal
from esper_otel.leyline.frames import StepFrame
from esper_otel.leyline.metrics import BY_KEY, SEED_KEYS, STEP_KEYS
from esper_otel.tolaria.seal import WeightedStatistics

Column = npt.NDArray[np.float64]
Columns = dict[str, Column]

_SIZE = struct.Struct(">I")
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


class RecordingError(ValueError):
    """A file that cannot be read back as it was written; says where and what to do."""


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """A proposal, and the frames (first, last + 1) at which it was made."""

    first: int
    end: int
    proposal: Proposal


class Recorded(msgspec.Struct, frozen=True):
    """One rank of one training.

    ``at`` is the step at which the trouble was brought in, None for a healthy run. Row i
    of every column of ``steps`` is frame i, of ``seeds`` that of frame ``seed_frames[i]``
    and seed ``seed_ids[seed_numbers[i]]``. ``load`` is the machine's load average
    over a minute, before and after.
    """

    scenario: Scenario
    rank: int
    world_size: int
    at: int | None
    load: tuple[float, float]
    times: npt.NDArray[np.int64]
    steps: Columns
    seed_ids: list[str]
    seed_frames: npt.NDArray[np.int64]
    seed_numbers: npt.NDArray[np.int64]
    seeds: Columns
    wishes: list[Wish]

    def frames(self) -> Iterator[tuple[StepFrame, Proposal | None]]:
        """The frames and proposals, in order."""
        rows = _dictionaries(_with_base_rate(self.steps), len(self.times))
        seed_rows = _dictionaries(self.seeds, len(self.seed_frames))
        seeds_of: dict[int, dict[str, dict[str, float]]] = {}
        for row, frame, number in zip(
            seed_rows, self.seed_frames.tolist(), self.seed_numbers.tolist(), strict=True
        ):
            seeds_of.setdefault(frame, {})[self.seed_ids[number]] = row
        wish_at = {
            frame: wish.proposal
            for wish in self.wishes
            for frame in range(wish.first, wish.end)
        }
        run, instance = self.scenario.name, f"{self.scenario.name}/{self.rank}"
        for place, (time, values) in enumerate(zip(self.times.tolist(), rows, strict=True)):
            step = int(values["step"])
            seeds = seeds_of.get(place, {})
            frame = StepFrame(run, instance, self.rank, step, time, values, seeds)
            yield frame, wish_at.get(place)


def _with_base_rate(steps: Columns) -> Columns:
    """``steps`` with the base rate that trainers tell by now, where it was not recorded yet: in
    these loops it is the first rate."""
    rates = steps.get("optimizer_lr")
    if rates is None or "optimizer_lr_base" in steps:
        return steps
    known = rates[np.isfinite(rates)]
    return {**steps, "optimizer_lr_base": np.full(len(rates), known[0] if len(known) else nan)}


class _Packed(msgspec.Struct, frozen=True):
    """A record as it lies in a file; what is not in it follows from the columns."""

    scenario: Scenario
    rank: int
    world_size: int
    at: int | None
    load: tuple[float, float]
    keys: list[str]
    seed_keys: list[str]
    seed_ids: list[str]
    wishes: list[Wish]
    count: int
    seed_count: int
    digest: int
    planes: bytes


def append(file: Path, ranks: list[Recorded]) -> None:
    """Write the ranks of one scenario behind what is in ``file``, in one piece."""
    file.parent.mkdir(parents=True, exist_ok=True)
    framed = [_SIZE.pack(len(body)) + body for body in map(packed, ranks)]
    with file.open("ab") as out:
        out.write(b"".join(framed))


def read(file: Path) -> Iterator[Recorded]:
    """The records in ``file``; raises :class:`RecordingError` at one that is damaged."""
    for body in bodies(file):
        try:
            yield unpacked(body)
        except (lzma.LZMAError, msgspec.DecodeError, RecordingError) as error:
            raise RecordingError(f"{file}: {error}; record it anew") from None


def bodies(file: Path) -> Iterator[bytes]:
    """The records in ``file`` as they lie there."""
    with file.open("rb") as records:
        while size := records.read(_SIZE.size):
            wanted = _SIZE.unpack(size)[0] if len(size) == _SIZE.size else -1
            body = records.read(max(wanted, 0))
            if len(body) != wanted:
                raise RecordingError(f"{file}: ends inside a record; record it anew")
            yield body


def known(folder: Path) -> set[Scenario]:
    """The scenarios that are recorded in ``folder``."""
    files = sorted(folder.glob("*.tapes"))
    return {recorded.scenario for file in files for recorded in read(file)}


def forget(scenarios: set[Scenario], folder: Path) -> None:
    """Take the records of ``scenarios`` out of ``folder``."""
    for file in {path(scenario, folder) for scenario in scenarios}:
        if not file.exists():
            continue
        kept = [body for body in bodies(file) if unpacked(body).scenario not in scenarios]
        file.write_bytes(b"".join(_SIZE.pack(len(body)) + body for body in kept))


def packed(recorded: Recorded) -> bytes:
    """A record as it lies in a file."""
    writer = _Writer()
    writer.integers(recorded.times)
    writer.integers(recorded.seed_frames)
    writer.integers(recorded.seed_numbers)
    _put(writer, recorded.steps)
    _put(writer, recorded.seeds)
    body = msgspec.msgpack.encode(
        _Packed(
            scenario=recorded.scenario,
            rank=recorded.rank,
            world_size=recorded.world_size,
            at=recorded.at,
            load=recorded.load,
            keys=list(recorded.steps),
            seed_keys=list(recorded.seeds),
            seed_ids=recorded.seed_ids,
            wishes=recorded.wishes,
            count=len(recorded.times),
            seed_count=len(recorded.seed_frames),
            digest=_digest(recorded.steps, recorded.seeds),
            planes=b"".join(writer.planes),
        )
    )
    return lzma.compress(body, lzma.FORMAT_XZ, filters=_FILTERS)


def unpacked(body: bytes) -> Recorded:
    """The record in ``body``; raises :class:`RecordingError` when its values are others."""
    record = msgspec.msgpack.decode(lzma.decompress(body), type=_Packed)
    reader = _Reader(record.planes)
    times = reader.integers(record.count)
    seed_frames = reader.integers(record.seed_count)
    seed_numbers = reader.integers(record.seed_count)
    steps = _take(reader, record.keys, record.count)
    seeds = _take(reader, record.seed_keys, record.seed_count)
    if _digest(steps, seeds) != record.digest:
        raise RecordingError(f"{record.scenario.name} does not read as it was recorded")
    return Recorded(
        scenario=record.scenario,
        rank=record.rank,
        world_size=record.world_size,
        at=record.at,
        load=record.load,
        times=times,
        steps=steps,
        seed_ids=record.seed_ids,
        seed_frames=seed_frames,
        seed_numbers=seed_numbers,
        seeds=seeds,
        wishes=record.wishes,
    )


class _Writer:
    """Arrays as byte planes: the first bytes of all elements, then the second ones, …"""

    def __init__(self) -> None:
        self.planes: list[bytes] = []

    def plane(self, array: npt.NDArray[np.generic]) -> None:
        self.planes.append(
            array.view(np.uint8).reshape(len(array), array.dtype.itemsize).T.tobytes()
        )

    def integers(self, array: npt.NDArray[np.int64]) -> None:
        self.plane(np.diff(array, prepend=np.int64(0)).astype("<i8"))


class _Reader:
    """What a :class:`_Writer` wrote, in the same order."""

    def __init__(self, planes: bytes) -> None:
        self._planes = planes
        self._offset = 0

    def plane(self, dtype: str, count: int) -> npt.NDArray[np.generic]:
        width = np.dtype(dtype).itemsize
        end = self._offset + width * count
        part = np.frombuffer(self._planes[self._offset : end], np.uint8)
        self._offset = end
        return np.ascontiguousarray(part.reshape(width, count).T).view(dtype).reshape(count)

    def integers(self, count: int) -> npt.NDArray[np.int64]:
        return np.cumsum(self.plane("<i8", count).astype(np.int64))


@np.errstate(all="ignore")
def _put(writer: _Writer, columns: Columns) -> None:
    for key, column in columns.items():
        forecast = _FORECASTS.get(key)
        if forecast is not None:
            guess = forecast(columns, column)
            if key == "samples_per_s":
                writer.integers(_samples(columns, column))
        elif BY_KEY[key].unit == "ms":
            nanoseconds = _whole(column * 1e6)
            writer.integers(nanoseconds)
            guess = nanoseconds / 1e6
        else:
            single = column.astype("<f4")
            writer.plane(single)
            guess = single.astype(np.float64)
        writer.plane(_bits(column) ^ _bits(guess))


@np.errstate(all="ignore")
def _take(reader: _Reader, keys: list[str], count: int) -> Columns:
    columns: Columns = {}
    for key in keys:
        forecast = _FORECASTS.get(key)
        if key == "samples_per_s":
            guess = _rate(columns, reader.integers(count))
        elif forecast is not None:
            guess = forecast(columns, np.full(count, nan))
        elif BY_KEY[key].unit == "ms":
            guess = reader.integers(count) / 1e6
        else:
            guess = reader.plane("<f4", count).astype(np.float64)
        residual = reader.plane("<u8", count).astype(np.uint64)
        columns[key] = (_bits(guess) ^ residual).view(np.float64)
    return columns


def _bits(column: Column) -> npt.NDArray[np.uint64]:
    """Doubles as their bits; NaN, which means absent, is always the same one."""
    return np.where(np.isnan(column), nan, column).astype("<f8").view("<u8")


def _whole(column: Column) -> npt.NDArray[np.int64]:
    """The nearest whole numbers that a double can still count by one."""
    most = float(1 << 52)
    return np.rint(np.clip(np.nan_to_num(column), -most, most)).astype(np.int64)


def _samples(columns: Columns, rates: Column) -> npt.NDArray[np.int64]:
    """Samples of each step."""
    return _whole(rates * _column(columns, "step_latency_ms", len(rates)) / 1e3)


def _rate(columns: Columns, samples: npt.NDArray[np.int64]) -> Column:
    """Samples per second; NaN where the latency of the step is not known."""
    latencies = _column(columns, "step_latency_ms", len(samples))
    return samples * 1e3 / latencies


def _column(columns: Columns, key: str, count: int) -> Column:
    return columns.get(key, np.full(count, nan))


def _of_statistics(key: str, value: Callable[[WeightedStatistics], float]) -> _Forecast:
    def forecast(columns: Columns, column: Column) -> Column:
        statistics = WeightedStatistics()
        guess = np.full(len(column), nan)
        for place, number in enumerate(_column(columns, key, len(column)).tolist()):
            if number == number:
                statistics.update(number)
                guess[place] = value(statistics)
        return guess

    return forecast


def _loss_delta(columns: Columns, column: Column) -> Column:
    return np.diff(_column(columns, "loss", len(column)), prepend=nan)


_Forecast = Callable[[Columns, Column], Column]

_FORECASTS: Mapping[str, _Forecast] = {
    "samples_per_s": lambda columns, column: _rate(columns, _samples(columns, column)),
    "loss_delta": _loss_delta,
    "loss_ewma": _of_statistics("loss", lambda statistics: statistics.mean),
    "loss_volatility": _of_statistics("loss", lambda statistics: statistics.deviation),
    "grad_norm_ewma": _of_statistics("gradient_norm", lambda statistics: statistics.mean),
    "grad_var": _of_statistics("gradient_norm", lambda statistics: statistics.variance),
}
"""Columns that follow from others, which come before them (:func:`ordered`)."""


def ordered(columns: Columns) -> Columns:
    """``columns`` without empty ones, those first that others are forecast from."""
    known = [key for key in (*STEP_KEYS, *SEED_KEYS) if key in columns]
    present = [key for key in known if not np.isnan(columns[key]).all()]
    present.sort(key=lambda key: key in _FORECASTS)
    return {key: columns[key] for key in present}


def _digest(steps: Columns, seeds: Columns) -> int:
    digest = 0
    for columns in (steps, seeds):
        for key, column in columns.items():
            digest = zlib.crc32(_bits(column).tobytes(), zlib.crc32(key.encode(), digest))
    return digest


def _dictionaries(columns: Columns, count: int) -> list[dict[str, float]]:
    """The rows of ``columns`` as values by key, absent ones left out."""
    rows: list[dict[str, float]] = [{} for _ in range(count)]
    order = (*STEP_KEYS, *SEED_KEYS)
    for key in sorted(columns, key=order.index):
        for row, value in zip(rows, columns[key].tolist(), strict=True):
            if value == value:
                row[key] = value
    return rows
