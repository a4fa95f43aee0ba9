"""Tables: runs as CSV and as Parquet, a row for each step of a rank and for each of its seeds.

Beside the table of steps lies one of decisions, and one of events, where there are any:
``run.csv``, ``run.decisions.csv``, ``run.events.csv``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import isnan
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from esper_otel.export.grids import Grid, Steps, grids, in_order, replacing, time_of
from esper_otel.report.rulings import Happening, Ruling
from esper_otel.report.runs import ShownRun
from esper_otel.report.trainers import CLOCK

Kind = Literal["text", "whole", "time", "number", "flag"]
Columns = Mapping[str, Kind]
Put = Callable[[Mapping[str, Any]], None]
"""Takes some rows, as a sequence for each column."""

Table = Callable[[Path, Columns], AbstractContextManager[Put]]

AT_ONCE = 65_536
"""Rows that are written together; in Parquet they are a row group."""

_STEPS: Columns = {
    "run": "text",
    "rank": "whole",
    "seed": "text",
    "step": "whole",
    "time": "time",
}
_DECISIONS: Columns = {
    "run": "text",
    "rank": "whole",
    "step": "whole",
    "time": "time",
    "action": "text",
    "severity": "text",
    "reason": "text",
    "of_update": "flag",
    "applied": "flag",
    "mode": "text",
    "conservative": "flag",
    "target_seed": "text",
    "seed_operation": "text",
    "table_version": "text",
    "parameters": "text",
    "findings": "text",
    "outcome": "text",
}
_EVENTS: Columns = {
    "run": "text",
    "rank": "whole",
    "step": "whole",
    "time": "time",
    "event": "text",
    "severity": "text",
    "text": "text",
    "seed": "text",
}


def write_csv(
    runs: Sequence[ShownRun], to: Path, wanted: Steps, on_share: Callable[[float], None]
) -> Iterator[Path]:
    """Write CSV (RFC 4180, UTF-8): numbers so that they read back equal, times in UTC."""
    return _write(_csv, runs, to, wanted, on_share)


def write_parquet(
    runs: Sequence[ShownRun], to: Path, wanted: Steps, on_share: Callable[[float], None]
) -> Iterator[Path]:
    """Write Parquet with pyarrow, compressed by zstd."""
    return _write(_parquet, runs, to, wanted, on_share)


def _write(
    table: Table,
    runs: Sequence[ShownRun],
    to: Path,
    wanted: Steps,
    on_share: Callable[[float], None],
) -> Iterator[Path]:
    ranks = [(run, rank) for run in runs for rank in run.ranks]
    keys = {key for _, rank in ranks for _, key in rank.curves} - {CLOCK, "step"}
    columns: dict[str, Kind] = {**_STEPS, **dict.fromkeys(sorted(keys, key=in_order), "number")}
    with table(to, columns) as put:
        for done, (run, rank) in enumerate(ranks):
            for grid in grids(rank, wanted):
                for start in range(0, len(grid.steps), AT_ONCE):
                    put(_rows(run.name, rank.source.rank, grid, columns, start))
            on_share((done + 1) / len(ranks))
    yield to
    decisions = [
        _decision(run, ruling)
        for run in runs
        for ruling in run.rulings
        if ruling.step in wanted
    ]
    events = [
        _event(run.name, each) for run in runs for each in run.happenings if each.step in wanted
    ]
    for name, kinds, rows in (
        ("decisions", _DECISIONS, decisions),
        ("events", _EVENTS, events),
    ):
        beside = to.with_name(f"{to.stem}.{name}{to.suffix}")
        if rows:
            with table(beside, kinds) as put:
                put({column: [row[column] for row in rows] for column in kinds})
            yield beside


def _rows(run: str, rank: int, grid: Grid, columns: Columns, start: int) -> dict[str, Any]:
    some = slice(start, start + AT_ONCE)
    steps = grid.steps[some]
    absent = np.full(len(steps), np.nan)
    return {
        "run": [run] * len(steps),
        "rank": [rank] * len(steps),
        "seed": [grid.seed] * len(steps),
        "step": steps,
        "time": grid.times[some],
        **{
            key: grid.values[key][some] if key in grid.values else absent
            for key in columns
            if key not in _STEPS
        },
    }


def _decision(run: ShownRun, ruling: Ruling) -> dict[str, Any]:
    time_ns = ruling.time_unix_nano
    for rank in run.ranks:
        if rank.source.rank == ruling.rank:
            time_ns = time_of(rank, ruling.step, time_ns)
    told: dict[str, Any] = {
        name: getattr(ruling, name)
        for name in _DECISIONS
        if name not in ("run", "time", "parameters", "findings", "outcome")
    }
    return told | {
        "run": run.name,
        "time": time_ns or None,
        "parameters": msgspec.json.encode(ruling.parameters).decode(),
        "findings": msgspec.json.encode(ruling.findings).decode(),
        "outcome": ruling.aftermath.outcome if ruling.aftermath is not None else None,
    }


def _event(run: str, each: Happening) -> dict[str, Any]:
    return {
        "run": run,
        "rank": each.rank,
        "step": each.step,
        "time": each.time_unix_nano or None,
        "event": each.name,
        "severity": each.severity,
        "text": each.text,
        "seed": each.seed_id or None,
    }


@contextmanager
def _csv(path: Path, columns: Columns) -> Iterator[Put]:
    with replacing(path) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        lines = csv.writer(text)
        lines.writerow(columns)

        def put(rows: Mapping[str, Any]) -> None:
            lines.writerows(
                zip(*(_words(rows[c], kind) for c, kind in columns.items()), strict=True)
            )

        yield put
        text.flush()
        text.detach()


def _microseconds(time_ns: int) -> int:
    """A time in nanoseconds, of which it is known to 256, as nearest microseconds."""
    return (int(time_ns) + 500) // 1000


def _words(values: Any, kind: Kind) -> list[Any]:
    """Values as CSV has them: nothing where there is none."""
    if kind == "number":
        found: list[Any] = values.tolist()
        return ["" if isnan(value) else value for value in found]
    if kind == "time":
        return [
            "" if value is None else f"{np.datetime64(_microseconds(value), 'us')}Z"
            for value in values
        ]
    return [
        "" if value is None else str(value).lower() if isinstance(value, bool) else value
        for value in values
    ]


@contextmanager
def _parquet(path: Path, columns: Columns) -> Iterator[Put]:
    import pyarrow
    import pyarrow.parquet

    kinds = {
        "text": pyarrow.string(),
        "whole": pyarrow.int64(),
        "time": pyarrow.timestamp("us", tz="UTC"),
        "number": pyarrow.float64(),
        "flag": pyarrow.bool_(),
    }
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])

    def column(values: Any, kind: Kind) -> Any:
        if kind == "time":
            values = [None if value is None else _microseconds(value) for value in values]
        return pyarrow.array(values, kinds[kind], from_pandas=kind == "number")

    with (
        replacing(path) as file,
        pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):

        def put(rows: Mapping[str, Any]) -> None:
            arrays = [column(rows[name], kind) for name, kind in columns.items()]
            writer.write_table(pyarrow.table(arrays, schema=schema))

        yield put
