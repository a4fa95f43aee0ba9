"""What `esper-otel top` takes beside a training, and what it adds to the sidecar that it asks.

Top runs in a pseudo terminal of 80 × 24, which a thread of this process reads. Steps are
recorded at a steady pace by this process, or asked about by a client of a sidecar. What counts
is the processor time that the process used, after it has read what there was, over the time by
the clock. Beside it: an empty live display of rich, as often refreshed.
"""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from bench.figures import Figure, run
from bench.roundtrip import Asked
from bench.sidecar_process import SidecarProcess
from esper_otel.leyline.metrics import (
    INSTANCE_ID,
    RANK,
    RUN_ID,
    SEED_KEYS,
    STEP_KEYS,
    STEP_SLOT,
)
from esper_otel.leyline.otlp_file import framed
from esper_otel.stream.encoding import FrameEncoder
from esper_otel.stream.ring import Frames, Rows

BENCH = "top"
SECONDS = 15.0
BEFORE = 10_000
"""Steps that are there when it begins: charts are full of points."""
PACES = (10, 200)
_EMPTY = """
import time
from rich.console import Console
from rich.live import Live
from rich.text import Text
console = Console(force_terminal=True)
with Live(Text(), console=console, screen=True, auto_refresh=False) as live:
    while True:
        time.sleep(0.5)
        live.update(Text(), refresh=True)
"""


def figures() -> list[Figure]:
    empty = share([sys.executable, "-c", _EMPTY], lambda: None, 1)
    found = [Figure.report(BENCH, "an empty live display of rich", empty, "% of a core")]
    for pace in PACES:
        with tempfile.TemporaryDirectory() as folder:
            recorder = Recorder(Path(folder, "run-rank0.metrics.otlp"))
            recorder.write(BEFORE)
            used = share(top(folder), recorder.step, pace)
        what = f"top, of a recording of {pace} steps a second"
        found.append(Figure.at_most(BENCH, what, used, "% of a core", bar=3))
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder, "run-rank0.metrics.otlp"))
        recorder.write(BEFORE)
        used = share(top(folder), lambda: None, 1)
    still = "top, of a recording that stands still"
    found.append(Figure.report(BENCH, still, used, "% of a core"))
    return [*found, *of_a_sidecar(PACES[-1])]


def of_a_sidecar(pace: int) -> Iterator[Figure]:
    """Top and the process that decides, beside that process without top."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SidecarProcess(Path(folder)) as sidecar,
        Asked(sidecar.socket) as asked,
    ):
        for _ in range(BEFORE // 2):
            asked.ask()
        command, decide = top("--socket", str(sidecar.socket)), psutil.Process(sidecar.pid)
        alone = share(None, asked.ask, pace, decide)
        used = share(command, asked.ask, pace)
        together = share(command, asked.ask, pace, decide)
    what = f"top, of a sidecar that is asked {pace} times a second"
    yield Figure.at_most(BENCH, what, used, "% of a core", bar=3)
    yield Figure.report(
        BENCH, "that sidecar, beside it without top", together, "% of a core", alone
    )


class Recorder:
    """Writes a recording as a run does: a request for each tenth of a second."""

    def __init__(self, path: Path) -> None:
        resource = Resource()
        resource.attributes.add(key=RUN_ID).value.string_value = "bench"
        resource.attributes.add(key=INSTANCE_ID).value.string_value = "one"
        resource.attributes.add(key=RANK).value.int_value = 0
        self._encoder = FrameEncoder(resource.SerializeToString())
        self._path = path
        self._random = np.random.default_rng(1)
        self._next = 0
        self._waiting = 0
        self._due = perf_counter()

    def write(self, count: int) -> None:
        """So many steps, all at once."""
        steps = np.arange(self._next, self._next + count)
        self._next += count
        values = self._random.random((count, len(STEP_KEYS)))
        values[:, STEP_SLOT["step"]] = steps
        values[:, STEP_SLOT["nonfinite"]] = 0.0
        times = time.time_ns() - (count - 1 - np.arange(count)) * 1_000_000
        none = np.empty(0, np.int64)
        no_seeds = Rows(none, none, np.empty((0, len(SEED_KEYS))))
        frames = Frames(Rows(times, np.zeros(count, np.int64), values), no_seeds, [])
        with self._path.open("ab") as file:
            for request in self._encoder.encode(frames):
                file.write(framed(request.body))

    def step(self) -> None:
        """Write one step, with others that come at about the same time."""
        self._waiting += 1
        if perf_counter() >= self._due:
            self._due = perf_counter() + 0.1
            count, self._waiting = self._waiting, 0
            self.write(count)


def top(*arguments: str) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "esper_otel", "top", *arguments]


def share(
    command: list[str] | None,
    step: Callable[[], object],
    pace: int,
    measured: psutil.Process | None = None,
) -> float:
    """Percent of a core that a command, or ``measured``, uses while steps are made."""
    with in_a_terminal(command) as process:
        looked_at = measured or process
        assert looked_at is not None
        keep_pace(step, pace, 3.0)
        before, began = looked_at.cpu_times(), perf_counter()
        keep_pace(step, pace, SECONDS)
        after, took = looked_at.cpu_times(), perf_counter() - began
    used = after.user + after.system - before.user - before.system
    return 100.0 * used / took


def keep_pace(step: Callable[[], object], pace: int, seconds: float) -> None:
    """Make steps, so many a second."""
    began = perf_counter()
    made = 0
    while (now := perf_counter() - began) < seconds:
        if made <= now * pace:
            made += 1
            step()
        else:
            time.sleep(min(1.0 / pace, 0.05))


@contextmanager
def in_a_terminal(command: list[str] | None) -> Iterator[psutil.Process | None]:
    """A command whose terminal somebody reads; none for None."""
    if command is None:
        yield None
        return
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment
    )
    reader = threading.Thread(target=read_all, args=(master,), daemon=True)
    reader.start()
    try:
        yield psutil.Process(process.pid)
        if process.poll() is not None:
            raise RuntimeError(f"{command} ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait()
        os.close(slave)
        reader.join(5)
        os.close(master)


def read_all(master: int) -> None:
    """Read what a terminal is given, until nobody has it open any more."""
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(run(figures))
