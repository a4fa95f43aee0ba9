"""How fast a recorded run is judged again, against the time that it took to happen.

Trains ``examples/digits.py`` under ``esper-otel run --record`` with a sidecar that answers.
The baseline of each figure is the steps per second of that training, so that the ratio
says how many times faster than life a replay is. The recording is replayed as the run
wrote it and as a Collector writes it, from the file to the last decision.

    python -m bench.replay [--json PATH]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import zstandard
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from bench.figures import Figure, median, run
from bench.training import BIN, SCRIPT, sidecar
from esper_otel.leyline.otlp_file import framed
from esper_otel.leyline.otlp_files import requests
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import load
from esper_tamiyo.replaying.recordings import RecordedRuns
from esper_tamiyo.replaying.replay import Judged, ReplaySummary, replay

BENCH = "replay"
BLOCKS = 7


def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recording = recorded(folder)
        table = load("default")
        live = ReplaySummary()
        for judged in judged_steps(recording, table):
            live.add(judged)
        files = {
            "as the run wrote it": recording,
            "a Collector's protobuf, zstd": rewritten(recording, folder / "zstd", as_zstd),
            "a Collector's JSON lines": rewritten(recording, folder / "json", as_line),
        }
        rows = []
        for shape, path in files.items():
            took_s = median([timed(path, table, perf_counter) for _ in range(BLOCKS)])
            rows.append(
                Figure.report(
                    BENCH,
                    f"{live.steps:,} steps by default.yaml, {shape}",
                    live.steps / took_s,
                    "steps/s",
                    live.steps / live.recorded_s,
                )
            )
        return [*rows, *cpu_of_a_step(recording, table, live.steps)]


def cpu_of_a_step(recording: Path, table: Table, steps: int) -> list[Figure]:
    """What reading and judging take of it."""
    frames = list(RecordedRuns(recording).steps())

    def judging() -> float:
        began = process_time()
        for _ in replay(frames, table):
            pass
        return process_time() - began

    whole = median([timed(recording, table, process_time) for _ in range(BLOCKS)])
    judged = median([judging() for _ in range(BLOCKS)])
    return [
        Figure.report(BENCH, "CPU of one step, from the file on", whole * 1e6 / steps, "µs"),
        Figure.report(BENCH, "CPU of one step, judging alone", judged * 1e6 / steps, "µs"),
    ]


def recorded(folder: Path) -> Path:
    """The metrics file of a real training."""
    with sidecar(folder) as environment:
        command = [str(BIN / "esper-otel"), "run", "--record", str(folder / "recording")]
        subprocess.run(
            [*command, "--run-id", "digits", str(SCRIPT), "--no-accident"],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        )
    (recording,) = (folder / "recording").glob("*.metrics.otlp")
    return recording


def rewritten(
    recording: Path, path: Path, written: Callable[[ExportMetricsServiceRequest], bytes]
) -> Path:
    """The recording with each request ``written`` in another way."""
    found = requests(recording, ExportMetricsServiceRequest)
    path.write_bytes(b"".join(map(written, found)))
    return path


def as_zstd(request: ExportMetricsServiceRequest) -> bytes:
    return framed(zstandard.ZstdCompressor().compress(request.SerializeToString()))


def as_line(request: ExportMetricsServiceRequest) -> bytes:
    return json_format.MessageToJson(request, indent=None).encode() + b"\n"


def judged_steps(path: Path, table: Table) -> list[Judged]:
    """Every step of a recording, judged."""
    return [each for each in replay(RecordedRuns(path).steps(), table) if each.is_step]


def timed(path: Path, table: Table, clock: Callable[[], float]) -> float:
    """Seconds of ``clock`` that a replay takes."""
    began = clock()
    judged_steps(path, table)
    return clock() - began


if __name__ == "__main__":
    sys.exit(run(figures))
