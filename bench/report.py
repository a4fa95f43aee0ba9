"""What a report takes: time, size, memory for a million steps, and whether it tells the truth.

Recordings are noise in every metric, which neither compresses nor repeats: the worst that a run
can leave. Each report is made in a process of its own, as the command makes it. Beside it the
same recording is read by the protobuf classes (``read_frames``, which `esper-otel show` uses).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from bench.figures import Figure, median, run
from esper_otel.leyline.metrics import INSTANCE_ID, RANK, RUN_ID, SEED_KEYS, STEP_KEYS
from esper_otel.leyline.otlp_file import framed
from esper_otel.stream import read_frames
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.ring import Frames, Rows
from ops.stack.programs import CHROMIUM, MissingError, find
from testkit.report_data import unpacked

BENCH = "report"
STEPS, METRICS, RANKS, SEEDS = 10_000, 30, 4, 8
LONG = 1_000_000
AT_ONCE = 4096
OPENINGS = 3
_MAKE = (
    "import re, sys\n"
    "from pathlib import Path\n"
    "from esper_otel.report import write_report\n"
    "write_report([Path(sys.argv[1])], Path(sys.argv[2]))\n"
    # The kernel's mark of this program alone: ru_maxrss has that of its parent in it.
    "most = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())\n"
    "print(int(most[1]) / 1024)\n"
)
_DRAWN = "performance.getEntriesByName('drawn')[0].startTime / 1e3"


def figures() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        return [*_whole(Path(folder, "whole")), *_long(Path(folder, "long"))]


def _whole(folder: Path) -> Iterator[Figure]:
    what = f"{STEPS:,} steps × {METRICS} metrics × {RANKS} ranks, {SEEDS} seeds"
    for rank in range(RANKS):
        recorded(folder / f"run-rank{rank}.metrics.otlp", STEPS, rank, SEEDS)
    page = folder.with_suffix(".html")
    times, reading = [], []
    for _ in range(OPENINGS):
        began = perf_counter()
        made(folder, page)
        times.append(perf_counter() - began)
        began = perf_counter()
        for path in sorted(folder.iterdir()):
            for _ in read_frames(path):
                pass
        reading.append(perf_counter() - began)
    yield Figure.at_most(BENCH, f"{what}: made in", median(times), "s", bar=3)
    yield Figure.report(
        BENCH, "the same, beside reading it alone", median(times), "s", median(reading)
    )
    size = page.stat().st_size / 1e6
    yield Figure.at_most(BENCH, "the same: size of the file", size, "MB", bar=2)
    data = unpacked(page.read_text("utf-8"))
    yield Figure.at_most(
        BENCH, "points in it that the recording has not", wrong(folder, data), "", bar=0
    )
    opening = list(opened(page))
    if opening:
        yield Figure.at_most(BENCH, "opens in headless Chromium", median(opening), "s", bar=1)


def _long(folder: Path) -> Iterator[Figure]:
    few, many = folder / "few", folder / "many"
    recorded(few / "run-rank0.metrics.otlp", 1_000, 0, 0)
    extremes = recorded(many / "run-rank0.metrics.otlp", LONG, 0, 0)
    page = folder / "page.html"
    baseline = made(few, page)
    began = perf_counter()
    used = made(many, page)
    took = perf_counter() - began
    data = unpacked(page.read_text("utf-8"))
    curves = data["runs"][0]["ranks"][0]["curves"]
    lost = sum(
        not {np.float32(low), np.float32(high)} <= {*curves[key]["y"].astype("<f4").tolist()}
        for key, (low, high) in extremes.items()
    )
    what = f"{LONG:,} steps × {METRICS} metrics"
    yield Figure.at_most(BENCH, f"{what}: memory", used, "MB", bar=1024)
    yield Figure.report(BENCH, "the same, beside a report of 1,000", used, "MB", baseline)
    yield Figure.report(BENCH, f"{what}: made in", took, "s")
    yield Figure.at_most(BENCH, f"{what}: metrics that lost an extreme", lost, "", bar=0)
    size = page.stat().st_size / 1e6
    yield Figure.at_most(BENCH, f"{what}: size of the file", size, "MB", bar=2)


def made(folder: Path, page: Path) -> float:
    """Makes a report; the most memory that its process had, in MiB."""
    command = [sys.executable, "-c", _MAKE, str(folder), str(page)]
    return float(subprocess.check_output(command, text=True))


def wrong(folder: Path, data: dict[str, Any]) -> int:
    """Points of the page whose value is not the recorded one, as a single float."""
    found = 0
    for rank in data["runs"][0]["ranks"]:
        path = folder / f"run-rank{rank['rank']}.metrics.otlp"
        frames = {frame.step: frame for frame in read_frames(path)}
        for key, curve in rank["curves"].items():
            if key in STEP_KEYS:
                found += _differing(curve, {s: f.values[key] for s, f in frames.items()})
        for seed, curves in rank["seeds"].items():
            for key, curve in curves.items():
                values = {s: f.seeds[seed][key] for s, f in frames.items()}
                found += _differing(curve, values)
    return found


def _differing(curve: dict[str, Any], values: dict[int, float]) -> int:
    recorded_ones = np.array([values[int(step)] for step in curve["x"]])
    return int((recorded_ones.astype("<f4") != curve["y"].astype("<f4")).sum())


def opened(page: Path) -> Iterator[float]:
    """Seconds until the page has drawn what is seen; nothing where there is no browser."""
    try:
        from playwright.sync_api import sync_playwright

        program = find(CHROMIUM)
    except (ImportError, MissingError) as error:
        print(f"not opened: {error}", file=sys.stderr)
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(program))
        for _ in range(OPENINGS):
            tab = browser.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]", state="attached")
            yield float(tab.evaluate(_DRAWN))
            tab.close()
        browser.close()


def recorded(path: Path, steps: int, rank: int, seeds: int) -> dict[str, tuple[float, float]]:
    """Writes a recording of noise; the least and the greatest value of each metric."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resource = Resource()
    for key, value in ((RUN_ID, "run"), (INSTANCE_ID, f"rank{rank}")):
        resource.attributes.add(key=key).value.string_value = value
    resource.attributes.add(key=RANK).value.int_value = rank
    encoder = FrameEncoder(resource.SerializeToString())
    noise = np.random.default_rng(rank)
    low = np.full(METRICS, np.inf)
    high = -low
    with path.open("wb") as file:
        for start in range(0, steps, AT_ONCE):
            some = np.arange(start, min(start + AT_ONCE, steps))
            values = np.full((len(some), len(STEP_KEYS)), np.nan)
            values[:, :METRICS] = noise.random((len(some), METRICS))
            values[:, 0] = some
            low = np.minimum(low, values[:, :METRICS].min(axis=0))
            high = np.maximum(high, values[:, :METRICS].max(axis=0))
            times = 1_790_000_000_000_000_000 + some * 5_000_000
            of_seeds = Rows(
                np.repeat(times, seeds),
                np.tile(np.arange(seeds), len(some)),
                noise.random((len(some) * seeds, len(SEED_KEYS))),
            )
            ends = (np.arange(len(some)) + 1) * seeds
            frames = Frames(
                Rows(times, ends, values), of_seeds, [f"seed-{seed}" for seed in range(seeds)]
            )
            for encoded in encoder.encode(frames):
                file.write(framed(encoded.body))
    keys = STEP_KEYS[1:METRICS]
    return dict(zip(keys, zip(low[1:].tolist(), high[1:].tolist(), strict=True), strict=True))


if __name__ == "__main__":
    sys.exit(run(figures))
