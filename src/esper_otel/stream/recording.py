"""Recording: OTLP in files, one for each signal, and reading them.

:mod:`esper_otel.leyline.otlp_file` has their format.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING

from esper_otel.home import CardKeeper, RunCard
from esper_otel.leyline.custom import NAME, custom_key
from esper_otel.leyline.events import Attribute
from esper_otel.leyline.frames import MAX_STEP, StepFrame
from esper_otel.leyline.metrics import (
    BY_INSTRUMENT,
    CUSTOM,
    INSTANCE_ID,
    RANK,
    RUN_ENDED,
    RUN_ID,
    SEED_ID,
)
from esper_otel.leyline.otlp_file import RecordingError, framed
from esper_otel.leyline.otlp_file import bodies as bodies_in
from esper_otel.run_settings import parse_tags
from esper_otel.settings import EsperSettings
from esper_otel.stream.destination import Signal

if TYPE_CHECKING:
    from opentelemetry.proto.metrics.v1.metrics_pb2 import ResourceMetrics, ScopeMetrics
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource

log = logging.getLogger("esper_otel")


ATTEMPT = "-attempt"
"""In the names of files of another attempt at a run, before its number; 1 is not said."""

LONGEST_RUN = 120
"""Characters of a run's name in the names of its files, which may have 255 in all."""


def stem(run_id: str, rank: int, pid: int | None = None) -> str:
    """Name of a run's files without folder and ending.

    What no file name has becomes _. A name that changes by this, or is cut, ends in a hash of
    the whole one, so that no two runs share their files.
    """
    name = re.sub(r"[^\w.-]", "_", run_id, flags=re.ASCII).lstrip(".")
    if name != run_id or not 0 < len(name) <= LONGEST_RUN:
        digest = hashlib.sha256(run_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name[: LONGEST_RUN - len(digest) - 1]}-{digest}"
    return f"{name}-rank{rank}" + ("" if pid is None else f"-{pid}")


def signal_of(path: Path) -> Signal | None:
    """The signal that the name of a recording tells, None when it tells none."""
    for signal in Signal:
        if path.name.endswith(f".{signal}.otlp"):
            return signal
    return None


def read_recording(path: Path) -> Iterator[bytes]:
    """The requests in ``path``, in order.

    Raises :class:`~esper_otel.leyline.otlp_file.RecordingError` at the first byte from
    which on there is none, after everything before it was yielded, and :class:`OSError`
    when it cannot be read.
    """
    with path.open("rb") as file:
        for _, body in bodies_in(file, path):
            yield body


class Recording:
    """Everything a run produces, appended to one file per signal as it comes.

    Files that are there already are left alone: then it is another attempt at the same run,
    with files of its own. A disk that fails ends the recording with one warning; the run goes
    on. ``card`` is kept beside it, where somebody looks for it there.
    """

    def __init__(self, folder: Path, stem: str, card: CardKeeper | None = None) -> None:
        self.card = card
        self._folder = folder
        self._stem = stem
        self._claimed = False
        self._files: dict[Signal, int] = {}
        self._paths: dict[Signal, Path] = {}
        self._failed = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files written so far."""
        return tuple(self._paths.values())

    def append(self, signal: Signal, body: bytes) -> None:
        """Write one request. Never raises."""
        if self._failed:
            return
        try:
            write_whole(self._file(signal), framed(body))
            if self.card is not None:
                self.card.look()
        except Exception as error:
            self._failed = True
            log.warning("recording to %s stopped: %s", self._folder, error)

    def close(self) -> None:
        """Close the files."""
        if self.card is not None and self._claimed:
            self.card.close()
        while self._files:
            os.close(self._files.popitem()[1])

    def _claim(self) -> None:
        """Make a file that nobody else has, and call the others as that one is called."""
        first = self._stem
        number = 1
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        while not self._is_free():
            number += 1
            self._stem = f"{first}{ATTEMPT}{number}"
        self._claimed = True
        # Whoever tidies up can see by it that somebody still writes.
        with suppress(OSError):
            fcntl.flock(self._files[Signal.METRICS], fcntl.LOCK_SH | fcntl.LOCK_NB)
        if number > 1:
            log.warning(
                "%s has been recorded in %s before; this is attempt %d, recorded as %s",
                first,
                self._folder,
                number,
                self._stem,
            )
        if self.card is not None:
            self.card.begin(self._folder, number)

    def _is_free(self) -> bool:
        """Whether no file of that name is there; then the one of metrics is ours."""
        paths = {signal: self._folder / f"{self._stem}.{signal}.otlp" for signal in Signal}
        if any(path.exists() for path in paths.values()):
            return False
        try:
            self._files[Signal.METRICS] = open_to_append(paths[Signal.METRICS], os.O_EXCL)
        except FileExistsError:
            return False
        self._paths[Signal.METRICS] = paths[Signal.METRICS]
        return True

    def _file(self, signal: Signal) -> int:
        if not self._claimed:
            self._claim()
        if signal not in self._files:
            path = self._folder / f"{self._stem}.{signal}.otlp"
            self._files[signal] = open_to_append(path)
            self._paths[signal] = path
        return self._files[signal]


def recording_of(
    settings: EsperSettings, run_id: str, config: Mapping[str, Attribute]
) -> Recording | None:
    """Where ``settings`` have a run recorded: in a folder of theirs, at home, or nowhere.

    At home each run has a folder, with a card in it that rank 0 keeps.
    """
    name = stem(run_id, settings.rank)
    if settings.recording_dir:
        return Recording(Path(settings.recording_dir), name)
    if not settings.record:
        return None
    card = None
    if not settings.rank:
        told = RunCard(
            run=run_id,
            name=settings.name,
            tags=parse_tags(settings.tags),
            ranks=settings.world_size,
        )
        card = CardKeeper(told, config)
    return Recording(settings.runs_path / stem(run_id, 0).removesuffix("-rank0"), name, card)


def open_to_append(path: Path, more: int = 0) -> int:
    """A descriptor that appends to ``path``, which is made with its folder.

    ``more`` are further flags of ``os.open``. Unbuffered: a forked child has nothing to flush
    twice. Raises :class:`OSError`.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | more
    return os.open(path, flags, 0o644)


