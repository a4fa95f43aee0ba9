"""Exports: runs in the formats of other tools.

Files are read as a report reads them (:mod:`esper_otel.report`), and nothing is thinned out.
:func:`export` writes CSV and Parquet (:mod:`~esper_otel.export.tables`), event files of
TensorBoard, a trace of Perfetto, or OTLP as lines of JSON. Libraries of those tools are the
extra ``export``, and are imported only for the format that needs them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path

import msgspec

from esper_otel.export.grids import Steps
from esper_otel.report.runs import ShownRun, runs_of
from esper_otel.report.sources import Archive, OnBytes, size_of

__all__ = ["ExportError", "Exported", "Format", "Steps", "default_path", "export"]


class Format(StrEnum):
    """What a run is exported as."""

    PERFETTO = "perfetto"
    CSV = "csv"
    PARQUET = "parquet"
    TENSORBOARD = "tensorboard"
    OTLP_JSON = "otlp-json"


_ENDINGS = {
    Format.PERFETTO: ".perfetto-trace",
    Format.CSV: ".csv",
    Format.PARQUET: ".parquet",
    Format.TENSORBOARD: "-tensorboard",
    Format.OTLP_JSON: ".otlp.jsonl",
}
_LIBRARIES = {
    Format.PERFETTO: "perfetto",
    Format.PARQUET: "pyarrow",
    Format.TENSORBOARD: "tensorboard",
}
_OF_OURS = re.compile(r"\.(metrics|logs|traces)\.otlp$|\.[a-z0-9]{1,5}$")


class ExportError(Exception):
    """Nothing can be exported; why, in one line."""


class Exported(msgspec.Struct, frozen=True):
    """The files that were written, and what could not be exported, one line each."""

    files: list[Path]
    problems: list[str]


def default_path(first: Path, to: Format) -> Path:
    """Where an export of ``first`` goes unless told: into this folder, under its name."""
    name = _OF_OURS.sub("", first.resolve().name) or "run"
    return Path(f"{name}{_ENDINGS[to]}")


def export(
    paths: Sequence[Path],
    to: Format,
    output: Path,
    steps: Steps | None = None,
    on_bytes: OnBytes = lambda _: None,
) -> Exported:
    """Write what lies at ``paths`` to ``output``, only its ``steps`` where those are given.

    ``on_bytes`` is told how far it is, of twice the bytes that ``paths`` have: once for
    reading them. Each file is there whole, or as it was before. Raises :class:`ExportError`
    when nothing can be exported, and :class:`OSError` when ``output`` cannot be written.
    """
    library = _LIBRARIES.get(to)
    if library is not None and not _is_here(library):
        raise ExportError(f"--to {to} needs {library}: pip install 'esper-otel[export]'")
    if to is Format.OTLP_JSON:
        from esper_otel.export.otlp_lines import write_lines

        if steps is not None:
            raise ExportError(f"--steps: expected without --to {to}, which exports everything")
        return _found(*write_lines(paths, output, lambda done: on_bytes(2 * done)))
    archive = Archive(whole=True)
    archive.read(paths, on_bytes)
    runs = runs_of(archive)
    whole = size_of(paths)
    files = (
        list(
            _writer(to)(
                runs, output, steps or Steps(), lambda s: on_bytes(whole + int(s * whole))
            )
        )
        if runs
        else []
    )
    return _found(files, archive.problems)


OnShare = Callable[[float], None]
"""Told which share of the work is done, from 0 to 1."""

Writer = Callable[[Sequence[ShownRun], Path, Steps, OnShare], Iterator[Path]]


def _writer(to: Format) -> Writer:
    if to is Format.PERFETTO:
        from esper_otel.export.perfetto_trace import write_trace

        return write_trace
    if to is Format.TENSORBOARD:
        from esper_otel.export.tensorboard_events import write_events

        return write_events
    from esper_otel.export.tables import write_csv, write_parquet

    return write_csv if to is Format.CSV else write_parquet


def _found(files: list[Path], problems: list[str]) -> Exported:
    if not files:
        raise ExportError("; ".join(problems) or "no run in it: expected a recording")
    return Exported(files, problems)


def _is_here(library: str) -> bool:
    if library in sys.modules:
        return sys.modules[library] is not None
    with suppress(ValueError):
        return find_spec(library) is not None
    return False
