"""A sidecar under ordinary work for long: whether its memory and descriptors stay flat.

Eight ranks of one run with eight seeds each stream and ask, ten steps a second each, and are
replaced by a new attempt of the run every 20 s, every other one without a goodbye. Meanwhile
the table's file changes every 5 s. Where the Collector's program is here, the stream goes
through one, which is killed and started again every 30 s. Each process is looked at every
second; the first third is for filling what is bounded, and the second is held against the end.
It lasts 3 minutes, or as many as are said:

    python -m bench.soak [--json PATH]
    SOAK_MINUTES=60 python -m bench.soak
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import linear_regression

import yaml

from bench.figures import Figure, median, run
from bench.floods import Peer
from bench.floods_peers import told_to_stop
from bench.roundtrip import put_step
from bench.roundtrip_peers import FRAME
from bench.sidecar_process import PROCESSES, SidecarProcess, Taken, taken_by
from esper_otel.leyline.endings import HowEnded, RunEnd
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import SEED_KEYS, STEP_SLOT
from esper_otel.tamiyo.client import TamiyoClient
from ops.stack.ports import free
from ops.stack.processes import Process
from ops.stack.programs import COLLECTOR, MissingError, find
from ops.stack.services import CONFIG, Ports, collector
from testkit.simulated_ranks import Rank

BENCH = "soak"

MINUTES = float(os.environ.get("SOAK_MINUTES", "3"))
RANKS, SEEDS, STEPS_PER_S = 8, 8, 10
ATTEMPT_S, RELOAD_S, RESTART_S = 20.0, 5.0, 30.0
SAMPLE_S = 1.0
TRAINERS = "the trainers' process"

GROWTH_BAR = 1.05
DESCRIPTORS_BAR = 4.0

Samples = dict[str, list[tuple[float, Taken]]]
"""When, in hours since the beginning, and what each process took."""


class Attempt:
    """One attempt of a run: its ranks, each of which streams and asks."""

    def __init__(self, number: int, endpoint: str, path: Path, folder: Path) -> None:
        self._ranks: list[tuple[Rank, TamiyoClient]] = []
        self._row = step_row()
        for key, value in FRAME.items():
            self._row[STEP_SLOT[key]] = value
        self._seeds = [(f"slot{seed}-1", [0.5] * len(SEED_KEYS)) for seed in range(SEEDS)]
        self._step = 0
        for rank in range(RANKS):
            instance = f"soak-{number}-{rank}"
            streaming = Rank(
                endpoint,
                folder,
                run="soak",
                instance=instance,
                rank=rank,
                world_size=RANKS,
                seeds=SEEDS,
                environ={"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"},
            )
            client = TamiyoClient(
                path,
                run="soak",
                instance=instance,
                rank=rank,
                world_size=RANKS,
                deadline_ms=1000.0,
            )
            self._ranks.append((streaming, client))

    def step(self, counts: Counter[str]) -> None:
        """One step of each rank; what the sidecar said is counted."""
        self._step += 1
        put_step(self._row, self._step)
        for streaming, client in self._ranks:
            now = time.time_ns()
            streaming.step(self._step, now)
            counts[client.ask(self._step, now, self._row, self._seeds).reason] += 1

    def end(self, *, says_so: bool) -> None:
        """It is over, with a goodbye or without."""
        for streaming, client in self._ranks:
            if says_so:
                client.say_goodbye(self._step, time.time_ns(), RunEnd(HowEnded.DONE))
            client.close()
            streaming.close(5.0)


def train(endpoint: str, path: str) -> None:
    """One attempt after the other, until told to stop."""
    logging.getLogger("esper_otel").setLevel(logging.ERROR)  # a Collector is away at times
    counts: Counter[str] = Counter()
    print("ready", flush=True)
    stop, number = told_to_stop(), 0
    with tempfile.TemporaryDirectory() as folder:
        while not stop.is_set():
            number += 1
            attempt = Attempt(number, endpoint, Path(path), Path(folder))
            due = time.monotonic()
            until = due + ATTEMPT_S
            while time.monotonic() < until and not stop.is_set():
                attempt.step(counts)
                due = max(due + 1 / STEPS_PER_S, time.monotonic() - 1)
                time.sleep(max(0.0, due - time.monotonic()))
            attempt.end(says_so=number % 2 == 1)
            del attempt
            gc.collect()  # as the end of a process would
    print(json.dumps({**counts, "attempts": number}), flush=True)


def collector_before(sidecar: SidecarProcess, folder: Path) -> tuple[Process, str] | None:
    """A Collector that gives to the sidecar alone, and where it listens; None without one."""
    try:
        program = find(COLLECTOR)
    except MissingError:
        return None
    config = yaml.safe_load(CONFIG.read_text())
    pipelines = config["service"]["pipelines"]
    config["service"]["pipelines"] = {
        name: each for name, each in pipelines.items() if name == "metrics/tamiyo"
    }
    path = folder / "collector.yaml"
    path.write_text(yaml.safe_dump(config))
    names = Ports.__struct_fields__
    ports = dict(zip(names, free(len(names)), strict=True))
    ports["tamiyo_http"] = int(sidecar.words["otlp_http"].rpartition(":")[2])
    service = collector(program, Ports(**ports), folder, (path,))
    return Process(service, folder / "logs"), f"http://127.0.0.1:{ports['otlp_http']}"


def repeated(every_s: float, do: Callable[[int], None]) -> Callable[[float], None]:
    """To be called often with the seconds since the beginning; does it when it is time."""
    done = 0

    def look(at_s: float) -> None:
        nonlocal done
        if at_s >= (done + 1) * every_s:
            done += 1
            do(done)

    return look


def soaked(sidecar: SidecarProcess, before: Process | None, trainers: int) -> Samples:
    """What each process took, second by second."""

    def restart(number: int) -> None:
        if before is not None:
            before.kill()
            before.start()

    duties = [repeated(RELOAD_S, sidecar.write_table), repeated(RESTART_S, restart)]
    samples: Samples = {name: [] for name in (*PROCESSES, TRAINERS)}
    began = time.monotonic()
    while (at_s := time.monotonic() - began) < MINUTES * 60:
        for duty in duties:
            duty(at_s)
        for name, pid in {**sidecar.processes(), TRAINERS: trainers}.items():
            taken = taken_by(pid)
            if taken is not None:
                samples[name].append((at_s / 3600, taken))
            elif name == TRAINERS:
                raise RuntimeError("the trainers have ended")
        time.sleep(SAMPLE_S)
    return samples


def figures() -> list[Figure]:
    """All rows of this bench."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        sidecar = stack.enter_context(SidecarProcess(folder))
        endpoint = f"http://{sidecar.words['otlp_http']}"
        found = collector_before(sidecar, folder)
        before = None
        if found is not None:
            before, endpoint = found
            before.start()
            stack.callback(before.kill)
            before.wait()
        trainers = Peer(stack, "train", endpoint, sidecar.words["socket"], module="bench.soak")
        samples = soaked(sidecar, before, trainers.pid)
        trainers.tell()
        print(f"  {trainers.result()}, through a Collector: {before is not None}", flush=True)
        status = sidecar.status()
        tracebacks = sidecar.tracebacks()
    print(f"  {status['engine']['frames']}, {status['table']}", flush=True)
    restarts = sum(status[name]["restarts"] for name in ("ingest", "scribe", "state"))
    return [
        *(row for name in samples for row in flat(name, samples[name])),
        Figure.at_most(
            BENCH,
            "memory of all processes of the sidecar at the end",
            sum(samples[name][-1][1].rss_mb for name in PROCESSES),
            "MB",
            bar=512.0,
        ),
        Figure.at_most(BENCH, "processes that were replaced", restarts, "", bar=0.0),
        Figure.at_most(BENCH, "tracebacks in the log", tracebacks, "", bar=0.0),
    ]


def flat(name: str, samples: list[tuple[float, Taken]]) -> Iterator[Figure]:
    """Rows of one process: its end against the time behind the first third."""
    rest = samples[len(samples) // 3 :]
    part = max(3, len(rest) // 6)
    early, late = rest[:part], rest[-part:]
    yield Figure.at_most(
        BENCH,
        f"memory of {name}, at the end over behind the first third",
        median([taken.rss_mb for _, taken in late]),
        "MB",
        median([taken.rss_mb for _, taken in early]),
        bar=GROWTH_BAR,
    )
    slope, _ = linear_regression(
        [hours for hours, _ in rest], [taken.rss_mb for _, taken in rest]
    )
    yield Figure.report(BENCH, f"slope of that, {name}", slope, "MB/h")
    before = median([taken.descriptors for _, taken in early])
    yield Figure.at_most(
        BENCH,
        f"descriptors of {name}, at the end more than behind the first third, {before:.0f}",
        median([taken.descriptors for _, taken in late]) - before,
        "",
        bar=DESCRIPTORS_BAR,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(*sys.argv[2:])
        sys.exit(0)
    sys.exit(run(figures))