def write_whole(file: int, data: bytes) -> None:
    """All of ``data``, or none of it and :class:`OSError`."""
    before = os.fstat(file).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
    except OSError:
        os.ftruncate(file, before)
        raise


_Values = dict[str, float]

_KNOWN = {**BY_INSTRUMENT, **{each.instrument: each for each in (CUSTOM, RUN_ENDED)}}


def read_frames(path: Path) -> Iterator[StepFrame]:
    """The step frames of a metrics recording, in order of writing.

    Metrics that are not in the registry are passed over, and so are values that are no numbers
    and steps without a number that a step may have. Raises
    :class:`~esper_otel.leyline.otlp_file.RecordingError` where the file turns bad.
    """
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceRequest,
    )

    with path.open("rb") as file:
        for offset, body in bodies_in(file, path):
            try:
                request = ExportMetricsServiceRequest.FromString(body)
            except DecodeError:
                raise RecordingError(path, offset, "not an OTLP metrics request") from None
            for resource_metrics in request.resource_metrics:
                yield from _frames(resource_metrics)


def _frames(resource_metrics: ResourceMetrics) -> Iterator[StepFrame]:
    """Frames of one resource: a step's ``ScopeMetrics``, and its seeds' by their time."""
    run, instance, rank = _identity(resource_metrics.resource)
    steps: list[tuple[int, _Values]] = []
    seeds: dict[int, dict[str, _Values]] = {}
    customs: dict[int, _Values] = {}
    for scope_metrics in resource_metrics.scope_metrics:
        time_unix_nano, seed_id, values = _values(scope_metrics)
        step = values.get("step", -1.0)
        if seed_id is not None:
            seeds.setdefault(time_unix_nano, {})[seed_id] = values
        elif 0 <= step <= MAX_STEP:
            steps.append((time_unix_nano, values))
        elif values:
            customs[time_unix_nano] = values
    for time_unix_nano, values in steps:
        yield StepFrame(
            run=run,
            instance=instance,
            rank=rank,
            step=int(values["step"]),
            time_unix_nano=time_unix_nano,
            values={**values, **customs.get(time_unix_nano, {})},
            seeds=seeds.get(time_unix_nano, {}),
        )


def _values(scope_metrics: ScopeMetrics) -> tuple[int, str | None, _Values]:
    """(time, seed id, values) of one ``ScopeMetrics`` as the stream writes it."""
    values: _Values = {}
    time_unix_nano, seed_id = 0, None
    ended = nan
    for metric in scope_metrics.metrics:
        registered = _KNOWN.get(metric.name)
        if registered is None:
            continue
        for point in metric.gauge.data_points:
            told = {each.key: each.value.string_value for each in point.attributes}
            time_unix_nano, value = point.time_unix_nano, point.as_double
            if registered is RUN_ENDED:
                ended = value
            elif isfinite(value):
                is_own = registered is CUSTOM
                values[custom_key(told.get(NAME, "")) if is_own else registered.key] = value
            seed_id = told.get(SEED_ID, seed_id)
    if values and isfinite(ended):  # custom values behind the last step, which the end names
        values["step"] = ended
    return time_unix_nano, seed_id, values


def _identity(resource: Resource) -> tuple[str, str, int]:
    """(run, instance, rank), empty and 0 where the resource does not say."""
    attributes = {attribute.key: attribute.value for attribute in resource.attributes}
    run, instance = (
        attributes[key].string_value if key in attributes else ""
        for key in (RUN_ID, INSTANCE_ID)
    )
    return run, instance, attributes[RANK].int_value if RANK in attributes else 0
