"""Perfetto: a trace of runs, each rank a process, with tracks for all that happened to it.

Tracks of a rank: its steps with their phases within, decisions, states of rules, events, each
seed with its stages and alpha, and a counter for every other metric. Of a phase it is known how
long it took in a step, not where in it: phases are drawn one behind another, in the order in
which loops go through them. Packets are those of ``perfetto/trace/track_event``; times are Unix
nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from esper_otel.export.grids import Grid, Steps, grids, replacing, time_of
from esper_otel.leyline.metrics import BY_KEY
from esper_otel.leyline.stages import Stage
from esper_otel.report.rulings import Ruling
from esper_otel.report.runs import ShownRun
from esper_otel.report.trainers import TrainerCurves

PHASES = {
    "input_wait_ms": "input wait",
    "forward_ms": "forward",
    "backward_ms": "backward",
    "optimizer_ms": "optimizer",
    "hook_latency_ms": "esper",
}
"""Parts of a step, in the order in which they are drawn."""

_STAGE, _ALPHA, _LATENCY = "kasmina.seed.stage", "kasmina.seed.alpha", "step_latency_ms"
_STAGES = {stage.value: stage.name for stage in Stage}
_SEQUENCE = 1
"""All packets are of one writer, who says so."""
_REALTIME, _BOOTTIME = 1, 6
"""Numbers of clocks: that of the calendar, and that of packets which name none."""


def write_trace(
    runs: Sequence[ShownRun], to: Path, wanted: Steps, on_share: Callable[[float], None]
) -> Iterator[Path]:
    """Write one trace of all ``runs``."""
    ranks = [(run, rank) for run in runs for rank in run.ranks]
    with replacing(to) as file:
        packets = Packets(file)
        packets.clocks(min((int(rank.span()[0]) for _, rank in ranks), default=0))
        for done, (run, rank) in enumerate(ranks):
            _write_rank(packets, run, rank, wanted)
            on_share((done + 1) / len(ranks))
    yield to


class Packets:
    """Packets on their way into a file, and the numbers of tracks."""

    def __init__(self, file: BinaryIO) -> None:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

        self._builder = StreamingTraceProtoBuilder(file)
        self._types = perfetto_trace_pb2.TrackEvent
        self._tracks = 0

    def clocks(self, time: int) -> None:
        """Say that times are those of the calendar."""
        packet = self._packet(time)
        for clock in (_BOOTTIME, _REALTIME):
            packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=time)
        self._builder.write_packet(packet)

    def add_process(self, name: str) -> int:
        """A process, which is a track as well; returns its number."""
        track, descriptor = self._descriptor()
        descriptor.track_descriptor.process.pid = track
        descriptor.track_descriptor.process.process_name = name
        self._builder.write_packet(descriptor)
        return track

    def add_track(self, name: str, parent: int, unit: str | None = None) -> int:
        """A track below ``parent``: of values where it has a ``unit``, else of slices."""
        track, descriptor = self._descriptor()
        descriptor.track_descriptor.name = name
        descriptor.track_descriptor.parent_uuid = parent
        if unit is not None:
            descriptor.track_descriptor.counter.unit_name = unit
        self._builder.write_packet(descriptor)
        return track

    def add_slice(self, track: int, name: str, start: int, end: int) -> None:
        """Something that lasted."""
        self.begin_slice(track, name, start, {})
        self.end_slice(track, end)

    def begin_slice(self, track: int, name: str, time: int, told: Mapping[str, Any]) -> None:
        """Something that begins; :meth:`end_slice` ends what began last on the track."""
        self._event(self._types.TYPE_SLICE_BEGIN, track, time, name, told)

    def end_slice(self, track: int, time: int, values: Mapping[int, float] = {}) -> None:
        """The end of what began last, and ``values`` of tracks at that time."""
        packet = self._packet(time)
        packet.track_event.type = self._types.TYPE_SLICE_END
        packet.track_event.track_uuid = track
        packet.track_event.extra_double_counter_track_uuids.extend(values)
        packet.track_event.extra_double_counter_values.extend(values.values())
        self._builder.write_packet(packet)

    def add_instant(self, track: int, name: str, time: int, told: Mapping[str, Any]) -> None:
        """Something that happened at one time."""
        self._event(self._types.TYPE_INSTANT, track, time, name, told)

    def add_value(self, track: int, time: int, value: float) -> None:
        """A value at one time."""
        packet = self._packet(time)
        packet.track_event.type = self._types.TYPE_COUNTER
        packet.track_event.track_uuid = track
        packet.track_event.double_counter_value = value
        self._builder.write_packet(packet)

    def _event(
        self, kind: int, track: int, time: int, name: str, told: Mapping[str, Any]
    ) -> None:
        packet = self._packet(time)
        packet.track_event.type = kind
        packet.track_event.track_uuid = track
        packet.track_event.name = name
        for key, value in told.items():
            note = packet.track_event.debug_annotations.add(name=key)
            if isinstance(value, bool):
                note.bool_value = value
            elif isinstance(value, int):
                note.int_value = value
            elif isinstance(value, float):
                note.double_value = value
            else:
                note.string_value = value
        self._builder.write_packet(packet)

    def _packet(self, time: int) -> Any:
        packet = self._builder.create_packet()
        packet.timestamp = time
        packet.trusted_packet_sequence_id = _SEQUENCE
        return packet

    def _descriptor(self) -> tuple[int, Any]:
        self._tracks += 1
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        packet.track_descriptor.uuid = self._tracks
        # In the order in which they are made, and not by their names.
        packet.track_descriptor.child_ordering = packet.track_descriptor.EXPLICIT
        packet.track_descriptor.sibling_order_rank = self._tracks
        return self._tracks, packet


def _write_rank(packets: Packets, run: ShownRun, rank: TrainerCurves, wanted: Steps) -> None:
    number = rank.source.rank
    process = packets.add_process(f"{run.name} rank {number}")
    steps = packets.add_track("steps", process)
    _write_decisions(packets, process, run, rank, wanted)
    _write_rules(packets, process, run, rank, wanted)
    events = [e for e in run.happenings if e.rank == number and e.step in wanted]
    if events:
        track = packets.add_track("events", process)
        for each in events:
            told = {"step": each.step, "severity": each.severity, "text": each.text}
            if each.seed_id:
                told["seed"] = each.seed_id
            packets.add_instant(track, each.name, each.time_unix_nano, told)
    seeds = 0
    for grid in grids(rank, wanted):
        if grid.seed is None:
            _write_steps(packets, process, steps, grid)
        else:
            seeds = seeds or packets.add_track("seeds", process)
            _write_seed(packets, seeds, grid)


def _write_steps(packets: Packets, process: int, track: int, grid: Grid) -> None:
    parts = {name: grid.values[key] for key, name in PHASES.items() if key in grid.values}
    counters = {
        packets.add_track(key, process, unit=BY_KEY[key].unit if key in BY_KEY else ""): values
        for key, values in grid.values.items()
        if key not in PHASES
    }
    latency = grid.values.get(_LATENCY)
    before = 0
    for place, step in enumerate(grid.steps.tolist()):
        end = int(grid.times[place])
        lasted = {n: float(ms[place]) for n, ms in parts.items() if isfinite(ms[place])}
        whole = float(latency[place]) if latency is not None else np.nan
        ms = whole if isfinite(whole) else sum(lasted.values())
        # Neither a clock that was set nor a late step may cross the step before.
        start = min(max(end - round(ms * 1e6), before), end)
        packets.begin_slice(track, f"step {step}", start, {"step": step})
        at = start
        for name, part_ms in lasted.items():
            until = min(at + round(part_ms * 1e6), end)
            if until > at:
                packets.add_slice(track, name, at, until)
            at = until
        values = {
            counter: float(column[place])
            for counter, column in counters.items()
            if isfinite(column[place])
        }
        packets.end_slice(track, end, values)
        before = end


def _write_seed(packets: Packets, seeds: int, grid: Grid) -> None:
    track = packets.add_track(grid.seed or "", seeds)
    if _STAGE in grid.values:
        stages = grid.values[_STAGE]
        for start, stop in _spells(stages):
            name = _STAGES.get(int(stages[start]), f"stage {stages[start]:g}")
            end = int(grid.times[min(stop, len(stages) - 1)])
            packets.add_slice(track, name, int(grid.times[start]), end)
    for key, values in grid.values.items():
        if key == _STAGE:
            continue
        unit = BY_KEY[key].unit if key in BY_KEY else ""
        counter = packets.add_track(key.removeprefix("kasmina.seed."), track, unit=unit)
        for first, _ in _spells(values):
            packets.add_value(counter, int(grid.times[first]), float(values[first]))


def _spells(values: Any) -> Iterator[tuple[int, int]]:
    """From where to where a value stays the same; places without one are left out."""
    edges = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    for start, stop in zip(edges, np.append(edges[1:], len(values)), strict=True):
        if isfinite(values[start]):
            yield int(start), int(stop)


def _write_decisions(
    packets: Packets, process: int, run: ShownRun, rank: TrainerCurves, wanted: Steps
) -> None:
    mine = [r for r in run.rulings if r.rank == rank.source.rank and r.step in wanted]
    if not mine:
        return
    track = packets.add_track("decisions", process)
    for ruling in mine:
        time = time_of(rank, ruling.step, ruling.time_unix_nano)
        packets.add_instant(track, f"{ruling.action}: {ruling.reason}", time, _told(ruling))


def _told(ruling: Ruling) -> dict[str, Any]:
    told: dict[str, Any] = {"step": ruling.step, "severity": ruling.severity}
    for name in ("applied", "mode", "target_seed", "seed_operation", "table_version"):
        value = getattr(ruling, name)
        if value not in (None, ""):
            told[name] = value
    if ruling.of_update:
        told["about"] = "the update, before it was made"
    told |= {f"parameter {key}": value for key, value in ruling.parameters.items()}
    for ground in ruling.findings:
        told[ground.rule] = ground.text
        told |= {f"{ground.rule}: {key}": value for key, value in ground.values.items()}
    if ruling.aftermath is not None:
        told["outcome"] = ruling.aftermath.outcome
    return told


def _write_rules(
    packets: Packets, process: int, run: ShownRun, rank: TrainerCurves, wanted: Steps
) -> None:
    """States of rules, a track for each; a state lasts from the end of a step to another's."""
    tracks: dict[str, int] = {}
    parent = 0
    _, first, last = rank.steps()
    for spell in run.rules:
        end = last if spell.end is None else spell.end
        start, end = max(spell.start, wanted.first, first), min(end, wanted.last, last)
        if spell.rank != rank.source.rank or start > end:
            continue
        parent = parent or packets.add_track("rules", process)
        name = f"{spell.rule} {spell.seed_id}".rstrip()
        if name not in tracks:
            tracks[name] = packets.add_track(name, parent)
        began, ended = (time_of(rank, step, 0) for step in (start, end))
        if began:
            packets.add_slice(tracks[name], spell.state, began, max(ended, began))
