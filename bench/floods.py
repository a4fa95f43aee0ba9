"""What floods do to a sidecar with its default limits: to its memory, and to those beside them.

A trainer asks every 10 ms, in a process of its own, and asks a bare echo beside it; an honest
producer sends a step every 50 ms over HTTP and over gRPC, and comes again where it is told to.
Then come, one after the other with some seconds of rest between them: 10,000 short runs, ever
new runs, seeds and ranks, half of them over OTLP and half over the socket; steps with 256 new
seeds; requests and gRPC calls that are never finished; 1,100 connections that send a byte a
second; gzip bombs; long names of many steps; requests of empty messages. The kernel keeps the
peak of each process; what is compared is the sum of all peaks, which is more than was ever
taken at once. Seconds of one attack and runs in all are for longer tries:

    python -m bench.floods [--json PATH]
    FLOODS_SECONDS=60 FLOODS_RUNS=100000 python -m bench.floods
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from bench.figures import Figure, percentile, run
from bench.floods_peers import ATTACKS, BY_NUMBER, Outcome
from bench.roundtrip import started
from bench.sidecar_process import PROCESSES, STATED_MB, Peaks, SidecarProcess
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Latest, LatestRequest

BENCH = "floods"

ATTACK_S = float(os.environ.get("FLOODS_SECONDS", "5"))
RUNS = int(os.environ.get("FLOODS_RUNS", "10000"))
WARM_S, ALONE_S, REST_S = 3.0, 6.0, 3.0
SETTLE_S = 10.0
"""Longest that what was taken last is waited for."""

ALONE = "left alone"
REST = "between"

BAR_MS = 5.0


Ask = tuple[float, float, float, bool]
"""When it began, seconds of it and of an echo beside it, whether it was answered."""


class Phase(NamedTuple):
    """What went on from when to when, of the monotonic clock."""

    name: str
    began: float
    ended: float


class Peer:
    """A process beside the sidecar, which works until it is told to stop."""

    def __init__(
        self, stack: ExitStack, *arguments: str, module: str = "bench.floods_peers"
    ) -> None:
        argv = [sys.executable, "-m", module, *arguments]
        self._process, _ = stack.enter_context(started(argv))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def tell(self, line: str = "") -> None:
        """Begin, or stop."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """What came of it; waits."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended early: {shlex.join(map(str, self._process.args))}")  # type: ignore[arg-type]
        return json.loads(line)


def flooded(sidecar: SidecarProcess, peaks: Peaks) -> Iterator[Phase]:
    """The phases, one after the other."""

    def passed(name: str, seconds: float) -> Phase:
        peaks.begin(name)
        began = time.monotonic()
        time.sleep(seconds)
        return Phase(name, began, time.monotonic())

    time.sleep(WARM_S)
    yield passed(ALONE, ALONE_S)
    words = sidecar.words
    for name in ATTACKS:
        with ExitStack() as stack:
            where = (words["otlp_http"], words["otlp_grpc"], words["socket"])
            attacker = Peer(stack, "attack", name, *where)
            peaks.begin(name)
            began = time.monotonic()
            attacker.tell(str(RUNS / 2 if name in BY_NUMBER else ATTACK_S))
            counts = attacker.result()
            yield Phase(name, began, time.monotonic())
            print(f"  {name}: {counts}", flush=True)
        yield passed(REST, REST_S)


