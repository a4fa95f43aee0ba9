"""Simulated ranks of a training run: frames made up, and sent by the real stream.

What a step costs to compute is no matter here, so nothing is computed: every rank hands
over frames with as many values as are wanted, at times that are given.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from math import nan
from pathlib import Path

import msgspec

from esper_otel.leyline.frames import NO_CUSTOM, StepTimeline
from esper_otel.leyline.metrics import SEED_KEYS, STEP_KEYS
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream, StreamReport


class Rank:
    """One rank, started; ``metrics`` of the registry's keys have a value, the first ones."""

    def __init__(
        self,
        endpoint: str,
        folder: Path,
        *,
        run: str,
        instance: str = "",
        rank: int = 0,
        world_size: int = 1,
        metrics: int = len(STEP_KEYS),
        seeds: int = 0,
        environ: Mapping[str, str] = {},
        **settings: object,
    ) -> None:
        self.run = run
        self.stream = Stream(
            EsperSettings.from_environment(
                {},
                spool_dir=str(folder / "spool"),
                rank=rank,
                world_size=world_size,
                **settings,
            ),
            run_id=run,
            instance_id=instance or f"{run}-{rank}",
            environ={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **environ},
        )
        self.stream.start()
        self._metrics = metrics
        self._seeds = [f"slot{number}-1" for number in range(seeds)]

    def step(
        self,
        step: int,
        time_unix_nano: int | None = None,
        custom: Mapping[str, float] = NO_CUSTOM,
    ) -> None:
        """Hand over one step; its values can be told from those of every other."""
        row = [step + column / 100 for column in range(len(STEP_KEYS))]
        row[0] = float(step)
        row[self._metrics :] = [nan] * (len(STEP_KEYS) - self._metrics)
        seeds = [
            (seed, [number + column / 100 for column in range(len(SEED_KEYS))])
            for number, seed in enumerate(self._seeds)
        ]
        self.stream.frame(
            time.time_ns() if time_unix_nano is None else time_unix_nano, row, seeds, custom
        )

    def trace(self, step: int, start_unix_nano: int, phase_ns: int = 1_000_000) -> None:
        """Hand over the times of one step of three phases, one after the other."""
        names = ("train.forward", "train.backward", "train.optimizer")
        marks = [start_unix_nano + number * phase_ns for number in range(len(names) + 1)]
        self.stream.timeline(
            StepTimeline(
                step,
                marks[0],
                marks[-1],
                list(zip(names, marks, marks[1:], strict=False)),
            )
        )

    def close(self, timeout_s: float | None = None) -> StreamReport:
        """Send what is unsent and stop; what became of it all."""
        return self.stream.close(timeout_s)


def main() -> None:
    """Several ranks in this process, for a while; prints what became of their points."""
    parser = argparse.ArgumentParser(prog="python -m testkit.simulated_ranks")
    parser.add_argument("endpoint")
    parser.add_argument("--run", default="load")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--metrics", type=int, default=len(STEP_KEYS))
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--steps-per-s", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            Rank(
                options.endpoint,
                Path(folder),
                run=options.run,
                rank=number,
                world_size=options.world_size,
                metrics=options.metrics,
                seeds=options.seeds,
                environ={"OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"},
            )
            for number in range(options.first, options.first + options.count)
        ]
        print("ready", flush=True)
        sys.stdin.readline()
        # Ranks end their steps one after the other and not all at once.
        gap_s = 1 / options.steps_per_s / options.count
        due = time.monotonic()
        for step in range(options.steps):
            for rank in ranks:
                time.sleep(max(due - time.monotonic(), 0))
                rank.step(step)
                due += gap_s
        reports = [rank.close(20).metrics for rank in ranks]
    print(msgspec.json.encode(reports).decode(), flush=True)


if __name__ == "__main__":
    main()
