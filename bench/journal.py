"""What keeping a record costs the trainer that waits for an answer.

Two sidecars, one with its journal and one with `--no-journal`, are asked in turn in short
blocks, an ask per millisecond as a fast training loop does: about steps at which nothing
is wrong, and about steps of which every one is a decision that is written down. Then the
thread time of judging one frame with the decision log and without, entries made included.

    python -m bench.journal [--json PATH]
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import thread_time_ns

from bench.figures import Figure, alternate, median, percentile, run
from bench.roundtrip import started, timed
from bench.roundtrip_peers import FRAME
from esper_otel.leyline.decisions import FAILED_OPEN
from esper_otel.leyline.frames import StepFrame, step_row
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.tool_requests import reply_to
from esper_otel.leyline.wire import Status, StatusRequest
from esper_otel.tamiyo.client import TamiyoClient
from esper_tamiyo.journaling.decision_log import DecisionLog
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.language.table_file import load

BENCH = "journal"

BLOCKS, ASKS, GAP_S = 20, 100, 1e-3
FRAMES_PER_BLOCK, FRAME_BLOCKS = 500, 20

TROUBLE = {"loss_delta": 9.0}
"""By `prototype`, every step of this is a PAUSE."""


def figures() -> list[Figure]:
    """All rows of this bench."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        stack.enter_context(serving(folder / "with.sock"))
        stack.enter_context(serving(folder / "without.sock", "--no-journal"))
        rows = []
        for name, values in (
            ("a step at which nothing is wrong", {}),
            ("a step whose decision is written down", TROUBLE),
        ):
            kept, bare = (
                stack.enter_context(asking(folder / f"{which}.sock", name, values))
                for which in ("with", "without")
            )
            rows += compared(name, kept, bare)
        rows.append(lost(folder / "with.sock"))
    return rows + judging()


def compared(name: str, kept: Callable[[], object], bare: Callable[[], object]) -> list[Figure]:
    """Rows of asking both, in turn."""
    of_kept, of_bare = (
        [took for times in blocks for took in times]
        for blocks in alternate(lambda: block(kept), lambda: block(bare), BLOCKS)
    )
    title = f"answer {{}}, {name}, over --no-journal"
    return [
        Figure.at_most(
            BENCH,
            title.format("p50"),
            percentile(of_kept, 50),
            "µs",
            percentile(of_bare, 50),
            bar=1.1,
        ),
        Figure.report(
            BENCH,
            title.format("p99"),
            percentile(of_kept, 99),
            "µs",
            percentile(of_bare, 99),
        ),
    ]


def block(ask: Callable[[], object]) -> list[float]:
    """Microseconds of each ask of a block."""
    return [timed(ask, GAP_S) for _ in range(ASKS)]


def lost(path: Path) -> Figure:
    """Entries that did not reach the journal."""
    answer = reply_to(StatusRequest(), path)
    assert isinstance(answer, Status)
    writer = answer.report["scribe"]
    return Figure.at_most(
        BENCH, f"entries lost, {writer['written']} written", writer["lost"], "entries", bar=0
    )


def judging() -> list[Figure]:
    """Rows of thread time per frame, with the decision log and without."""
    rows = []
    for name, values in (("nominal", {}), ("decided about", TROUBLE)):
        kept, bare = Judged(values, DecisionLog()), Judged(values, None)
        of_kept, of_bare = alternate(kept.block, bare.block, FRAME_BLOCKS)
        rows.append(
            Figure.report(
                BENCH,
                f"judging and noting a frame that is {name}, over judging",
                median(of_kept),
                "µs",
                median(of_bare),
            )
        )
    return rows


class Judged:
    """An engine that is given one frame after the other, and what that takes."""

    def __init__(self, values: dict[str, float], log: DecisionLog | None) -> None:
        self._engine = Engine(load("prototype"), observer=log)
        self._log = log
        self._values = {**FRAME, **values}
        self._step = 0

    def block(self) -> float:
        """Microseconds of thread time per frame."""
        frames = []
        for _ in range(FRAMES_PER_BLOCK):
            self._step += 1
            values = {**self._values, "step": float(self._step)}
            frames.append(StepFrame("bench", "bench", 0, self._step, self._step, values))
        began = thread_time_ns()
        for frame in frames:
            self._engine.observe(frame)
            if self._log is not None:
                self._log.make_entries(32, 0.0)
        return (thread_time_ns() - began) / FRAMES_PER_BLOCK / 1e3


@contextmanager
def serving(path: Path, *options: str) -> Iterator[dict[str, str]]:
    """A sidecar that hears asks only; the words of its ready line."""
    argv = [str(Path(sys.executable).with_name("tamiyo")), "serve", "--socket", str(path)]
    argv += ["--no-ingest", "--table", "prototype", *options]
    with started(argv) as (_, line):
        yield dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)


@contextmanager
def asking(path: Path, run_id: str, values: dict[str, float]) -> Iterator[Callable[[], object]]:
    """Asks about one step after the other, all with these values."""
    client = TamiyoClient(path, run=run_id, instance="bench", deadline_ms=5000.0)
    row = step_row()
    for key, value in {**FRAME, **values}.items():
        row[STEP_SLOT[key]] = value
    step = 0

    def ask() -> None:
        nonlocal step
        step += 1
        row[STEP_SLOT["step"]] = step
        decision = client.ask(step, time.time_ns(), row)
        if decision.reason in FAILED_OPEN:
            raise RuntimeError(f"the sidecar did not answer: {decision.reason}")

    try:
        yield ask
    finally:
        client.close()


if __name__ == "__main__":
    raise SystemExit(run(figures))
