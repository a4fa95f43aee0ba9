"""Whether steps are counted as taken and their time adds up, in every loop and way in.

Runs the loops of ``testkit/loops.py`` instrumented in code, the same training under each
framework with and without our callback, a loop that is told of us, and one loop under each
command that instruments a script. What was counted is read back from the run's recording,
what was taken the loops say themselves. The latency of each step and the sum of its phases
are held against a clock of the loop's own (``testkit/stopwatch.py``).

Loops of the kinds that public scripts have keep an account of their own, with which what was
recorded and what an enforced factor did are compared (:mod:`bench.public_scripts`).

The worst step has a bar as well as the median one. Between the loop's reading of the clock
and ours another process may get the processor, so a loop with a step that is off runs again,
five times at most, and the run whose worst step is best counts: what this package does
wrong it does wrong each time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from bench.figures import Figure, median, run
from bench.public_scripts import account
from esper_otel.integrations.torch import TorchInstrumentor
from esper_otel.process import start
from esper_otel.stream import read_frames
from testkit import framework_loops, loops
from testkit.framework_loops import BATCH, FRAMEWORKS, ROWS
from testkit.loops import AWKWARD, PHASES
from testkit.stopwatch import STOPWATCH, Took

BENCH = "awkward"
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
BAR = 5
"""Percent that a step may be off the loop's own clock."""
TRIES = 5
QUIET = {
    "ESPER_MODE": "off",
    "ESPER_SUMMARY": "off",
    # Recorded and not sent: a recording has what is sent.
    **{f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")},
}


OF_PUBLIC = [
    ("steps", "steps miscounted", "steps"),
    ("losses", "losses not as the loop says", "steps"),
    ("norms", "gradient norms not those before clipping", "steps"),
    ("rates", "rates recorded that were not used", "steps"),
    ("factors", "enforced, updates with another rate than the script's × factor", "updates"),
    ("weights", "weights that differ from the bare loop's", "tensors"),
]


class Counted(NamedTuple):
    """Steps that a loop took and that were counted, and how far their time is off.

    ``off`` has one number for each step but the first: how many percent of the time that
    the loop's own clock took the step's latency or the sum of its phases are off it,
    whichever is more. Around Lightning's validation only what is too much counts.
    """

    name: str
    taken: int
    steps: list[int]
    off: list[float]

    @property
    def miscounted(self) -> int:
        """Steps that were left out, made up or counted twice."""
        steps = set(self.steps)
        return len(set(range(1, self.taken + 1)) ^ steps) + len(self.steps) - len(steps)


def figures() -> list[Figure]:
    warnings.simplefilter("ignore")  # of the frameworks, about one another
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(QUIET)
        public, wrong = account(Path(tempfile.mkdtemp(dir=folder)))
        all_counted = [quietest(count, folder) for count in every_way()]
    miscounted = sum(counted.miscounted for counted in all_counted)
    return [
        Figure.at_most(
            BENCH, f"steps miscounted, {len(all_counted)} loops", miscounted, "steps", bar=0
        ),
        *(
            Figure.at_most(BENCH, f"{public} public loops, {what}", wrong[kind], unit, bar=0)
            for kind, what, unit in OF_PUBLIC
        ),
        *(figure for counted in all_counted for figure in rows(counted)),
    ]


def rows(counted: Counted) -> Iterator[Figure]:
    name = f"{counted.name}, {len(counted.steps)} steps of {counted.taken}: off the clock"
    if counted.off:
        yield Figure.at_most(BENCH, f"{name}, median", median(counted.off), "%", bar=BAR)
        yield Figure.at_most(BENCH, f"{name}, worst", max(counted.off), "%", bar=BAR)


def quietest(count: Callable[[Path], Counted], folder: Path) -> Counted:
    """What ``count`` counted in that of a few runs whose worst step was least off."""
    best: Counted | None = None
    for _ in range(TRIES):
        counted = count(Path(tempfile.mkdtemp(dir=folder)))
        if counted.miscounted:
            return counted
        if best is None or max(counted.off) < max(best.off):
            best = counted
        if max(best.off) <= BAR:
            break
    assert best is not None
    return best


def every_way() -> Iterator[Callable[[Path], Counted]]:
    """What runs each loop in its way; called with the folder to record in."""
    for name, loop in AWKWARD.items():
        yield partial(automatic, name, loop)
    for name, train in FRAMEWORKS.items():
        if name != "plain" and find_spec(name) is None:
            print(f"{name} is not installed: left out")
            continue
        for accumulate in (1, 4):
            losses = partial(train, accumulate=accumulate)
            steps = ROWS // BATCH // accumulate
            title = name + (f", {accumulate} batches a step" if accumulate > 1 else "")
            if name != "plain":
                watched = partial(losses, watch=True)
                yield partial(explicit, f"{title}, our callback", watched, steps)
                yield partial(automatic, f"{title}, zero-code", partial(_taken, losses, steps))
    yield partial(explicit, "a loop that is told of us", told_of_us, ROWS // BATCH)
    for name, command in commands().items():
        yield partial(launched, name, command)


def _taken(train: Callable[[], object], steps: int) -> int:
    train()
    return steps


def automatic(name: str, loop: Callable[[], int], folder: Path) -> Counted:
    """``loop`` instrumented from outside; it returns the steps it took."""
    with recording(folder):
        TorchInstrumentor().instrument(skip_dep_check=True)
        try:
            taken = loop()
        finally:
            TorchInstrumentor().uninstrument()
    return counted(name, taken, folder, STOPWATCH.steps())


def explicit(name: str, train: Callable[[], object], taken: int, folder: Path) -> Counted:
    """``train`` calls us itself."""
    with recording(folder):
        train()
    return counted(name, taken, folder, STOPWATCH.steps())


def told_of_us() -> None:
    model = loops.network()
    optimizer = STOPWATCH.on(loops.adam(model))
    told = start(optimizer)
    for x, y in told.batches(framework_loops.loader()):
        with told.phase("forward"):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
        with told.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        told.report(loss=loss)
        optimizer.step()
    told.close()


def commands() -> dict[str, list[str]]:
    """Every command that instruments, and the loop it runs."""
    loop = ["-m", "testkit.loops", "plain"]
    esper, torchrun = str(BIN / "esper-otel"), str(BIN / "torchrun")
    otel = BIN / "opentelemetry-instrument"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    return {
        "esper-otel run -m": [esper, "run", *loop],
        "esper-otel run": [esper, "run", str(ROOT / "testkit" / "loops.py"), "plain"],
        "python -m esper_otel": [sys.executable, "-m", "esper_otel", "run", *loop],
        "opentelemetry-instrument": [str(otel), sys.executable, *loop],
        "esper-otel run torchrun": [esper, "run", "torchrun", *one, *loop],
        "torchrun -m esper_otel": [torchrun, *one, "-m", "esper_otel", "run", *loop],
    }


def launched(name: str, command: list[str], folder: Path) -> Counted:
    """A command whose loop prints the steps it took, and how long they were."""
    with recording(folder):
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        printed = subprocess.run(
            command,
            check=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ).stdout
    told = json.loads(printed)
    return counted(name, told["taken"], folder, [Took(*step) for step in told["took"]])


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Have the next run recorded in ``folder``, and its steps timed."""
    STOPWATCH.clear()
    os.environ["ESPER_RECORDING_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["ESPER_RECORDING_DIR"]


def counted(name: str, taken: int, folder: Path, took: list[Took]) -> Counted:
    """What the recordings in ``folder`` have, against what the loop's clock says.

    There is one for each training of the loop; its steps are counted on from those before it.
    """
    steps: list[int] = []
    rows: list[dict[str, float]] = []
    files = folder.glob("*.metrics.otlp")
    for file in sorted(files, key=lambda file: (len(file.name), file.name)):
        frames = list(read_frames(file))
        before = len(steps)
        steps += [before + frame.step for frame in frames]
        rows += [frame.values for frame in frames]
    if steps != list(range(1, taken + 1)):
        return Counted(name, taken, steps, [])
    off = [
        percent_off(values, step)
        for values, step in zip(rows[1:], took, strict=True)
        if values["step"] > 1
    ]
    return Counted(name, taken, steps, off)


def percent_off(values: dict[str, float], took: Took) -> float:
    phases = sum(values.get(phase, 0.0) for phase in PHASES)
    differences = [ms - took.ms for ms in (values["step_latency_ms"], phases)]
    if took.at_most:
        return max(0.0, *differences) / took.ms * 100
    return max(map(abs, differences)) / took.ms * 100


if __name__ == "__main__":
    sys.exit(run(figures))
