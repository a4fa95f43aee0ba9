"""What a step loses when the sidecar is absent, frozen, killed, talking nonsense or late.

The client that training uses faces a small server in a process of its own, which goes
wrong in earnest: it is stopped by SIGSTOP, kills itself by SIGKILL in the middle of an
answer, writes garbage, or answers after twice the deadline. A step asks about once a
millisecond and each ask is timed; then the server is put right again. The bar of the
deadline leaves a tenth for waking up, which no timer takes back. What the machine itself
does to a call that does nothing is measured between the asks and reported at the end.

    python -m bench.sidecar_faults [--json PATH]
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns
from typing import NamedTuple

from bench.figures import Figure, percentile, run
from esper_otel.leyline.decisions import BREAKER_OPEN, FAILED_OPEN, NOT_ASKED, unanswered
from esper_otel.leyline.frames import step_row
from esper_otel.tamiyo.client import TamiyoClient

BENCH = "sidecar_faults"

DEADLINE_MS = 5.0
GAP_S = 1e-3

WELL_STEPS, FAULTY_STEPS, ROUNDS = 50, 250, 3
"""Faulty for over 0.4 s: the breaker opens, and its probes fail, more than once."""

OPEN = "ask while the breaker is open"
PERCENTILES = (("p50", 50), ("p99", 99), ("max", 100))

RECOVERY_S = 10.0
"""Longest that a recovery is waited for."""


class Server:
    """The server's process, which can be told to go wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start()

    def start(self) -> None:
        """Begin to listen."""
        argv = [sys.executable, "-m", "bench.faulty_sidecar", str(self.path)]
        self._process = subprocess.Popen(
            [*argv, str(2 * DEADLINE_MS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._expect("ready")

    def tell(self, manner: str) -> None:
        """How to answer from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{manner}\n")
        self._process.stdin.flush()
        self._expect(manner)

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def end(self) -> None:
        """No server, and no socket either."""
        with self._process as process:
            process.kill()
        self.path.unlink(missing_ok=True)

    def restart(self) -> None:
        """A new server, where the old one was."""
        self.end()
        self.start()

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        heard = self._process.stdout.readline().strip()
        if heard != line:
            raise RuntimeError(f"the server said {heard!r} instead of {line!r}")


class Fault(NamedTuple):
    """How it begins and how it ends; ``acquainted``: the client was connected before."""

    begin: Callable[[Server], None]
    end: Callable[[Server], None]
    acquainted: bool = True


FAULTS: dict[str, Fault] = {
    "absent": Fault(Server.end, Server.start, acquainted=False),
    "gone": Fault(Server.end, Server.start),
    "frozen": Fault(lambda s: s.signal(signal.SIGSTOP), lambda s: s.signal(signal.SIGCONT)),
    "killed mid-answer": Fault(lambda s: s.tell("die"), Server.restart),
    "garbage": Fault(lambda s: s.tell("garbage"), lambda s: s.tell("well")),
    "late": Fault(lambda s: s.tell("late"), lambda s: s.tell("well")),
}


class Losses:
    """What asks cost while the server was not well."""

    def __init__(self) -> None:
        self.waiting_us: list[float] = []
        """Asks that were sent and not answered."""
        self.open_us: list[float] = []
        """Asks while the breaker was open."""
        self.recoveries: list[tuple[float, float]] = []
        """Milliseconds from the end of the fault to an answer, and of the cool-down."""
        self.exceptions = 0
        self.nothing_us: list[float] = []
        """Calls that do nothing, as a measure of the machine."""


class Steps:
    """A loop that asks after every step."""

    def __init__(self, path: Path) -> None:
        self.client = TamiyoClient(path, run="bench", instance="bench", deadline_ms=DEADLINE_MS)
        self.cool_down_ms = 0.0
        """The cool-down that began last."""
        self._row = step_row()
        self._step = self._opened = 0

    def ask(self) -> tuple[str, float]:
        """One step: the reason of its decision and what the ask took, in microseconds."""
        time.sleep(GAP_S)
        self._step += 1
        self._row[0] = self._step
        began = perf_counter_ns()
        reason = self.client.ask(self._step, 0, self._row).reason
        ended = perf_counter_ns()
        breaker = self.client.breaker
        if breaker.opened != self._opened:
            self._opened = breaker.opened
            self.cool_down_ms = breaker.cool_down_ns / 1e6
        return reason, (ended - began) / 1e3


def suffer(fault: Fault, path: Path, losses: Losses) -> None:
    """One round: well, faulty, well again."""
    server = Server(path)
    steps = Steps(path)
    try:
        if fault.acquainted:
            acquaint(steps)
        fault.begin(server)
        for _ in range(FAULTY_STEPS):
            try:
                reason, us = steps.ask()
            except Exception:
                losses.exceptions += 1
                continue
            (losses.open_us if reason == BREAKER_OPEN else losses.waiting_us).append(us)
            losses.nothing_us.append(nothing())
        if not losses.waiting_us or not losses.open_us:
            raise RuntimeError("the fault did not show")
        fault.end(server)
        losses.recoveries.append(recovery(steps))
    finally:
        steps.client.close()
        server.end()


def acquaint(steps: Steps) -> None:
    """Ask until enough steps in a row were answered; a busy machine misses one at times."""
    answered = 0
    for _ in range(100 * WELL_STEPS):
        reason, _ = steps.ask()
        answered = 0 if reason in FAILED_OPEN else answered + 1
        if answered == WELL_STEPS:
            return
    raise RuntimeError(f"not answered before the fault: {reason}")


def nothing() -> float:
    """A step that does not ask, in microseconds."""
    time.sleep(GAP_S)
    began = perf_counter_ns()
    unanswered("bench", 0, NOT_ASKED)
    return (perf_counter_ns() - began) / 1e3


def recovery(steps: Steps) -> tuple[float, float]:
    """Milliseconds until an answer, and the longest cool-down that was in force meanwhile."""
    began = perf_counter_ns()
    cool_down_ms = steps.cool_down_ms
    while (perf_counter_ns() - began) / 1e9 < RECOVERY_S:
        reason, _ = steps.ask()
        cool_down_ms = max(cool_down_ms, steps.cool_down_ms)
        if reason not in FAILED_OPEN:
            break
    return (perf_counter_ns() - began) / 1e6, cool_down_ms


def rows(name: str, losses: Losses) -> list[Figure]:
    """The rows of one fault."""
    recovered, cool_down = max(losses.recoveries, key=lambda pair: pair[0] / pair[1])
    waited = max(losses.waiting_us) / 1e3
    until = f"{name}: ask until the breaker opens, max, over the deadline"
    back = f"{name}: until answers come again, worst, over the cool-down"
    return [
        Figure.at_most(BENCH, until, waited, "ms", DEADLINE_MS, bar=1.0),
        *(
            Figure.at_most(BENCH, f"{name}: {OPEN}, {label}", us, "µs", bar=50.0)
            for label, percent in PERCENTILES
            for us in (percentile(losses.open_us, percent),)
        ),
        Figure.at_most(BENCH, back, recovered, "ms", cool_down, bar=1.0),
        Figure.at_most(BENCH, f"{name}: exceptions", losses.exceptions, "", bar=0.0),
    ]


def figures() -> list[Figure]:
    """All rows of this bench."""
    measured: list[Figure] = []
    nothing_us: list[float] = []
    logging.getLogger("esper_otel").setLevel(logging.ERROR)  # it warns, and rightly
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        for name, fault in FAULTS.items():
            losses = Losses()
            for _ in range(ROUNDS):
                suffer(fault, Path(folder) / "tamiyo.sock", losses)
            measured += rows(name, losses)
            nothing_us += losses.nothing_us
    return measured + [
        Figure.report(
            BENCH,
            f"this machine: a step that does not ask, {label}",
            percentile(nothing_us, p),
            "µs",
        )
        for label, p in PERCENTILES
    ]


if __name__ == "__main__":
    raise SystemExit(run(figures))
