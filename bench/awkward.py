"""Whether steps are counted as taken and their time adds up, in every loop and way in.

Runs the loops of ``bench/loops.py`` instrumented in code, the same training under each
framework with and without our callback, a loop that is told of us, and one loop under each
command that instruments a script. What was counted is read back from the run's recording,
what was taken the loops say themselves. The phases of a step are held against its
``step_latency_ms``, and, where this process trains with one optimizer and does nothing else
between its steps, against the time that a hook of the bench's own takes between them.
"""

from __future__ import annotations

import contextlib
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
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns as clock
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench import framework_loops, loops
from bench.figures import Figure, median, run
from bench.framework_loops import BATCH, FRAMEWORKS, ROWS
from bench.loops import AWKWARD, PHASES, unaccounted
from esper_otel.integrations.torch import TorchInstrumentor
from esper_otel.run import start
from esper_otel.stream import read_frames
from esper_otel.tolaria.step_hooks import untraced

BENCH = "awkward"
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
EVALUATES = ("validation", "lightning, 4 batches a step")
"""Loops that evaluate after every step, which is not the steps' time."""
QUIET = {
    "ESPER_MODE": "off",
    "ESPER_SUMMARY": "off",
    # Recorded and not sent: a recording has what is sent.
    **{f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "TRACES", "LOGS")},
}


class Counted(NamedTuple):
    """Steps that a loop took and that were counted, and how far their time is off.

    ``unaccounted`` is the largest share of a step's latency that is in none of its phases
    or in two of them. ``off_clock`` is how far the phases of the median step are from the
    time that the bench took, as a share of that; None where it could not.
    """

    name: str
    taken: int
    steps: list[int]
    unaccounted: float
    off_clock: float | None


def figures() -> list[Figure]:
    warnings.simplefilter("ignore")  # of the frameworks, about one another
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(QUIET)
        all_counted = [count(folder) for count in every_way(folder)]
    miscounted = sum(
        len(set(range(1, counted.taken + 1)) ^ set(counted.steps))
        + len(counted.steps)
        - len(set(counted.steps))
        for counted in all_counted
    )
    return [
        Figure.at_most(
            BENCH, f"steps miscounted, {len(all_counted)} loops", miscounted, "steps", bar=0
        ),
        *(figure for counted in all_counted for figure in rows(counted)),
    ]


def rows(counted: Counted) -> Iterator[Figure]:
    name = f"{counted.name}, {len(counted.steps)} steps of {counted.taken}: phases"
    yield Figure.at_most(
        BENCH, f"{name}, off step_latency_ms, most", counted.unaccounted * 100, "%", bar=5
    )
    if counted.off_clock is not None:
        yield Figure.at_most(
            BENCH, f"{name}, off the clock, median", counted.off_clock * 100, "%", bar=5
        )


def every_way(folder: Path) -> Iterator[Callable[[Path], Counted]]:
    """What runs each loop in its way; called with the folder to record below."""
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
    with recording(folder, name) as own, ends_of_steps() as ends:
        TorchInstrumentor().instrument(skip_dep_check=True)
        try:
            taken = loop()
        finally:
            TorchInstrumentor().uninstrument()
    return counted(name, taken, own, ends)


def explicit(name: str, train: Callable[[], object], taken: int, folder: Path) -> Counted:
    """``train`` calls us itself."""
    with recording(folder, name) as own, ends_of_steps() as ends:
        train()
    return counted(name, taken, own, ends)


def told_of_us() -> None:
    model = loops.network()
    optimizer = loops.adam(model)
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
    loop = ["-m", "bench.loops", "plain"]
    esper, torchrun = str(BIN / "esper-otel"), str(BIN / "torchrun")
    otel = BIN / "opentelemetry-instrument"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    one = ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    return {
        "esper-otel run -m": [esper, "run", *loop],
        "esper-otel run": [esper, "run", str(ROOT / "bench" / "loops.py"), "plain"],
        "python -m esper_otel": [sys.executable, "-m", "esper_otel", "run", *loop],
        "opentelemetry-instrument": [str(otel), sys.executable, *loop],
        "esper-otel run torchrun": [esper, "run", "torchrun", *one, *loop],
        "torchrun -m esper_otel": [torchrun, *one, "-m", "esper_otel", "run", *loop],
    }


def launched(name: str, command: list[str], folder: Path) -> Counted:
    """A command that prints the steps its loop took."""
    with recording(folder, name) as own:
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
    return counted(name, int(printed), own, [])


@contextlib.contextmanager
def recording(folder: Path, name: str) -> Iterator[Path]:
    """Have the next run recorded in a folder of its own."""
    own = folder / name.replace(" ", "-").replace(",", "")
    os.environ["ESPER_RECORDING_DIR"] = str(own)
    try:
        yield own
    finally:
        del os.environ["ESPER_RECORDING_DIR"]


@contextlib.contextmanager
def ends_of_steps() -> Iterator[list[int]]:
    """When optimizers have stepped, in nanoseconds of ``perf_counter``."""
    ends: list[int] = []
    # Before any of ours, so that it is called before them.
    handle = register_optimizer_step_post_hook(untraced(lambda *_: ends.append(clock())))
    try:
        yield ends
    finally:
        handle.remove()


def counted(name: str, taken: int, folder: Path, ends: list[int]) -> Counted:
    """What the one recording in ``folder`` has, against the ``ends`` of its steps."""
    (file,) = folder.glob("*.metrics.otlp")
    frames = list(read_frames(file))
    off = [
        abs(unaccounted(frame.values)) / frame.values["step_latency_ms"]
        for frame in frames
        if "step_latency_ms" in frame.values and set(PHASES) & frame.values.keys()
    ]
    steps = [frame.step for frame in frames]
    if name.startswith(EVALUATES) or not len(ends) == len(steps) == taken:
        return Counted(name, taken, steps, max(off), None)
    walls = [(end - before) / 1e6 for before, end in pairwise(ends)]
    sums = [sum(frame.values.get(phase, 0.0) for phase in PHASES) for frame in frames[1:]]
    off_clock = [abs(a - b) / b for a, b in zip(sums, walls, strict=True)]
    return Counted(name, taken, steps, max(off), median(off_clock))


if __name__ == "__main__":
    sys.exit(run(figures))