def figures() -> list[Figure]:
    """All rows of this bench."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        sidecar = stack.enter_context(SidecarProcess(folder))
        words = sidecar.words
        bystander = Peer(stack, "bystander", words["socket"])
        honest = Peer(stack, "honest", words["otlp_http"], words["otlp_grpc"])
        with Peaks(sidecar) as peaks:
            phases = list(flooded(sidecar, peaks))
            honest.tell()
            outcomes = [Outcome(*each) for each in honest.result()]
            unknown = [*not_known(sidecar, outcomes)]
            bystander.tell()
            asks = bystander.result()
        status = sidecar.status()
        tracebacks = sidecar.tracebacks()
        kept = folder / "log"
        print(f"  log: {kept.stat().st_size:,} bytes", flush=True)
    print(f"  refused: {status['engine']['refused']}, frames: {status['engine']['frames']}")
    return [
        *memory(peaks),
        *waits(phases, asks),
        *taken(BENCH, outcomes),
        *unknown,
        Figure.at_most(
            BENCH,
            "processes that ended",
            len([name for names in peaks.replaced.values() for name in names]),
            "",
            bar=0.0,
        ),
        Figure.at_most(BENCH, "tracebacks in the log", tracebacks, "", bar=0.0),
    ]


def not_known(sidecar: SidecarProcess, outcomes: list[Outcome]) -> Iterator[Figure]:
    """Rows of whether what was taken of the honest runs has been judged."""
    for way in ("HTTP", "gRPC"):
        sent = sum(each.way == way for each in outcomes)
        until = time.monotonic() + SETTLE_S
        while True:
            latest = reply_to(LatestRequest(f"honest-{way}"), sidecar.socket)
            assert isinstance(latest, Latest)
            known = 0 if latest.decision is None else latest.decision.observed_step + 1
            if known == sent or time.monotonic() > until:
                break
            time.sleep(0.1)
        yield Figure.at_most(
            BENCH,
            f"newest honest step over {way}, beyond the newest that was judged",
            sent - known,
            "steps",
            bar=0.0,
        )


def memory(peaks: Peaks) -> Iterator[Figure]:
    """Rows of what the processes took at most, in MB of 2**20 bytes."""
    yield Figure.at_most(
        BENCH,
        "peaks of all processes together, over what is stated",
        peaks.together(list(peaks.peaks)),
        "MB",
        STATED_MB,
        bar=1.0,
    )
    for name in PROCESSES:
        most = max(of_phase.get(name, 0.0) for of_phase in peaks.peaks.values())
        alone = peaks.peaks[ALONE].get(name)
        yield Figure.report(BENCH, f"peak of {name}, over it left alone", most, "MB", alone)
    for name in ATTACKS:
        together = peaks.together([name])
        yield Figure.report(
            BENCH,
            f"peaks of all processes, {name}, over left alone",
            together,
            "MB",
            peaks.together([ALONE]),
        )


def waits(
    phases: list[Phase], asks: list[tuple[float, float, float, bool]]
) -> Iterator[Figure]:
    """Rows of what the trainer beside it all waited."""

    def p99(name: str, column: int) -> float:
        spans = [(each.began, each.ended) for each in phases if each.name == name]
        found = [
            float(ask[column])
            for ask in asks
            if any(began <= ask[0] < ended for began, ended in spans)
        ]
        return percentile(found, 99) * 1e3

    alone = p99(ALONE, 1)
    yield Figure.report(
        BENCH, "ask p99, left alone, over a bare echo", alone, "ms", p99(ALONE, 2)
    )
    for name in ATTACKS:
        p99_ms = p99(name, 1)
        yield Figure.at_most(BENCH, f"ask p99, {name}", p99_ms, "ms", bar=BAR_MS)
        yield Figure.report(BENCH, f"the same over left alone, {name}", p99_ms, "ms", alone)
        yield Figure.report(
            BENCH, f"the same over a bare echo meanwhile, {name}", p99_ms, "ms", p99(name, 2)
        )
    yield Figure.at_most(
        BENCH,
        f"asks that nobody answered, of {len(asks):,}",
        sum(not ask[3] for ask in asks),
        "",
        bar=0.0,
    )


def taken(bench: str, outcomes: list[Outcome]) -> Iterator[Figure]:
    """Rows of what became of honest requests."""
    for way in ("HTTP", "gRPC"):
        some = [each for each in outcomes if each.way == way]
        for each in some:
            if not each.taken:
                print(f"  {way}: not taken: {each.why}")
        total = f"of {len(some):,}"
        yield Figure.at_most(
            bench,
            f"honest requests over {way} that were not taken in the end, {total}",
            sum(not each.taken for each in some),
            "",
            bar=0.0,
        )
        yield Figure.report(
            bench,
            f"honest requests over {way} that had to come again, {total}",
            sum(each.attempts > 1 for each in some),
            "",
        )
        yield Figure.report(
            bench,
            f"longest until one was taken over {way}",
            max(each.waited_s for each in some),
            "s",
        )


if __name__ == "__main__":
    sys.exit(run(figures))
