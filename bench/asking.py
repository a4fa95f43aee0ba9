"""What asking at every step costs the thread that trains.

* Steps of 1, 5 and 20 ms, of which the thread is busy all the time. At the end of each the
  sidecar is asked about it, by the client that training uses, in two ways: the answer is
  *collected* when the step after it is all but over, as training does, or *waited for* at
  once. What counts is the time within the client, sending included. A bare Python echo with
  messages of the same sizes is asked in turn with both, in both ways and in short blocks; first
  with an idle sidecar, then while 50,000 OTLP points per second come in. The echo that is
  *collected* is the floor: the two system calls, which no client can do without.
* One step held against its guards, which happens before every update.
* Time per step of a small CNN and a transformer: bare, recorded but not asking, and asking at
  every step, in turn in one process, under zero-code instrumentation.

    python -m bench.asking [--json PATH]
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from bench.figures import Figure, median, percentile, run
from bench.roundtrip import Echo, Feed, echo, feeder, put_step, tamiyo
from bench.roundtrip_peers import FRAME
from esper_otel.leyline import wire
from esper_otel.leyline.decisions import FAILED_OPEN, Decision
from esper_otel.leyline.frames import step_row
from esper_otel.leyline.guards import Guards
from esper_otel.leyline.metrics import STEP_SLOT
from esper_otel.leyline.wire import Guard
from esper_otel.tamiyo.client import TamiyoClient

BENCH = "asking"

POINTS_PER_S = 50_000
STEPS = ((1, 100, 15), (5, 40, 12), (20, 15, 12))
"""Milliseconds of a step, steps per block, and blocks."""

BAR_US = 30.0
GUARDS_BAR_US = 5.0
ADDED_BAR = 1.1

TURNS = 30
TURN_STEPS, WARM_STEPS = 40, 8
"""Steps of one turn that are measured, and those before, in which threads begin."""

Block = Callable[[float, int], list[float]]
"""Microseconds of asking in each of so many steps, of so many ms."""


class Asked:
    """A run that asks about a step after the other."""

    def __init__(self, path: Path, run_id: str) -> None:
        # A deadline that no ask meets: a tail that is cut off looks better than it is.
        self.client = TamiyoClient(path, run=run_id, instance=run_id, deadline_ms=5000.0)
        self.row = step_row()
        for key, value in FRAME.items():
            self.row[STEP_SLOT[key]] = value
        self.step = 0

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def stepped(self) -> None:
        """The next step has ended."""
        self.step += 1
        put_step(self.row, self.step)

    def waiting(self, step_ms: float, steps: int) -> list[float]:
        """A block whose answers are waited for."""
        times = []
        for _ in range(steps):
            work(step_ms)
            self.stepped()
            began = perf_counter_ns()
            decision = self.client.ask(self.step, time.time_ns(), self.row)
            times.append((perf_counter_ns() - began) / 1e3)
            answered(decision)
        return times

    def collecting(self, step_ms: float, steps: int) -> list[float]:
        """A block whose answers are collected a step later."""
        times = []
        for _ in range(steps):
            self.stepped()
            began = perf_counter_ns()
            self.client.send(self.step, time.time_ns(), self.row)
            sent = perf_counter_ns()
            work(step_ms)
            asked = perf_counter_ns()
            decision = self.client.collect()
            times.append((perf_counter_ns() - asked + sent - began) / 1e3)
            answered(decision)
        return times

    def sizes(self) -> tuple[int, int]:
        """Bytes of an ask and of its answer."""
        self.stepped()
        decision = self.client.ask(self.step, time.time_ns(), self.row)
        answered(decision)
        ask = wire.Ask(self.step, self.step, time.time_ns(), self.row)
        return len(wire.encode(ask)), len(wire.encode(wire.Answer(self.step, decision)))


def answered(decision: Decision | None) -> None:
    """An ask that fails open is no measurement."""
    if decision is None or decision.reason in FAILED_OPEN:
        raise RuntimeError(f"the sidecar did not answer: {decision and decision.reason}")


def work(ms: float) -> None:
    """Be busy for so long."""
    until = perf_counter_ns() + int(ms * 1e6)
    while perf_counter_ns() < until:
        pass


def waiting_echo(echo: Echo) -> Block:
    """Blocks of bare round trips."""

    def block(step_ms: float, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            work(step_ms)
            began = perf_counter_ns()
            echo()
            times.append((perf_counter_ns() - began) / 1e3)
        return times

    return block


def collected_echo(echo: Echo) -> Block:
    """Blocks of bare round trips whose second half is done a step later."""

    def block(step_ms: float, steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            began = perf_counter_ns()
            echo.send()
            sent = perf_counter_ns()
            work(step_ms)
            asked = perf_counter_ns()
            echo.receive()
            times.append((perf_counter_ns() - asked + sent - began) / 1e3)
        return times

    return block


def thread_time(ways: dict[str, Block], feed: Feed) -> Iterator[Figure]:
    """Rows of what asking takes of the training thread."""
    for loaded in (False, True):
        for step_ms, steps, blocks in STEPS:
            times: dict[str, list[float]] = {name: [] for name in ways}
            # So long that it lasts; what is left of it is waited for.
            if loaded:
                feed.begin(len(ways) * blocks * steps * (step_ms + 0.5) / 1e3)
            for _ in range(blocks):
                for name, block in ways.items():
                    times[name] += block(step_ms, steps)
            if loaded:
                feed.finish()
            points = f"{feed.rate:,.0f} points/s" if loaded else "idle"
            yield from rows_of(times, f"steps of {step_ms} ms, sidecar {points}")


def rows_of(times: dict[str, list[float]], where: str) -> Iterator[Figure]:
    p50, p99 = (
        {name: percentile(values, percent) for name, values in times.items()}
        for percent in (50, 99)
    )
    ours = p50["collected"]
    yield Figure.at_most(BENCH, f"asking p50, {where}", ours, "µs", bar=BAR_US)
    yield Figure.at_most(
        BENCH, f"the same over a bare echo, {where}", ours, "µs", p50["echo"], bar=1.0
    )
    yield Figure.report(
        BENCH, f"the same over a collected echo, {where}", ours, "µs", p50["collected echo"]
    )
    yield Figure.report(BENCH, f"the same over waiting, {where}", ours, "µs", p50["waited for"])
    yield Figure.report(
        BENCH, f"asking p99 over a bare echo, {where}", p99["collected"], "µs", p99["echo"]
    )
    yield Figure.report(
        BENCH, f"asking p99 over waiting, {where}", p99["collected"], "µs", p99["waited for"]
    )


def guards_cost() -> Iterator[Figure]:
    """Rows of one step held against its guards."""
    guards = Guards(
        [
            Guard("loss", above=2.0, below=-1.0),
            Guard("gradient_norm", above=50.0, below=0.001),
            Guard("optimizer_lr", above=0.1, below=1e-6),
            Guard("nonfinite", above=0.0, skips=True),
        ]
    )
    calls = 1000
    times = []
    for _ in range(200):
        began = perf_counter_ns()
        for _ in range(calls):
            guards.crossed(0.5, 1.5, 0.01)
        times.append((perf_counter_ns() - began) / 1e3 / calls)
    yield Figure.at_most(
        BENCH, "a step held against its guards, p50", median(times), "µs", bar=GUARDS_BAR_US
    )
    yield Figure.report(BENCH, "the same, slowest of 200 blocks", max(times), "µs")


class Loop:
    """A training that goes on, turn after turn."""

    def __init__(self, model: nn.Module, batches: Iterator[Any], clip: float) -> None:
        self._model = model
        self._batches = batches
        self._clip = clip
        self._optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def turn(self) -> float:
        """Mean milliseconds of a step."""
        began = 0.0
        for nth, (inputs, targets) in enumerate(islice(self._batches, WARM_STEPS + TURN_STEPS)):
            if nth == WARM_STEPS:
                began = perf_counter()
            self._optimizer.zero_grad()
            outputs = self._model(inputs)
            loss = nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
            self._optimizer.step()
        return (perf_counter() - began) * 1e3 / TURN_STEPS


def digits() -> Loop:
    """The CNN of ``examples/digits.py``."""
    from examples.digits import DigitsNet, load

    loader = DataLoader(load(0)[0], batch_size=64, shuffle=True, drop_last=True)
    return Loop(DigitsNet(), forever(loader), 5.0)


def transformer() -> Loop:
    """The one of ``examples/characters.py``."""
    from examples.characters import BATCH, Writer, load

    text = load()
    loader = DataLoader(text, BATCH, shuffle=True)
    return Loop(Writer(len(text.letters)), forever(loader), 1.0)


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def added_time(name: str, loop: Loop) -> Iterator[Figure]:
    """Rows of what instrumentation adds to a step, asking and not."""
    took: dict[str, list[float]] = {"": [], "off": [], "advise": []}
    loop.turn()
    for turn in range(TURNS):
        modes = list(took)
        for mode in modes[turn % 3 :] + modes[: turn % 3]:
            took[mode].append(one_turn(loop, mode))
    bare = took[""]
    added = {
        mode: [(a - b) * 1e3 for a, b in zip(took[mode], bare, strict=True)]
        for mode in ("off", "advise")
    }
    yield Figure.at_most(
        BENCH,
        f"{name}: added per step asking, over not asking, median of {TURNS} pairs",
        median(added["advise"]),
        "µs",
        median(added["off"]),
        bar=ADDED_BAR,
    )
    for mode, how in (("advise", "asking"), ("off", "not asking")):
        quartiles = statistics.quantiles(added[mode], n=4)
        yield Figure.report(
            BENCH, f"{name}: added per step {how}, first quartile", quartiles[0], "µs"
        )
        yield Figure.report(BENCH, f"{name}: the same, third quartile", quartiles[2], "µs")
    yield Figure.report(
        BENCH,
        f"{name}: wall time per step, asking, over bare",
        median(took["advise"]),
        "ms",
        median(bare),
    )


def one_turn(loop: Loop, mode: str) -> float:
    """A turn under that mode; "" is bare."""
    if not mode:
        return loop.turn()
    from esper_otel.integrations.torch import TorchInstrumentor

    TorchInstrumentor().instrument(skip_dep_check=True, mode=mode, summary="off")
    try:
        return loop.turn()
    finally:
        TorchInstrumentor().uninstrument()


def figures() -> list[Figure]:
    """All rows of this bench."""
    logging.getLogger("esper_otel").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esper-bench-")))
        socket = folder / "tamiyo.sock"
        words = stack.enter_context(tamiyo(socket))
        collecting = stack.enter_context(Asked(socket, "collecting"))
        waiting = stack.enter_context(Asked(socket, "waiting"))
        bare = stack.enter_context(echo(folder / "echo.sock", *waiting.sizes()))
        ways = {
            "collected": collecting.collecting,
            "waited for": waiting.waiting,
            "echo": waiting_echo(bare),
            "collected echo": collected_echo(bare),
        }
        with feeder(words["otlp_http"], POINTS_PER_S) as feed:
            feed.begin(1.0)  # the first requests find the receiver still importing
            feed.finish()
            rows = list(thread_time(ways, feed))
        rows += guards_cost()
        os.environ.update(
            {
                "ESPER_TAMIYO_SOCKET": str(socket),
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{words['otlp_http']}",
                "ESPER_SPOOL_DIR": str(folder / "spool"),
            }
        )
        for name, make in (("digits CNN", digits), ("transformer", transformer)):
            torch.manual_seed(0)
            rows += added_time(name, make())
    return rows


if __name__ == "__main__":
    raise SystemExit(run(figures))
