"""What a trainer that is killed at a random moment takes with it.

A trainer without torch hands over a step of 24 metrics each millisecond and writes down, as it
goes, which it has handed over. It is killed (SIGKILL) at a random moment, nobody listening;
every fifth time another one follows that writes files at its end only, as the baseline. What is
lost is counted in time: from the oldest step that is in no file to the kill. Then what is left
is delivered to a receiver, which counts what is missing and what comes twice.

Two more: killed while the receiver takes all, and within a quarter of a second of the moment in
which a receiver that was away is there again, when files are delivered and go.

What it costs: CPU time of all threads but the training one, per step, with files and without,
in turn; nobody listening, and with a receiver in a process of its own.

    python -m bench.killed_trainers [--json PATH]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.figures import Figure, alternate, median, run
from esper_otel.stream import resend
from testkit.killed_trainer import Trainer, steps_in
from testkit.receiver import HttpReceiver, ReceiverProcess

BENCH = "killed_trainers"
KILLS, BASELINE_EVERY, OTHER_KILLS = 50, 5, 20
EARLIEST_S, LATEST_S = 0.15, 2.0
NOBODY = "http://127.0.0.1:9"

STEPS, PACES_MS, PAIRS = 3000, (1, 5), 5
BAR_MS = 100.0


class Killed(NamedTuple):
    """What became of one trainer's steps."""

    told: int
    """Handed over before the kill."""
    lost: int
    lost_ms: float
    """From the oldest that is lost to the kill."""
    missing: int
    """In a file, and not delivered by ``resend``."""
    twice: int


def figures() -> list[Figure]:
    moments = random.Random(13)
    away, at_end = [], []
    for kill in range(KILLS):
        away.append(_killed_without_receiver(moments))
        if kill % BASELINE_EVERY == 0:
            at_end.append(_killed_without_receiver(moments, "--at-end-only"))
    healthy = [_killed_with_receiver(moments) for _ in range(OTHER_KILLS)]
    back = [_killed_in_recovery(moments) for _ in range(OTHER_KILLS)]
    worst, before = max(k.lost_ms for k in away), max(k.lost_ms for k in at_end)
    share = sum(k.lost for k in away) / sum(k.told for k in away) * 100
    share_before = sum(k.lost for k in at_end) / sum(k.told for k in at_end) * 100
    return [
        _at_most("nobody listens: newest lost, worst of 50 kills", worst, "ms", BAR_MS),
        Figure.report(BENCH, "the same, with files at the end only", before, "ms"),
        Figure.report(BENCH, "steps lost of all", share, "%", share_before),
        _at_most("missing after resend", sum(k.missing for k in away), "steps", 0),
        _at_most("twice after resend", sum(k.twice for k in away), "steps", 0),
        _at_most(
            "receiver answers: newest lost, worst of 20 kills",
            max(k.lost_ms for k in healthy),
            "ms",
            2 * BAR_MS,
        ),
        _at_most("the same, twice", sum(k.twice for k in healthy), "steps", 0),
        Figure.report(
            BENCH,
            "receiver has come back: newest lost, worst of 20 kills",
            max(k.lost_ms for k in back),
            "ms",
        ),
        _at_most("the same, missing", sum(k.missing for k in back), "steps", 0),
        Figure.report(
            BENCH,
            "the same, kills with a request twice",
            sum(k.twice > 0 for k in back),
            "kills",
        ),
        *_costs(),
    ]


def _at_most(figure: str, value: float, unit: str, bar: float) -> Figure:
    return Figure.at_most(BENCH, figure, value, unit, bar=bar)


def _killed_without_receiver(moments: random.Random, *options: str) -> Killed:
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        trainer = Trainer(Path(folder), NOBODY, *options)
        trainer.wait_for_first_step()
        time.sleep(moments.uniform(EARLIEST_S, LATEST_S))
        at_ns = trainer.kill()
        with HttpReceiver() as receiver:
            return _account(trainer, at_ns, receiver)


def _killed_with_receiver(moments: random.Random) -> Killed:
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder, HttpReceiver() as there:
        trainer = Trainer(Path(folder), there.url)
        trainer.wait_for_first_step()
        time.sleep(moments.uniform(EARLIEST_S, LATEST_S))
        return _account(trainer, trainer.kill(), there)


def _killed_in_recovery(moments: random.Random) -> Killed:
    with HttpReceiver() as receiver:
        port = receiver.port
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        trainer = Trainer(Path(folder), receiver.url)
        trainer.wait_for_first_step()
        time.sleep(moments.uniform(EARLIEST_S, LATEST_S))
        with HttpReceiver(port) as back:
            while not back.inbox.attempts:
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.25))
            return _account(trainer, trainer.kill(), back)


def _account(trainer: Trainer, at_ns: int, receiver: HttpReceiver) -> Killed:
    """Deliver what ``trainer``, killed at that Unix time, has left, and count."""
    told, kept = trainer.told(), steps_in(trainer.files())
    report = resend(trainer.files(), {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url})
    if not report.is_complete:
        raise AssertionError(f"not everything was delivered: {report}")
    came = receiver.inbox.steps()
    lost = sorted(told.keys() - came.keys())
    return Killed(
        told=len(told),
        lost=len(lost),
        lost_ms=(at_ns - told[lost[0]]) / 1e6 if lost else 0.0,
        missing=len(set(kept) - came.keys()),
        twice=sum(times > 1 for times in came.values()),
    )


def _costs() -> list[Figure]:
    rows = []
    receiver = ReceiverProcess()
    try:
        for url, where in ((NOBODY, "nobody listens"), (receiver.url, "receiver answers")):
            for pace_ms in PACES_MS:
                with_files, without = alternate(
                    partial(_cost_us, url, pace_ms),
                    partial(_cost_us, url, pace_ms, "--at-end-only"),
                    PAIRS,
                )
                figure = f"CPU of the stream's threads, steps of {pace_ms} ms, {where}"
                rows.append(
                    Figure.report(BENCH, figure, median(with_files), "µs", median(without))
                )
    finally:
        receiver.kill()
    return rows


def _cost_us(url: str, pace_ms: int, *options: str) -> float:
    """CPU time per step in µs of all threads of a trainer but its training one."""
    steps = STEPS // pace_ms
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        more = ("--steps", str(steps), "--step-ms", str(pace_ms), *options)
        trainer = Trainer(Path(folder), url, *more)
        trainer.wait_for_first_step()
        return float(trainer.finish())


if __name__ == "__main__":
    sys.exit(run(figures))
