"""A trainer without torch, to be killed: it hands over steps, and says so as it goes.

``python -m testkit.killed_trainer FOLDER URL`` streams a step every millisecond to an OTLP
receiver at ``URL`` until it is killed, or has made ``--steps``. Its spool is ``FOLDER/spool``;
in ``FOLDER/told`` it writes the number and Unix time of each step after it was handed over, so
what is there was recorded. :class:`Trainer` starts one, kills it, and says what is left of it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from esper_otel.leyline.frames import step_row
from esper_otel.leyline.otlp_file import RecordingError
from esper_otel.settings import EsperSettings
from esper_otel.stream import Stream, read_frames
from esper_otel.stream.destination import Signal
from esper_otel.stream.spool_files import spool_files_in
from testkit.patience import PATIENCE_S

RUN = "killed"
METRICS = 24


class Trainer:
    """One such process, and what it has left in ``folder``."""

    def __init__(self, folder: Path, url: str, *options: str) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "testkit.killed_trainer", str(folder), url, *options],
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for_first_step(self) -> None:
        """Return when it trains; raises ``RuntimeError`` when it has ended instead."""
        if self._process.stdout is None or self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the trainer did not begin")

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and wait for its end; the Unix time of the sending in ns."""
        at_ns = time.time_ns()
        self._process.send_signal(number)
        self.finish()
        return at_ns

    def finish(self) -> str:
        """Wait for its end; what it has printed since."""
        return self._process.communicate(timeout=PATIENCE_S)[0]

    def told(self) -> dict[int, int]:
        """The steps that it has handed over, and when (Unix, ns)."""
        lines = (self.folder / "told").read_text().splitlines()
        return {int(step): int(at_ns) for step, at_ns in map(str.split, lines)}

    def files(self) -> list[Path]:
        """Its spool files."""
        spool = self.folder / "spool"
        return spool_files_in(spool) if spool.exists() else []


class _Nobody(set[Signal]):
    """No signal is away, whatever is found: as before there were files that grow."""

    def add(self, signal: Signal) -> None:
        """It is not."""


def steps_in(files: Iterable[Path]) -> list[int]:
    """The steps in spool files, each as far as it can be read."""
    steps: list[int] = []
    for path in files:
        if not path.name.endswith(".metrics.otlp"):
            continue
        try:
            steps.extend(frame.step for frame in read_frames(path))
        except RecordingError:
            continue  # where the process was killed while it wrote
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m testkit.killed_trainer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("url")
    parser.add_argument("--steps", type=int, default=sys.maxsize)
    parser.add_argument("--step-ms", type=float, default=1.0)
    parser.add_argument("--at-end-only", action="store_true", help="no files before")
    options = parser.parse_args()
    logging.getLogger("esper_otel").setLevel(logging.ERROR)  # that nobody listens is known
    stream = Stream(
        EsperSettings(spool_dir=str(options.folder / "spool")),
        run_id=RUN,
        instance_id=str(os.getpid()),
        environ={"OTEL_EXPORTER_OTLP_ENDPOINT": options.url, "OTEL_TRACES_EXPORTER": "none"},
    )
    if options.at_end_only:
        stream._spool.away = _Nobody()
    stream.start()
    row = [0.5] * METRICS + step_row()[METRICS:]
    told = os.open(options.folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    began_s, own_s = time.process_time(), time.thread_time()
    for step in range(options.steps):
        row[0] = float(step)
        stream.frame(time.time_ns(), row)
        os.write(told, f"{step} {time.time_ns()}\n".encode())
        if step == 0:
            print("ready", flush=True)
        time.sleep(options.step_ms / 1e3)
    # What the other threads took, which is all that the stream costs beside handing over.
    others_s = (time.process_time() - began_s) - (time.thread_time() - own_s)
    print(others_s * 1e6 / options.steps)
    stream.close(0.0)


if __name__ == "__main__":
    main()
