"""OTLP as lines of JSON, each one request, like the Collector's file exporter.

Ids are hexadecimal and enums numbers, as OTLP's JSON wants them and protobuf's does not.
Requests that are JSON already stay as they are.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.export.grids import replacing
from esper_otel.leyline.decompression import DamagedError, ZstdMissingError
from esper_otel.leyline.otlp_file import RecordingError
from esper_otel.leyline.otlp_files import payloads, request_in
from esper_otel.report.sources import OnBytes, files_of, is_journal

_IDS = frozenset({"traceId", "spanId", "parentSpanId"})


def write_lines(
    paths: Sequence[Path], to: Path, on_bytes: OnBytes
) -> tuple[list[Path], list[str]]:
    """Write all requests at ``paths``; returns the file, if there were any, and problems.

    ``on_bytes`` is told how many bytes have been read. Raises :class:`OSError` when ``to``
    cannot be written.
    """
    problems: list[str] = []
    lines = _lines(paths, problems, on_bytes)
    first = next(lines, None)
    if first is None:
        return [], problems
    with replacing(to) as file:
        for line in chain([first], lines):
            file.write(line + b"\n")
    return [to], problems


def _lines(paths: Sequence[Path], problems: list[str], on_bytes: OnBytes) -> Iterator[bytes]:
    before = 0
    for path in paths:
        try:
            for file in files_of(path):
                yield from _lines_of(file, problems, before, on_bytes)
                before += file.stat().st_size
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")


def _lines_of(
    path: Path, problems: list[str], before: int, on_bytes: OnBytes
) -> Iterator[bytes]:
    if is_journal(path):
        problems.append(f"{path}: a journal is not OTLP, and is skipped")
        return
    try:
        for offset, data in payloads(path):
            on_bytes(before + offset)
            if data[:1] == b"{":
                yield data.strip()
            else:
                yield line_of(data, path, offset)
    except RecordingError as error:
        problems.append(f"{error}{'; read up to there' if error.offset else ''}")
    except (ZstdMissingError, DamagedError) as error:
        problems.append(f"{path}: {error}")


def line_of(data: bytes, path: Path, offset: int = 0) -> bytes:
    """A serialised request of any signal as a line of JSON.

    Raises :class:`~esper_otel.leyline.otlp_file.RecordingError`, which names ``path`` and
    ``offset``.
    """
    request = request_in(data, ExportMetricsServiceRequest, path, offset)
    told = MessageToDict(request, use_integers_for_enums=True) if request is not None else {}
    return json.dumps(_with_hexadecimal_ids(told), separators=(",", ":")).encode()


def _with_hexadecimal_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_hexadecimal_ids(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: base64.b64decode(each).hex()
        if key in _IDS and isinstance(each, str)
        else _with_hexadecimal_ids(each)
        for key, each in value.items()
    }
