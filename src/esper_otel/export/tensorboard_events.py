"""TensorBoard: event files, one folder for each rank of a run.

A metric is a scalar by its key, that of a seed by ``key/seed``. Decisions are texts. Values are
single floats, as TensorBoard keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from esper_otel.export.grids import Grid, Steps, grids, replacing, time_of
from esper_otel.report.rulings import Ruling
from esper_otel.report.runs import ShownRun
from esper_otel.report.trainers import TrainerCurves
from esper_otel.stream.recording import stem


def write_events(
    runs: Sequence[ShownRun], to: Path, wanted: Steps, on_share: Callable[[float], None]
) -> Iterator[Path]:
    """Write a folder for each rank into the folder ``to``."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    ranks = [(run, rank) for run in runs for rank in run.ranks]
    for done, (run, rank) in enumerate(ranks):
        folder = to / stem(run.name, rank.source.rank)
        folder.mkdir(parents=True, exist_ok=True)
        start_s = rank.span()[0] / 1e9
        path = folder / f"events.out.tfevents.{start_s:.0f}.esper-otel"
        with replacing(path) as file:
            records = RecordWriter(file)
            head = Event(wall_time=start_s, file_version="brain.Event:2")
            records.write(head.SerializeToString())
            for grid in grids(rank, wanted):
                for event in _scalars(grid):
                    records.write(event.SerializeToString())
            for ruling in run.rulings:
                if ruling.rank == rank.source.rank and ruling.step in wanted:
                    records.write(_text(rank, ruling).SerializeToString())
            records.flush()
        yield path
        on_share((done + 1) / len(ranks))


def _scalars(grid: Grid) -> Iterator[Any]:
    """An event for each step, with all that is known of it."""
    from tensorboard.compat.proto.event_pb2 import Event

    tags = [key if grid.seed is None else f"{key}/{grid.seed}" for key in grid.values]
    rows = np.column_stack(list(grid.values.values())) if tags else np.empty((0, 0))
    for step, time_ns, row in zip(grid.steps, grid.times, rows, strict=False):
        event = Event(wall_time=time_ns / 1e9, step=int(step))
        for tag, value in zip(tags, row.tolist(), strict=True):
            if not isnan(value):
                event.summary.value.add(tag=tag, simple_value=value)
        yield event


def _text(rank: TrainerCurves, ruling: Ruling) -> Any:
    """A decision, as the plugin for texts wants it."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    time_ns = time_of(rank, ruling.step, ruling.time_unix_nano)
    event = Event(wall_time=time_ns / 1e9, step=ruling.step)
    value = event.summary.value.add(tag="decisions")
    value.metadata.plugin_data.plugin_name = "text"
    value.tensor.dtype = DT_STRING
    value.tensor.tensor_shape.dim.add(size=1)
    value.tensor.string_val.append(_words(ruling).encode())
    return event


def _words(ruling: Ruling) -> str:
    about = " about the update" if ruling.of_update else ""
    applied = {None: "", True: ", applied", False: ", not applied"}[ruling.applied]
    lines = [f"{ruling.action} {ruling.severity} by {ruling.reason}{about}{applied}"]
    for ground in ruling.findings:
        saw = ", ".join(f"{key} {value:g}" for key, value in ground.values.items())
        lines.append(f"* {ground.rule}: {ground.text} {f'({saw})' if saw else ''}".rstrip())
    if ruling.aftermath is not None:
        lines.append(f"* outcome: {ruling.aftermath.outcome}")
    return "\n".join(lines)
