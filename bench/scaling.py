"""How what judging costs grows: with ranks, with seeds, with rules, and with steps.

Thread CPU and memory of the engine, at sizes that double again and again. The slope is that of
the straight line through the logarithms: 1 is linear, less is better. Frames are streamed, of a
steady run, and by default.yaml but where rules grow.

    python -m bench.scaling [--json PATH]
    SCALING_STEPS=100000 python -m bench.scaling
"""

from __future__ import annotations

import gc
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from math import log
from pathlib import Path
from statistics import linear_regression

import msgspec

from bench.figures import Figure, run
from bench.judging import frames
from esper_otel.leyline.frames import StepFrame
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table import Table
from esper_tamiyo.language.table_file import TableSource, load, parse

BENCH = "scaling"
RANKS = (1, 4, 16, 64, 256, 1024)
SEEDS = (1, 2, 4, 8, 16, 32, 64)
RULES = (10, 30, 100, 300, 1000)
STEPS = int(os.environ.get("SCALING_STEPS", "1000000"))
WARM, TIMED = 200, 48
"""Steps of each rank before the first that is timed, and that are."""
WEIGHED = 40
"""Steps of each rank after which memory is counted, which slows them down."""
ROOM = 1 << 31
"""Bytes of state that are no limit here."""
BAR = 1.1


def figures() -> list[Figure]:
    """All rows of this bench."""
    default = load("default")
    return [
        *grown("ranks", RANKS, lambda ranks: (default, ranks, 0)),
        *grown("seeds of a rank", SEEDS, lambda seeds: (default, 1, seeds)),
        *grown("rules", RULES, lambda rules: (table_of(rules), 1, 0)),
        *long_run(default, STEPS),
    ]


def grown(
    what: str, sizes: Sequence[int], setting: Callable[[int], tuple[Table, int, int]]
) -> Iterator[Figure]:
    """Rows of what a step of all ranks costs, and what is kept of them, by how many there are.

    ``setting`` gives the table, the ranks and the seeds of each.
    """
    times = [step_us(*setting(size)) for size in sizes]
    kept = [kept_kb(*setting(size)) for size in sizes]
    for name, unit, values in (("time of a step", "µs", times), ("memory", "KB", kept)):
        title = f"{what}, {sizes[0]:,} to {sizes[-1]:,}: {name}"
        yield Figure.at_most(BENCH, f"{title}, slope", slope(sizes, values), "", bar=BAR)
        yield Figure.report(
            BENCH, f"{title}, of the most over the fewest", values[-1], unit, values[0]
        )


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of the logarithms of ``values`` over those of ``sizes``."""
    return linear_regression([*map(log, sizes)], [*map(log, values)]).slope


def step_us(table: Table, ranks: int, seeds: int) -> float:
    """Microseconds of a step of all ranks, the mean: what is put off falls due at some."""
    engine = Engine(table, ROOM)
    took = []
    for step, made in enumerate(steps_of(WARM + TIMED, ranks, seeds)):
        gc.disable()
        began = time.thread_time_ns()
        for frame in made:
            engine.observe(frame)
        if step >= WARM:
            took.append((time.thread_time_ns() - began) / 1e3)
        gc.enable()
    return sum(took) / len(took)


def kept_kb(table: Table, ranks: int, seeds: int) -> float:
    """KB that the engine takes behind some steps."""
    gc.collect()
    tracemalloc.start()
    try:
        engine = Engine(table, ROOM)
        for made in steps_of(WEIGHED, ranks, seeds):
            for frame in made:
                engine.observe(frame)
            del made, frame
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / 1e3
    finally:
        tracemalloc.stop()


def steps_of(count: int, ranks: int, seeds: int) -> Iterator[list[StepFrame]]:
    """The frames of all ranks, step by step, ten steps a second."""
    for frame in frames(count, seeds):
        yield [
            msgspec.structs.replace(
                frame, rank=rank, time_unix_nano=10**18 + frame.step * 10**8 + rank
            )
            for rank in range(ranks)
        ]


def table_of(rules: int) -> Table:
    """So many rules on the metrics of a step, none of which fires."""
    conditions = (
        "{metric: loss, above_baseline: %d}",
        "{metric: step_latency_ms, above: %d000}",
        "{metric: gradient_norm, above_record: %d0}",
        "{metric: forward_ms, above_baseline: %d0, baseline_of: step_latency_ms}",
        "{metric: loss_volatility, below_baseline: 0.000%d}",
    )
    rows = []
    for place in range(rules):
        first, second = (conditions[(place + offset) % 5] for offset in (0, 1))
        number = place // 5 + 10
        rows.append(
            f"- {{id: r{place}, all: [{first % number}, {second % number}], severity: HIGH, "
            "action: CONTINUE}"
        )
    return parse(TableSource("many", "\n".join(["version: many", "rules:", *rows]).encode()))


def long_run(table: Table, steps: int) -> Iterator[Figure]:
    """Rows of a single long run: all of its time by its steps, and what it keeps."""
    engine = Engine(table, ROOM)
    pattern = frames(1000, 0)
    sizes, times, total, kept = list[int](), list[float](), 0.0, 0.0
    for first in range(0, steps, len(pattern)):
        made = [
            msgspec.structs.replace(
                frame, step=first + offset, time_unix_nano=10**18 + (first + offset) * 10**7
            )
            for offset, frame in enumerate(pattern)
        ]
        began = time.thread_time_ns()
        for frame in made:
            engine.observe(frame)
        total += (time.thread_time_ns() - began) / 1e3
        told = first + len(pattern)
        if not sizes or told >= 2 * sizes[-1]:
            sizes.append(told)
            times.append(total)
            kept = kept or (resident_kb() if told >= 10_000 else 0.0)
    title = f"steps, {sizes[0]:,} to {sizes[-1]:,}: time of all"
    yield Figure.at_most(BENCH, f"{title}, slope", slope(sizes, times), "", bar=BAR)
    yield Figure.report(
        BENCH, f"{title}, of the most over the fewest", times[-1], "µs", times[0]
    )
    gained = resident_kb() - kept
    yield Figure.report(BENCH, "steps, from 10,000 on: memory gained", gained, "KB")


def resident_kb() -> float:
    """What this process has in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e3


if __name__ == "__main__":
    sys.exit(run(figures))
