"""A table loaded again every second of a run: late answers, lost state, other decisions.

Two sidecars judge the same steps by the same rules, an ask per millisecond, in turn. The
file of one of them is rewritten every second, each time with another comment, so that it
is another table of the same rules, and SIGHUP has it loaded. Both must then decide alike,
and the states of their rules must be the same.

    python -m bench.reloading [--json PATH]
"""

from __future__ import annotations

import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import msgspec

from bench.figures import Figure, percentile, run
from bench.roundtrip import started
from esper_otel.leyline.decisions import FAILED_OPEN, Decision
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Status, StatusRequest
from esper_otel.tamiyo.client import TamiyoClient
from esper_tamiyo.language.table_file import SHIPPED

BENCH = "reloading"

SECONDS = 30
GAP_S = 1e-3
LATE_US = 5_000.0
"""The default deadline of a trainer."""


class Judge:
    """A sidecar with a table file of its own, and a trainer that asks it."""

    def __init__(self, name: str, folder: Path, text: str, stack: ExitStack) -> None:
        self.us: list[float] = []
        self._text = text
        self._table = folder / f"{name}.yaml"
        self._table.write_text(text)
        self._socket = folder / f"{name}.sock"
        command = [str(Path(sys.executable).with_name("tamiyo")), "serve", "--no-ingest"]
        options = ["--socket", str(self._socket), "--table", str(self._table)]
        self._process, line = stack.enter_context(started([*command, *options]))
        assert line.startswith("tamiyo ready"), shlex.split(line)
        # A deadline that no ask meets: a late answer is counted here, and compared too.
        self._client = TamiyoClient(
            self._socket, run="bench", instance="bench", deadline_ms=5000.0
        )
        stack.callback(self._client.close)

    def ask(self, step: int, now_ns: int, row: list[float]) -> Decision:
        """The decision about a step, but for the table's version."""
        time.sleep(GAP_S)
        began = perf_counter_ns()
        decision = self._client.ask(step, now_ns, row)
        self.us.append((perf_counter_ns() - began) / 1e3)
        if decision.reason in FAILED_OPEN:
            raise RuntimeError(f"the sidecar did not answer: {decision.reason}")
        return msgspec.structs.replace(decision, table_version="")

    def rewrite(self, comment: object) -> None:
        """Make the file another one, with the same rules, and have it loaded."""
        fresh = self._table.with_suffix(".fresh")
        fresh.write_text(f"{self._text}\n# {comment}\n")
        fresh.replace(self._table)
        self._process.send_signal(signal.SIGHUP)

    def report(self) -> dict[str, Any]:
        """What the sidecar says of itself."""
        reply = reply_to(StatusRequest(), self._socket)
        assert isinstance(reply, Status)
        return reply.report

    @property
    def late(self) -> int:
        """Answers that a trainer would not have waited for."""
        return sum(us > LATE_US for us in self.us)


def steps() -> Iterator[list[float]]:
    """Rows of a run that falls into one trouble after the other; the same every time."""
    chance = random.Random(1)
    step, loss = 0, 2.0
    while True:
        trouble = step // 100 % 5 if step % 100 > 80 else 0
        jump = 3.0 if trouble == 1 and step % 100 == 90 else 0.0
        loss = max(0.05, loss * 0.999 + chance.gauss(0, 0.01) + jump)
        row = step_row()
        for key, value in {
            "step": step,
            "loss": loss,
            "loss_delta": chance.gauss(0, 0.02) + jump,
            "loss_volatility": abs(chance.gauss(0.02, 0.01)) + jump / 3,
            "gradient_norm": abs(chance.gauss(1, 0.1)) * (30 if trouble == 2 else 1),
            "grad_var": abs(chance.gauss(0.1, 0.05)),
            "step_latency_ms": chance.lognormvariate(1, 0.2) * (9 if trouble == 3 else 1),
            "input_wait_ms": 2.5 if trouble == 4 else 0.1,
            "optimizer_lr": 0.1 * 0.999 ** (step // 1000),
            "nonfinite": 0.0,
        }.items():
            row[STEP_SLOT[key]] = value
        yield row
        step += 1


def figures() -> list[Figure]:
    """All rows of this bench."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        text = (SHIPPED / "default.yaml").read_text()
        still, moving = (Judge(name, folder, text, stack) for name in ("still", "moving"))
        differ = lost = asked = fired = 0
        began = rewritten = perf_counter()
        for step, row in enumerate(steps()):
            now_ns = time.time_ns()
            pair = (still, moving) if step % 2 else (moving, still)
            one, other = (judge.ask(step, now_ns, row) for judge in pair)
            asked += 1
            fired += one.reason != "nominal"
            differ += one != other
            if perf_counter() - rewritten >= 1.0:
                lost += states(still) != states(moving)
                moving.rewrite(step)
                rewritten = perf_counter()
                if rewritten - began > SECONDS:
                    break
        reloads = moving.report()["table"]["reloads"]
        if reloads < SECONDS / 2 or not fired:
            raise RuntimeError(f"{reloads} reloads and {fired} findings: nothing was tried")
    return [
        Figure.report(BENCH, "asks of each sidecar", asked, ""),
        Figure.report(BENCH, "reloads meanwhile", reloads, ""),
        Figure.report(BENCH, "decisions that were not nominal", fired, ""),
        Figure.at_most(BENCH, "decisions that differ", differ, "", bar=0.0),
        Figure.at_most(BENCH, "looks at which rules' states differ", lost, "", bar=0.0),
        Figure.at_most(BENCH, "answers later than 5 ms", moving.late, "", bar=0.0),
        Figure.report(BENCH, "this machine: the same without reloads", still.late, ""),
        *(
            Figure.report(
                BENCH,
                f"answer {label} over that without reloads",
                percentile(moving.us, percent),
                "µs",
                percentile(still.us, percent),
            )
            for label, percent in (("p50", 50), ("p99", 99), ("p99.9", 99.9), ("max", 100))
        ),
    ]


def states(judge: Judge) -> Any:
    """The states of all rules of the run."""
    return [run["rules"] for run in judge.report()["engine"]["runs"]]


if __name__ == "__main__":
    raise SystemExit(run(figures))
